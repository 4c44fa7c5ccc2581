"""What a dropped file is: every dialect that must work, and everything else refused by its name.

The table of inputs that diffusers 0.42 loads silently, wrongly or not at all is covered row by row.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from adapter_files import (
    Arrays,
    Spelling,
    attention,
    default_peft,
    kohya,
    linear_layer,
    lora,
    lycoris,
    matrices,
    old_diffusers,
    peft,
    processor,
    wrapped_peft,
    write,
)
from intarsia.pipelines import identify
from intarsia.pipelines.architectures import ModuleIndex, reference, sgm_spelling
from intarsia.pipelines.errors import AdapterError
from intarsia.pipelines.identify import Report, inspect

SD15 = matrices("sd15")
SDXL = matrices("sdxl")
A = np.zeros((2, 8), np.float32)
UP_BLOCK = "unet.up_blocks.0.attentions"


@pytest.fixture(autouse=True)
def no_mini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found must not depend on which weights Mini has today."""
    monkeypatch.setattr(identify, "mini_folder", lambda: tmp_path / "no mini")


def some(shapes: dict[str, tuple[int, ...]], *starts: str, every: int = 1) -> dict[str, tuple[int, ...]]:
    return dict(list((p, s) for p, s in shapes.items() if p.startswith(starts))[::every])


def look(
    tmp_path: Path,
    tensors: Arrays,
    metadata: dict[str, str] | None = None,
    shapes: dict[str, tuple[int, ...]] | None = None,
) -> Report:
    return inspect(write(tmp_path / "file.safetensors", tensors, metadata), shapes)


def sgm(path: str) -> tuple[str, str, str]:
    if not path.startswith("unet."):
        return kohya(path)
    inner = [p.removeprefix("unet.") for p in SDXL if p.startswith("unet.")]
    stem = f"lora_unet_{sgm_spelling(path.removeprefix('unet.'), 2, inner)}"
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"


def double_prefix(path: str) -> tuple[str, str, str]:
    return kohya(path, unet="lora_unet_unet_")


def kohya_one_text_encoder(path: str) -> tuple[str, str, str]:
    return kohya(path, text="lora_te_")


def bare(path: str) -> tuple[str, str, str]:
    return peft(path.partition(".")[2])


def comfy(path: str) -> tuple[str, str, str]:
    """Stability's names with dots, as ComfyUI and newer trainers write them."""
    if not path.startswith("unet."):
        return kohya(path)
    stem = "diffusion_model." + path.removeprefix("unet.").replace("mid_block.attentions.0", "middle_block.1")
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight", f"{stem}.alpha"


XL_PARTS = {
    **some(SDXL, "unet.down_blocks.1.attentions.0", "unet.mid_block", every=17),
    **some(SDXL, "unet.conv_in", "unet.down_blocks.0.resnets.1.conv1", "unet.add_embedding"),
    **some(SDXL, "text_encoder.text_model.encoder.layers.3", "text_encoder_2.text_model.encoder.layers.31"),
}
SD_PARTS = {
    **some(SD15, "unet.down_blocks.1", "unet.up_blocks.3", every=7),
    **some(SD15, "text_encoder.text_model.encoder.layers.3"),
}
XL_ATTENTION = attention(some(SDXL, "unet.up_blocks.0.attentions.2"))
SD_ATTENTION = attention(SD15)


@pytest.mark.parametrize(
    ("family", "shapes", "spelling"),
    [
        ("sd15", SD_PARTS, peft),
        ("sd15", SD_PARTS, old_diffusers),
        ("sd15", SD_PARTS, linear_layer),
        ("sd15", SD_PARTS, default_peft),
        ("sd15", SD_PARTS, kohya_one_text_encoder),
        ("sd15", SD_ATTENTION, processor),
        ("sd15", SD_ATTENTION, bare),
        ("sd15", SD_ATTENTION, wrapped_peft),
        ("sdxl", XL_PARTS, peft),
        ("sdxl", XL_PARTS, old_diffusers),
        ("sdxl", XL_PARTS, kohya),
        ("sdxl", XL_PARTS, sgm),
        ("sdxl", XL_PARTS, double_prefix),
        ("sdxl", XL_ATTENTION, wrapped_peft),
        ("sdxl", XL_ATTENTION, bare),
        ("sdxl", attention(some(SDXL, "unet.mid_block.attentions.0"), ends=["to_q"]), comfy),
        ("sd15", SD_PARTS, lycoris),
    ],
)
def test_every_spelling_of_plain_lora_is_matched_whole(
    tmp_path: Path, family: str, shapes: dict[str, tuple[int, ...]], spelling: Spelling
) -> None:
    report = look(tmp_path, lora(shapes, spelling, rank=1))
    assert (report.refusal, report.unmatched, report.misfits) == ("", (), ())
    assert (report.family, report.matched, report.modules) == (family, len(shapes), len(shapes))


