"""Key spellings against oracles: diffusers' own converters, and the layer lists built from the real configurations."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from adapter_files import matrices, write
from intarsia.pipelines.architectures import ModuleIndex, build_reference, reference, sgm_spelling
from intarsia.pipelines.dialects import ALGORITHMS, FAMILIES, MODELS, claimed_family, recognise, split_key
from intarsia.pipelines.identify import inspect
from intarsia.pipelines.numbered_names import in_order


def test_the_layer_list_is_that_of_the_real_sd15() -> None:
    assert build_reference("sd15") == reference("sd15").shapes


@pytest.mark.slow
def test_the_layer_list_is_that_of_the_real_sdxl() -> None:
    assert build_reference("sdxl") == reference("sdxl").shapes


def test_known_counts_of_layers() -> None:
    xl = matrices("sdxl")
    attentions = [path for path in xl if path.startswith("unet.") and ".attentions." in path]
    assert len(attentions) == 722  # what a kohya SDXL LoRA of the UNet holds
    linears = [path for path in attentions if path.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))]
    assert len(linears) == 560  # four projections of 140 attentions


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_layer_has_one_spelling_of_its_own(family: str) -> None:
    index = reference(family)
    for path in index.shapes:
        component, _, inner = path.partition(".")
        assert index.find(component, inner) == path
        assert index.find(component, inner.replace(".", "_")) == path


def test_sgm_names_are_those_diffusers_converts_back() -> None:
    """Oracle: diffusers maps Stability's block names to its own; ours goes the other way, for all 722 modules."""
    from diffusers.loaders.lora_conversion_utils import (
        _maybe_map_sgm_blocks_to_diffusers as convert,  # pyright: ignore[reportPrivateUsage]
    )

    paths = [p.removeprefix("unet.") for p in matrices("sdxl") if ".attentions." in p and p.startswith("unet.")]
    spelled = {f"lora_unet_{sgm_spelling(path, 2, paths)}.alpha": path for path in paths}
    assert len(spelled) == 722
    config: Any = SimpleNamespace(layers_per_block=2)
    back = convert({name: path for name, path in spelled.items()}, config)
    for half_converted, path in back.items():  # diffusers renames the outer blocks in a second step
        name = half_converted.replace("input_b", "down_b").replace("output_b", "up_b").replace("middle_b", "mid_b")
        assert name == f"lora_unet_{path.replace('.', '_')}.alpha"


@pytest.mark.parametrize(
    ("sgm", "path"),
    [
        ("input_blocks_4_1_proj_out", "down_blocks.1.attentions.0.proj_out"),
        ("input_blocks_5_0_in_layers_2", "down_blocks.1.resnets.1.conv1"),
        ("input_blocks_6_0_op", "down_blocks.1.downsamplers.0.conv"),
        ("middle_block_1_proj_in", "mid_block.attentions.0.proj_in"),
        ("middle_block_2_out_layers_3", "mid_block.resnets.1.conv2"),
        ("output_blocks_1_1_proj_in", "up_blocks.0.attentions.1.proj_in"),
        ("output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks_8_0_skip_connection", "up_blocks.2.resnets.2.conv_shortcut"),
        ("output_blocks_3_0_emb_layers_1", "up_blocks.1.resnets.0.time_emb_proj"),
        ("time_embed_2", "time_embedding.linear_2"),
        ("label_emb_0_2", "add_embedding.linear_2"),
        ("input_blocks_0_0", "conv_in"),
        ("out_2", "conv_out"),
    ],
)  # fmt: skip
def test_sgm_names_written_by_hand_are_found(sgm: str, path: str) -> None:
    assert reference("sdxl").find("unet", sgm) == f"unet.{path}"


def test_text_encoders_are_found_with_and_without_text_model() -> None:
    index = ModuleIndex({"text_encoder.encoder.layers.0.self_attn.q_proj.weight": (8, 8)})
    path = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    assert list(index.shapes) == [path]
    for spelling in (
        "text_model_encoder_layers_0_self_attn_q_proj",
        "encoder.layers.0.self_attn.q_proj",
        "text_model.encoder.layers.0.self_attn.to_q",
    ):
        assert index.find("text_encoder", spelling) == path


