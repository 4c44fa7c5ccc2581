"""Reading and writing adapters, and that plain diffusers understands what we write."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_files import attention, kohya, lora, low_rank, matrices, peft, write
from intarsia.pipelines import atomic
from intarsia.pipelines.adapter_file import card, half, read_adapter, write_adapter
from intarsia.pipelines.adapter_types import LowRank
from intarsia.pipelines.errors import AdapterError, MemoryLimitError
from intarsia.pipelines.headers import hashes, read_header
from intarsia.pipelines.identify import inspect

SD15 = matrices("sd15")
SDXL = matrices("sdxl")
SOME = dict(list(attention(SD15).items())[::9])
PEFT_KEY = "lora_adapter_metadata"


def layers(shapes: dict[str, tuple[int, ...]] = SOME, alpha: float = 2.0) -> dict[str, LowRank]:
    """Random factors; every third layer has another rank, every second another alpha."""
    made: dict[str, LowRank] = {}
    generator = torch.Generator().manual_seed(0)
    for number, (path, shape) in enumerate(shapes.items()):
        rank = 4 if number % 3 else 2
        down = torch.randn(rank, *shape[1:], generator=generator)
        up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator)
        made[path] = LowRank(down, up, alpha if number % 2 else 1.0)
    return made


def test_what_is_written_is_read_back_exactly(tmp_path: Path) -> None:
    written = layers()
    texts = card("sd15", role="style", base="my model", trigger="a [s]", title="Mine")
    write_adapter(tmp_path / "a.safetensors", written, texts)
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert (adapter.family, adapter.role, adapter.trigger) == ("sd15", "style", "a [s]")
    assert adapter.layers.keys() == written.keys()
    for path, layer in low_rank(adapter).items():
        assert torch.equal(written[path].down, layer.down)
        assert torch.equal(written[path].up, layer.up)
        assert written[path].alpha == layer.alpha


def test_the_header_carries_modelspec_and_the_hash_of_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_adapter(path, layers(), card("sd15", trigger="a [s]", base="mini"))
    header = read_header(path)
    assert header.metadata["modelspec.hash_sha256"] == "0x" + hashes(header)[1]
    assert header.metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert header.metadata["modelspec.trigger_phrase"] == "a [s]"
    assert inspect(path).base == "mini"


def test_the_same_layers_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_adapter(tmp_path / name, layers(), card("sd15", title="x"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_other_parsers_read_the_file(tmp_path: Path) -> None:
    from safetensors import safe_open

    write_adapter(tmp_path / "a.safetensors", layers(), {}, dtype=torch.float16)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert len(list(file.keys())) == 2 * len(SOME)
        assert file.get_tensor(next(iter(file.keys()))).dtype == torch.float16


def test_nothing_is_written_for_nan_or_no_layers(tmp_path: Path) -> None:
    bad = layers()
    next(iter(bad.values())).up[0, 0] = torch.nan
    for wrong in ({}, bad):
        with pytest.raises(AdapterError):
            write_adapter(tmp_path / "a.safetensors", wrong, {})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.Path, "replace", full)
    with pytest.raises(MemoryLimitError, match="disk is full"):
        write_adapter(path, layers(), {})
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert path.read_bytes() == b"old"


def test_kohya_alpha_per_layer_and_missing_alpha(tmp_path: Path) -> None:
    with_alpha = read_adapter(write(tmp_path / "a.safetensors", lora(SOME, kohya, rank=4, alpha=2)))
    assert {layer.scale for layer in low_rank(with_alpha).values()} == {0.5}
    without = read_adapter(write(tmp_path / "b.safetensors", lora(SOME, kohya, rank=lambda n: n % 3 + 1)))
    assert {layer.scale for layer in low_rank(without).values()} == {1.0}


def test_alpha_as_a_whole_number_is_read(tmp_path: Path) -> None:
    tensors = lora(SOME, kohya, rank=4, alpha=1)
    tensors = {n: v.astype(np.int64) if n.endswith("alpha") else v for n, v in tensors.items()}
    adapter = read_adapter(write(tmp_path / "a.safetensors", tensors))
    assert {layer.alpha for layer in low_rank(adapter).values()} == {1.0}


@pytest.mark.parametrize("alpha", [np.array([1.0, 2.0]), np.array(np.float32("nan"))])
def test_an_alpha_that_is_no_number_is_refused(tmp_path: Path, alpha: Any) -> None:  # noqa: ANN401
    tensors = lora(SOME, kohya, rank=4, alpha=1)
    name = next(name for name in tensors if name.endswith("alpha"))
    with pytest.raises(AdapterError):
        read_adapter(write(tmp_path / "a.safetensors", tensors | {name: alpha.astype(np.float32)}))


def scales(tmp_path: Path, metadata: str) -> tuple[set[float], tuple[str, ...]]:
    path = write(tmp_path / "a.safetensors", lora(SOME, peft, rank=4), {PEFT_KEY: metadata})
    adapter = read_adapter(path)
    assert adapter.layers.keys() == SOME.keys()
    return {layer.scale for layer in low_rank(adapter).values()}, inspect(path).warnings


def test_peft_metadata_gives_alpha_and_nothing_else(tmp_path: Path) -> None:
    values = {"unet.r": 4, "unet.lora_alpha": 8, "unet.target_modules": "all-linear", "unet.init": "os.system"}
    assert scales(tmp_path, json.dumps(values)) == ({2.0}, ())


def test_rank_stabilised_scale_is_alpha_over_root_rank(tmp_path: Path) -> None:
    values = {"unet.r": 4, "unet.lora_alpha": 8, "unet.use_rslora": True}
    assert scales(tmp_path, json.dumps(values))[0] == {4.0}


def test_alpha_pattern_names_single_layers(tmp_path: Path) -> None:
    first = next(iter(SOME)).removeprefix("unet.")
    values = {"unet.r": 4, "unet.lora_alpha": 4, "unet.alpha_pattern": {f"^{first}": 2}}
    assert scales(tmp_path, json.dumps(values))[0] == {1.0, 0.5}


@pytest.mark.parametrize(
    "metadata",
    [
        "not json",
        "[1, 2]",
        "[" * 100_000,
        json.dumps({"unet.r": 4}),
        json.dumps({"unet.r": "4", "unet.lora_alpha": 8}),
        json.dumps({"unet.r": 4, "unet.lora_alpha": float("inf")}),
        json.dumps({"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": [1]}),
        json.dumps({"unet.r": 16, "unet.lora_alpha": 8}),  # the tensors say 4
    ],
)
def test_malformed_peft_metadata_is_ignored_with_a_warning(tmp_path: Path, metadata: str) -> None:
    found, warnings = scales(tmp_path, metadata)
    assert found == {1.0}
    assert any("ignored" in warning for warning in warnings)


def test_patterns_are_not_used_as_regular_expressions(tmp_path: Path) -> None:
    values = {"unet.r": 4, "unet.lora_alpha": 4, "unet.alpha_pattern": {".*": 400, "(a+)+$": 400}}
    assert scales(tmp_path, json.dumps(values))[0] == {1.0}


def test_refused_files_raise_with_their_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"lora_unet_x.oft_blocks": np.ones((2, 2), np.float32)})
    with pytest.raises(AdapterError, match="OFT"):
        read_adapter(path)


def test_flat_factors_of_1x1_convolutions_get_the_shape_of_their_layer(tmp_path: Path) -> None:
    name = "unet.down_blocks.0.attentions.0.proj_in"
    assert SD15[name] == (320, 320, 1, 1)
    flat = write(tmp_path / "a.safetensors", lora({name: (320, 320)}, peft))
    layer = low_rank(read_adapter(flat, SD15))[name]
    assert (layer.down.ndim, layer.up.ndim) == (4, 4)
    tall = write(tmp_path / "b.safetensors", lora({name: (320, 320, 1, 1)}, peft))
    layer = low_rank(read_adapter(tall, {name: (320, 320)}))[name]
    assert (layer.down.ndim, layer.up.ndim) == (2, 2)


def test_a_b_lora_is_cut_into_halves(tmp_path: Path) -> None:
    blocks = ("unet.up_blocks.0.attentions.0.", "unet.up_blocks.0.attentions.1.")
    shapes = {p: s for p, s in attention(SDXL).items() if p.startswith(blocks)}
    adapter = read_adapter(write(tmp_path / "a.safetensors", lora(shapes, peft, rank=1)))
    content, style = half(adapter, "content"), half(adapter, "style")
    assert (len(content.layers), len(style.layers)) == (80, 80)
    assert content.layers.keys() | style.layers.keys() == adapter.layers.keys()
    assert (content.role, style.role) == ("content", "style")
    with pytest.raises(AdapterError, match="no style half"):
        half(content, "style")