def test_a_whole_kohya_sdxl_file_matches_722_of_722(tmp_path: Path) -> None:
    shapes = {p: s for p, s in SDXL.items() if p.startswith("unet.") and ".attentions." in p}
    small: Arrays = {}
    for path, shape in shapes.items():
        down, up, _ = sgm(path)
        small[down], small[up] = np.ones((1, *shape[1:]), np.float16), np.ones((shape[0], 1), np.float16)
    report = look(tmp_path, small)
    assert (report.matched, report.modules, report.family, report.confidence) == (722, 722, "sdxl", "certain")


def test_mixed_ranks_and_alphas_are_reported(tmp_path: Path) -> None:
    shapes = some(SD15, "unet.down_blocks.1.attentions.0")
    report = look(tmp_path, lora(shapes, kohya_one_text_encoder, rank=lambda n: 4 if n % 3 else 2, alpha=1.5))
    assert report.rank == 4
    assert set(report.ranks) == {2, 4}
    assert sum(report.ranks.values()) == report.modules
    assert report.alpha == (1.5, 1.5)


def test_convolutions_make_a_locon(tmp_path: Path) -> None:
    assert look(tmp_path, lora(some(SD15, "unet.down_blocks.0.resnets"), kohya)).algorithm == "locon"
    assert look(tmp_path, lora(SD_ATTENTION, peft)).algorithm == "lora"


B_LORA = attention({p: s for p, s in SDXL.items() if p.startswith((UP_BLOCK + ".0", UP_BLOCK + ".1"))})


@pytest.mark.parametrize(
    ("blocks", "role", "halves"),
    [((".0.",), "content", ("content",)), ((".1.",), "style", ("style",)),
     ((".0.", ".1."), "concept", ("content", "style"))],
)  # fmt: skip
@pytest.mark.parametrize("spelling", [old_diffusers, sgm, peft])
def test_b_lora_halves_are_known_by_their_blocks(
    tmp_path: Path, blocks: tuple[str, ...], role: str, halves: tuple[str, ...], spelling: Spelling
) -> None:
    shapes = {p: s for p, s in B_LORA.items() if p.startswith(tuple(UP_BLOCK + b for b in blocks))}
    report = look(tmp_path, lora(shapes, spelling, rank=1))
    assert (report.modules, report.role, report.halves) == (80 * len(blocks), role, halves)


def test_a_lora_of_more_blocks_is_no_b_lora(tmp_path: Path) -> None:
    shapes = {**B_LORA, **attention(some(SDXL, UP_BLOCK + ".2"))}
    report = look(tmp_path, lora(shapes, peft, rank=1))
    assert (report.role, report.halves) == ("concept", ())