@pytest.mark.parametrize(
    ("name", "components", "module", "part"),
    [
        ("lora_unet_conv_in.lora_down.weight", ("unet", "transformer"), "conv_in", "down"),
        ("lora_unet_unet_conv_in.alpha", ("unet",), "conv_in", "alpha"),
        ("unet.a.b.lora_A.default.weight", ("unet",), "a.b", "down"),
        ("unet.a.attn1.processor.to_q_lora.up.weight", ("unet",), "a.attn1.processor.to_q", "up"),
        ("text_encoder_2.x.lora_linear_layer.up.weight", ("text_encoder_2",), "x", "up"),
        ("lora_te2_x.lora_up.weight", ("text_encoder_2",), "x", "up"),
        ("base_model.model.a.b.lora_B.weight", ("unet", "transformer", "text_encoder"), "a.b", "up"),
    ],
)
def test_names_are_taken_apart(name: str, components: tuple[str, ...], module: str, part: str) -> None:
    key = split_key(name)
    assert key is not None
    assert (key.components, key.module, key.part) == (components, module, part)


def test_a_plain_weight_is_of_ia3_only_beside_its_mark() -> None:
    names = ["lora_unet_conv_in.weight", "lora_unet_conv_in.on_input", "lora_unet_conv_out.weight"]
    parts = [key.part if (key := split_key(name, names)) else None for name in names]
    assert parts == ["ia3", "on_input", None]


def test_other_tensors_are_not_taken_apart() -> None:
    for name in ("unet.conv_in.weight", "a.oft_blocks", "a.hada", "diff"):
        assert split_key(name) is None


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_no_layer_of_sd_is_taken_for_something_foreign(family: str) -> None:
    names: list[str] = []
    for path in reference(family).shapes:
        component, _, inner = path.partition(".")
        kohya = inner.replace(".", "_")
        names += [f"{path}.lora_A.weight", f"base_model.model.{inner}.lora_A.weight", f"{inner}.lora.up.weight"]
        names += [f"lora_{component}_{kohya}.lora_up.weight", f"lora_te1_{kohya}.alpha"]
    for table in (ALGORITHMS, FAMILIES):
        assert recognise(names, table) is None
    assert recognise(["lora_unet_conv_in.lora_up.weight"], MODELS) is None


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "sd15"),
        ({"ss_base_model_version": "sd_v2_v"}, "sd2"),
        ({"intarsia.family": "sdxl", "ss_base_model_version": "sd_1.5"}, "sdxl"),
        ({"ss_base_model_version": "None"}, ""),
    ],
)
def test_claims_of_the_metadata(metadata: dict[str, str], family: str) -> None:
    assert claimed_family(metadata) == family


def test_numbered_layers_are_those_the_package_walked() -> None:
    """What the shapes of published files say of the order."""
    index = reference("sd15")
    unet = [path.removeprefix("unet.") for path in index.shapes if path.startswith("unet.")]
    order = in_order("unet", unet)
    assert len(order) == 144 and len(set(order)) == 144
    # widths going in and out: of the first block, at the turn to `up`, and of the middle block
    sizes = [tuple(reversed(index.shapes[f"unet.{path}"][:2])) for path in order]
    assert sizes[:9] == [(320, 320)] * 4 + [(320, 2560), (320, 320), (768, 320), (768, 320), (320, 320)]
    assert sizes[54] == (1280, 1280) and order[54].startswith("up_blocks.1.attentions.0.")
    assert order[135].startswith("mid_block.") and sizes[139] == (1280, 10240)
    text = in_order("text_encoder", [p.removeprefix("text_encoder.") for p in index.shapes if "text_encoder." in p])
    assert len(text) == 48 and [path.rsplit(".", 1)[1] for path in text[:4]] == [
        "k_proj",
        "v_proj",
        "q_proj",
        "out_proj",
    ]
    assert text[4].split(".")[3] == "1" and text[40].split(".")[3] == "10"


def test_a_numbered_file_fits_and_tells_of_its_words(tmp_path: Path) -> None:
    index = reference("sd15")
    tensors: dict[str, Any] = {"<s1>": np.ones(768, np.float32)}
    for component, count in (("unet", 144), ("text_encoder", 48)):
        for number in range(count):
            ((piece),) = index.pieces(component, f":{number}")
            out, inside = piece.whole[:2]
            tensors[f"{component}:{number}:down"] = np.ones((2, inside), np.float32)
            tensors[f"{component}:{number}:up"] = np.ones((out, 2), np.float32)
    report = inspect(write(tmp_path / "a.safetensors", tensors))
    assert (report.refusal, report.family, report.matched, report.modules) == ("", "sd15", 192, 192)
    assert report.dialect == "lora_diffusion" and any("<s1>" in text for text in report.warnings)
