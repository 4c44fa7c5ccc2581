"""Groups of an adapter's layers: every layer in exactly one, and factors that reach what a group says."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapter_files import attention, kohya, lora, matrices, peft, write
from intarsia.pipelines.adapter_types import AdapterFile
from intarsia.pipelines.attach import Attachment
from intarsia.pipelines.block_groups import BlockGroup, block_groups, groups_of_file


def titles(groups: tuple[BlockGroup, ...]) -> list[str]:
    return [group.title for group in groups]


def reached(path: str, group: BlockGroup) -> bool:
    """Whether the engine takes a group's factor for a layer."""
    empty = AdapterFile(Path("a"), "sdxl", "concept", "", {}, "", {})
    return Attachment("a", empty, blocks=dict.fromkeys(group.starts, 3.0)).factor(path) == 3.0


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux1", "wan-1.3b"])
def test_every_layer_is_in_one_group_and_the_engine_agrees(family: str) -> None:
    paths = list(matrices(family))
    groups = block_groups(paths, family)
    for path in paths:
        outer = [group for group in groups if not group.inside and reached(path, group)]
        assert len(outer) == 1, path
    for group in groups:
        assert group.layers == sum(reached(path, group) for path in paths)
    assert len(groups) < 16


def test_an_sdxl_adapter_has_content_and_style_inside_the_first_up_block() -> None:
    groups = block_groups(matrices("sdxl"), "sdxl")
    assert titles(groups) == [
        "text encoder", "text encoder 2", "down 0", "down 1", "down 2", "mid", "up 0", "content", "style", "up 1",
        "up 2", "other layers",
    ]  # fmt: skip
    assert {group.title: group.inside for group in groups if group.inside} == {"content": "up 0", "style": "up 0"}
    assert groups[8].starts == ("unet.up_blocks.0.attentions.1",)
    assert "content" not in titles(block_groups(matrices("sd15"), "sd15"))


def test_a_b_lora_has_its_two_blocks_and_nothing_around_them() -> None:
    inside = [path for path in matrices("sdxl") if path.startswith("unet.up_blocks.0.attentions.")]
    paths = [path for path in inside if ".attentions.2." not in path]
    groups = block_groups(paths, "sdxl")
    assert titles(groups) == ["content", "style"]
    assert not any(group.inside for group in groups)


def test_stacks_of_equal_blocks_are_cut_into_ranges() -> None:
    groups = block_groups([path for path in matrices("flux1") if path.startswith("transformer.")], "flux1")
    assert titles(groups) == [
        "blocks 0 to 3", "blocks 4 to 7", "blocks 8 to 11", "blocks 12 to 15", "blocks 16 to 18",
        "single blocks 0 to 6", "single blocks 7 to 13", "single blocks 14 to 20", "single blocks 21 to 27",
        "single blocks 28 to 34", "single blocks 35 to 37", "other layers",
    ]  # fmt: skip
    assert groups[4].starts == tuple(f"transformer.transformer_blocks.{number}" for number in (16, 17, 18))


def test_a_file_is_grouped_by_its_header_in_any_spelling(tmp_path: Path) -> None:
    shapes = attention({p: s for p, s in matrices("sdxl").items() if ".down_blocks.2." in p or ".mid_block." in p})
    expected = ["down 2", "mid"]
    for name, spelling in (("kohya", kohya), ("peft", peft)):
        file = write(tmp_path / f"{name}.safetensors", lora(shapes, spelling, rank=1))
        groups = groups_of_file(file)
        assert titles(groups) == expected
        assert sum(group.layers for group in groups) == len(shapes)