PLAIN = {"unet.conv_in.lora_A.weight": np.zeros((1, 4, 3, 3), np.float32)}
DOWN, UP = ".lora_down.weight", ".lora_up.weight"
TO_Q = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
DOTTED = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
FLUX = "lora_unet_double_blocks_0_img_attn_qkv"
REFUSED: list[tuple[str, str, list[str]]] = [
    ("oft", "OFT", [TO_Q + ".oft_blocks", TO_Q + ".rescale"]),
    ("boft", "BOFT", [DOTTED + ".boft_R", DOTTED + ".boft_s"]),
    ("glora", "GLoRA", [TO_Q + ".a1.weight", TO_Q + ".a2.weight", TO_Q + ".b1.weight", TO_Q + ".b2.weight"]),
    ("textual-inversion", "textual inversion", ["emb_params"]),
    ("textual-inversion", "textual inversion", ["clip_l", "clip_g"]),
    ("textual-inversion", "textual inversion", ["<s1>"]),
    ("pivotal", "bundled embeddings", [TO_Q + DOWN, TO_Q + UP, "bundle_emb.cat.clip_l"]),
    ("control-lora", "control-LoRA", ["lora_controlnet", "input_blocks.0.0.weight"]),
    ("lora", "control adapter", ["double_blocks.0.img_attn.norm.query_norm.scale",
                                 "double_blocks.0.img_attn.qkv.lora_A.weight"]),
    ("lora", "Qwen-Image", ["transformer.transformer_blocks.0.img_mlp.net.2.lora_A.weight",
                            "transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight"]),
    ("lora", "Z-Image", ["diffusion_model.layers.0.attention.to_q.lora_A.weight"]),
    ("lora", "Z-Image", ["lora_unet_layers_0_feed_forward_w1" + DOWN]),
    ("lora", "HunyuanVideo", ["diffusion_model.double_blocks.19.img_attn_qkv.lora_A.weight"]),
    ("lora", "Chroma", ["lora_unet_distilled_guidance_layer_in_proj" + DOWN, FLUX + DOWN]),
    ("lora", "not known here", ["transformer.something.0.lora_A.weight"]),
    ("lora", "language model", ["base_model.model.distilbert.transformer.layer.0.attention.q_lin.lora_A.weight"]),
    ("lora", "language model", ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]),
    ("checkpoint", "whole model", ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.x.weight"]),
    ("unet", "whole UNet", ["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("algorithm", "title", "names"), REFUSED, ids=[f"{t}-{i}" for i, (_, t, _) in enumerate(REFUSED)]
)
def test_what_is_no_plain_lora_of_sd_is_refused_by_name(
    tmp_path: Path, algorithm: str, title: str, names: list[str]
) -> None:
    report = look(tmp_path, dict.fromkeys(names, A))
    assert title in report.refusal
    assert report.algorithm == algorithm
    assert report.hint
    with pytest.raises(AdapterError, match=r"file\.safetensors"):
        report.require_usable()


@pytest.mark.parametrize(
    ("tensors", "word"),
    [
        ({}, "no tensors"),
        ({"something": A, "else": A}, "no adapter layers that are known"),
        ({"lora_unet_nowhere" + DOWN: A, "lora_unet_nowhere" + UP: A.T.copy()}, "0 of 1 layers are known"),
        ({TO_Q + DOWN: A}, "lack some of their tensors"),
        ({TO_Q + ".alpha": np.array(1, np.float32)}, "lack some of their tensors"),
    ],
)
def test_files_without_usable_layers_are_refused(tmp_path: Path, tensors: Arrays, word: str) -> None:
    assert word in look(tmp_path, tensors).refusal


def test_stable_diffusion_2_is_refused_by_its_width(tmp_path: Path) -> None:
    tensors = lora(attention(some(SD15, "unet.down_blocks.0")), peft)
    for name in tensors:
        if "attn2.to_k.lora_A" in name or "attn2.to_v.lora_A" in name:
            tensors[name] = np.ones((2, 1024), np.float32)
    assert "Stable Diffusion 2" in look(tmp_path, tensors).refusal


def test_one_unknown_tensor_among_good_ones_is_not_ignored(tmp_path: Path) -> None:
    tensors = lora(SD_PARTS, peft) | {"unet.conv_in.something": A}
    assert "unet.conv_in.something" in look(tmp_path, tensors).refusal


def test_the_same_layer_in_two_spellings_is_refused(tmp_path: Path) -> None:
    shapes = some(SDXL, "unet.mid_block.attentions.0.proj_in")
    with pytest.raises(AdapterError, match="twice"):
        look(tmp_path, lora(shapes, kohya) | lora(shapes, sgm))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_refused_with_their_place(tmp_path: Path, value: float) -> None:
    tensors = lora(SD_PARTS, kohya)
    name = next(name for name in tensors if name.endswith("lora_up.weight"))
    tensors[name][0, 0] = value
    assert name in look(tmp_path, tensors).refusal


def test_an_adapter_that_does_nothing_is_taken_with_a_warning(tmp_path: Path) -> None:
    tensors = {name: value * ("lora_B" not in name) for name, value in lora(SD_PARTS, peft).items()}
    report = look(tmp_path, tensors)
    assert report.refusal == ""
    assert any("does nothing" in warning for warning in report.warnings)
    assert not any("does nothing" in warning for warning in look(tmp_path, lora(SD_PARTS, peft)).warnings)


def small_sdxl() -> dict[str, tuple[int, ...]]:
    """SDXL's names with a tenth of its widths, as Mini."""
    return {path: tuple(size if size < 32 else size // 10 for size in shape) for path, shape in SDXL.items()}


def test_an_adapter_of_a_small_model_fits_it_and_not_the_large_one(tmp_path: Path) -> None:
    small = attention({p: s for p, s in small_sdxl().items() if p.startswith(UP_BLOCK + ".0")})
    tensors, texts = lora(small, peft), {"intarsia.base": "mini"}
    fits = look(tmp_path, tensors, texts, shapes=small_sdxl())
    assert (fits.refusal, fits.family, fits.matched, fits.role) == ("", "sdxl", 80, "content")
    large = look(tmp_path, tensors, texts, shapes=SDXL)
    assert "fits 0 of 80 modules of this model" in large.refusal
    assert "down expected (r, 1280) but has (r, 128)" in large.refusal
    assert "mini" in large.hint
    alone = look(tmp_path, tensors, texts)
    assert (alone.family, alone.refusal, alone.base) == ("sdxl", "", "mini")
    assert any("Made for mini" in warning for warning in alone.warnings)


def test_an_adapter_of_mini_is_known_without_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model_index.json").touch()
    monkeypatch.setattr(identify, "mini_folder", lambda: tmp_path)
    index = ModuleIndex(small_sdxl() | {"unet.down_blocks.0.attentions.0.proj_in": (32, 32)})  # SDXL has none there

    def yardstick(name: str) -> ModuleIndex:
        return index if name == "mini" else reference(name)

    monkeypatch.setattr(identify, "yardstick", yardstick)
    shapes = {**attention(small_sdxl()), "unet.down_blocks.0.attentions.0.proj_in": (32, 32)}
    report = look(tmp_path, lora(shapes, kohya, rank=1))
    assert (report.family, report.base, report.confidence, report.refusal) == ("sdxl", "mini", "certain", "")
    assert (report.matched, report.warnings) == (len(shapes), ())
    real = look(tmp_path, lora(XL_PARTS, peft, rank=1))
    assert (real.family, real.base, real.yardstick) == ("sdxl", "", "sdxl")


@pytest.mark.parametrize(("shapes", "spelling", "other"), [(XL_PARTS, peft, SD15), (SD_ATTENTION, peft, SDXL)])
def test_an_adapter_of_the_other_family_is_refused_with_counts(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], spelling: Spelling, other: dict[str, tuple[int, ...]]
) -> None:
    report = look(tmp_path, lora(shapes, spelling, rank=1), shapes=other)
    assert f"of {len(shapes)} modules" in report.refusal
    assert report.matched < report.modules
    assert report.refusal.count(";") >= 2  # the first three are named


def test_one_wrong_width_is_enough_to_refuse(tmp_path: Path) -> None:
    tensors = lora(SD_PARTS, peft)
    name = next(iter(tensors))
    tensors[name] = np.ones((2, *[7] * (tensors[name].ndim - 1)), np.float32)
    report = look(tmp_path, tensors, shapes=SD15)
    assert (report.matched, report.modules) == (len(SD_PARTS) - 1, len(SD_PARTS))
    assert name.removesuffix(".lora_A.weight") in report.refusal


def test_ranks_of_down_and_up_must_agree(tmp_path: Path) -> None:
    tensors = lora(some(SD15, "unet.time_embedding.linear_1"), peft)
    tensors["unet.time_embedding.linear_1.lora_B.weight"] = np.ones((1280, 3), np.float32)
    assert "up has rank 3" in look(tmp_path, tensors, shapes=SD15).refusal


def test_text_encoder_with_only_q_proj_works(tmp_path: Path) -> None:
    shapes = attention(SD15, "text_encoder", ["q_proj"])
    report = look(tmp_path, lora(shapes, kohya_one_text_encoder), {"ss_base_model_version": "sd_v1"})
    assert (report.family, report.matched, report.refusal) == ("sd15", 12, "")


def test_metadata_is_believed_only_where_shapes_leave_it_open(tmp_path: Path) -> None:
    shared = attention(SDXL, "text_encoder", ["q_proj"])  # CLIP-L is in both families
    assert look(tmp_path, lora(shared, peft), {"ss_base_model_version": "sdxl_base_v1-0"}).family == "sdxl"
    lying = look(tmp_path, lora(SD_PARTS, peft), {"ss_base_model_version": "sdxl_base_v1-0"})
    assert lying.family == "sd15"
    assert any("claims to be for sdxl" in warning for warning in lying.warnings)


def test_the_file_name_says_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "flux_sdxl_style.safetensors", lora(SD_PARTS, peft))
    assert inspect(path).family == "sd15"


@pytest.mark.parametrize(
    ("metadata", "trigger"),
    [
        ({"ss_tag_frequency": json.dumps({"10_cat": {"cat": 3, "sks cat": 9}, "x": {"cat": 1}})}, "sks cat"),
        ({"modelspec.trigger_phrase": "a [v]", "ss_tag_frequency": json.dumps({"a": {"b": 9}})}, "a [v]"),
        ({"intarsia.trigger": "A [c]", "modelspec.trigger_phrase": "other"}, "A [c]"),
        ({"ss_tag_frequency": "not json"}, ""),
        ({"ss_tag_frequency": "[1]"}, ""),
        ({"ss_tag_frequency": '{"a": {"b": "many"}}'}, ""),
        ({"intarsia.trigger": "x\x1b[31m\n<b>"}, "x[31m<b>"),
    ],
)
def test_trigger_words(tmp_path: Path, metadata: dict[str, str], trigger: str) -> None:
    assert look(tmp_path, lora(SD_ATTENTION, peft, rank=1), metadata).trigger == trigger


def test_the_report_is_json_with_the_promised_fields(tmp_path: Path) -> None:
    values = json.loads(json.dumps(look(tmp_path, lora(SD_PARTS, peft)).as_dict()))
    promised = {"family", "algorithm", "rank", "modules", "matched", "trigger", "sha256", "unmatched", "base", "role"}
    assert promised <= set(values)
    done = subprocess.run(["sha256sum", tmp_path / "file.safetensors"], capture_output=True, text=True, check=True)
    assert values["sha256"] == done.stdout.split()[0]
