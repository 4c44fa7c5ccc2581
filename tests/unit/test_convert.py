"""Files written in another spelling: there and back every byte is the same, and the peers read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft as peft_library
import pytest
import torch
from adapter_files import attention, kohya, lora, matrices, peft, write
from diffusers.loaders import lora_conversion_utils
from intarsia.app.studio import Studio
from intarsia.pipelines.adapter_file import read_adapter
from intarsia.pipelines.adapter_types import LowRank
from intarsia.pipelines.convert import Dialect, convert, kohya_name
from intarsia.pipelines.errors import AdapterError, InputError
from intarsia.pipelines.headers import read_header
from intarsia.pipelines.identify import inspect
from intarsia.pipelines.sources import resolve, unet_shapes
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

DIFFUSERS: Any = lora_conversion_utils
DIFFUSERS_PIPELINES: Any = diffusers
PEFT: Any = peft_library
Tiny = Callable[..., Path]
SD15 = attention({p: s for p, s in matrices("sd15").items() if ".down_blocks.1." in p or p.startswith("text")})
SDXL = attention({p: s for p, s in matrices("sdxl").items() if ".up_blocks.0.attentions.1" in p})
LAYER = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"  # of SD 1.5: 640 to 640


@pytest.mark.parametrize("shapes", [SD15, SDXL], ids=["sd15", "sdxl"])
def test_there_and_back_every_tensor_is_the_same(shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    first = write(tmp_path / "a.safetensors", lora(shapes, peft, alpha=1.5))
    first = convert(first, "diffusers", tmp_path / "b.safetensors").path  # alphas move into the header
    there = convert(first, "kohya", tmp_path / "c.safetensors")
    back = convert(there.path, "diffusers", tmp_path / "d.safetensors")
    assert there.lost == back.lost == () and there.layers == len(shapes)
    one, other = load_file(first), load_file(back.path)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert first.read_bytes() == back.path.read_bytes()
    layers = [read_adapter(path).layers for path in (first, there.path)]
    for name, layer in layers[0].items():
        twin: Any = layers[1][name]
        assert (layer.rank, layer.alpha) == (twin.rank, twin.alpha) == (2, 1.5)  # type: ignore[attr-defined]


def test_diffusers_finds_the_same_names_in_what_was_written_as_kohya(tmp_path: Path) -> None:
    source = write(tmp_path / "a.safetensors", lora(SD15, peft))
    made = convert(source, "kohya", tmp_path / "b.safetensors").path
    converted, _ = DIFFUSERS._convert_non_diffusers_lora_to_diffusers(load_file(made))
    suffixes = (".lora.down.weight", ".lora_linear_layer.down.weight", "_lora.down.weight", ".down.weight")
    found = {
        name.removesuffix(next(s for s in suffixes if name.endswith(s))) for name in converted if "down" in name[-12:]
    }
    wanted = {path.replace("to_out.0", "to_out") for path in SD15}
    assert {name.replace(".processor", "").replace("to_out.0", "to_out") for name in found} >= {
        path for path in wanted if path.startswith("unet.")
    }


def test_sdxl_is_spelled_with_stabilitys_block_names() -> None:
    path = "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"
    assert kohya_name(f"unet.{path}", "sdxl") == "lora_unet_output_blocks_1_1_transformer_blocks_0_attn1_to_q"
    assert kohya_name(f"unet.{path}", "sd15") == f"lora_unet_{path.replace('.', '_')}"
    assert kohya_name("text_encoder.text_model.a.b", "sd15") == "lora_te_text_model_a_b"
    assert kohya_name("text_encoder.text_model.a.b", "sdxl") == "lora_te1_text_model_a_b"


def test_dora_and_tucker_go_over(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    conv = "lora_unet_down_blocks_1_resnets_0_conv2"  # 640 to 640, 3 x 3
    tensors = {
        f"{LAYER}.lora_down.weight": torch.randn(2, 640, generator=rng),
        f"{LAYER}.lora_up.weight": torch.randn(640, 2, generator=rng),
        f"{LAYER}.dora_scale": torch.rand(640, 1, generator=rng) + 1,
        f"{conv}.lora_down.weight": torch.randn(2, 640, 1, 1, generator=rng),
        f"{conv}.lora_mid.weight": torch.randn(2, 2, 3, 3, generator=rng),
        f"{conv}.lora_up.weight": torch.randn(640, 2, 1, 1, generator=rng),
        f"{conv}.dora_scale": torch.rand(640, 1, 1, 1, generator=rng) + 1,
    }
    save_file(tensors, tmp_path / "a.safetensors")
    made = convert(tmp_path / "a.safetensors", "diffusers", tmp_path / "b.safetensors")
    assert len(made.lost) == 1 and "Tucker" in made.lost[0]
    one, other = (read_adapter(path).layers for path in (tmp_path / "a.safetensors", made.path))
    for name, layer in one.items():
        weight = torch.randn(matrices("sd15")[name], generator=rng)
        before, after = layer.change(weight).weight, other[name].change(weight).weight
        assert before is not None and after is not None and torch.allclose(before, after, atol=1e-4)
    back = convert(made.path, "kohya", tmp_path / "c.safetensors")
    again = load_file(back.path)
    for name in (LAYER, conv):
        assert torch.equal(again[f"{name}.dora_scale"], tensors[f"{name}.dora_scale"])
    magnitudes = {value.ndim: value.shape for name, value in load_file(made.path).items() if "magnitude" in name}
    assert magnitudes == {1: (640,), 4: (1, 640, 1, 1)}, "as PEFT keeps them"


def test_what_a_spelling_has_no_word_for_is_refused(tmp_path: Path) -> None:
    save_file(
        {f"{LAYER}.lokr_w1": torch.ones(2, 2), f"{LAYER}.lokr_w2": torch.ones(320, 320)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(AdapterError, match="LoKr, which diffusers does not read"):
        convert(tmp_path / "a.safetensors", "diffusers", tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()
    assert convert(tmp_path / "a.safetensors", "kohya", tmp_path / "c.safetensors").lost == ()
    assert inspect(tmp_path / "c.safetensors").algorithm == "lokr"


def test_the_authors_folders_stay_behind(tmp_path: Path) -> None:
    texts = {"ss_dataset_dirs": '{"/home/ann/cats": {}}', "ss_tag_frequency": '{"x": {"cat": 3}}'}
    source = write(tmp_path / "a.safetensors", lora(SD15, kohya), texts)
    made = read_header(convert(source, "kohya", tmp_path / "b.safetensors").path).metadata
    assert "ss_dataset_dirs" not in made and made["ss_tag_frequency"] == texts["ss_tag_frequency"]
    assert made["modelspec.sai_model_spec"] == "1.0.1"


def test_other_families_and_spellings_are_refused(tmp_path: Path) -> None:
    name = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.weight": np.ones((1, 3072), np.float32),
               f"{name}.lora_B.weight": np.ones((3072, 1), np.float32)}  # fmt: skip
    source = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(AdapterError, match="is for flux1"):
        convert(source, "kohya", tmp_path / "b.safetensors")
    with Studio() as studio, pytest.raises(InputError, match="no spelling 'x'"):
        studio.convert_adapter(str(source), "x", tmp_path / "b.safetensors")


def by_peft(module: nn.Module, folder: Path) -> dict[str, Tensor]:
    """What PEFT itself adds to every layer, from the folder."""
    model: Any = PEFT.PeftModel.from_pretrained(module, folder)
    found: dict[str, Tensor] = {}
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            base = layer.get_base_layer().weight.detach().clone()
            layer.merge()
            found[name] = layer.get_base_layer().weight.detach() - base
    return found


@pytest.mark.parametrize("dora", [False, True])
def test_peft_reads_its_folder_and_does_the_same(dora: bool, tiny: Tiny, tmp_path: Path) -> None:
    """Ranks and alphas that differ by layer, in the UNet and in both text encoders."""
    pipeline = DIFFUSERS_PIPELINES.StableDiffusionXLPipeline.from_pretrained(tiny("sdxl"))
    index = unet_shapes(resolve(str(tiny("sdxl"))))
    shapes = {name.removesuffix(".weight"): shape for name, shape in index.items()}
    chosen = dict(list(attention(shapes).items())[::5])
    for component in ("text_encoder", "text_encoder_2"):
        chosen |= dict(list(attention(shapes, component, ("q_proj", "fc1")).items())[:2])
    arrays = lora(chosen, kohya, rank=lambda number: 2 + number % 2, alpha=3.0)
    if dora:
        random = np.random.default_rng(0)
        for path, shape in chosen.items():
            name = kohya(path)[0].replace("lora_down.weight", "dora_scale")
            arrays[name] = (1 + random.random((shape[0], 1))).astype(np.float32)
    file = write(tmp_path / "a.safetensors", arrays)
    real = inspect(file, index)
    assert not real.refusal
    made = convert(file, "peft", tmp_path / "folder").path
    wanted = read_adapter(file, index).layers
    for component in ("unet", "text_encoder", "text_encoder_2"):
        module = getattr(pipeline, component)
        weights = {
            name: layer.weight.detach().clone() for name, layer in module.named_modules() if hasattr(layer, "weight")
        }
        found = by_peft(module, made / component)
        mine = {path: layer for path, layer in wanted.items() if path.startswith(f"{component}.")}
        assert len(found) == len(mine) > 0
        for path, layer in mine.items():
            name = next(name for name in found if path.endswith(name.removeprefix("text_model.")))
            change = layer.change(weights[name]).weight
            torch.testing.assert_close(found[name], change, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_a_transformers_adapter_is_written_under_diffusers_names(to: Dialect, tmp_path: Path) -> None:
    """Kohya's fused projections of FLUX.1 become three layers each, which do the same."""
    tensors: dict[str, Any] = {}
    random = np.random.default_rng(0)
    for stem, out, size in (
        ("lora_unet_double_blocks_0_img_attn_qkv", 9216, 3072),
        ("lora_unet_single_blocks_3_linear2", 3072, 15360),
    ):
        tensors[f"{stem}.lora_down.weight"] = random.standard_normal((4, size)).astype(np.float16)
        tensors[f"{stem}.lora_up.weight"] = random.standard_normal((out, 4)).astype(np.float16)
        tensors[f"{stem}.alpha"] = np.array(2.0, np.float32)
    file = write(tmp_path / "flux.safetensors", tensors)
    made = convert(file, to, tmp_path / "made.safetensors")
    assert made.layers == 4 and not made.lost
    whole = made.path if to == "diffusers" else made.path / "transformer" / "adapter_model.safetensors"
    if to == "peft":
        configuration = json.loads((whole.parent / "adapter_config.json").read_text())
        assert (configuration["r"], configuration["lora_alpha"]) == (4, 2)
        assert {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in load_file(whole)} == set(
            configuration["target_modules"]
        )
        return
    before, after = read_adapter(file).layers, read_adapter(whole).layers
    assert before.keys() == after.keys()
    for path, layer in before.items():
        twin: Any = after[path]
        assert isinstance(layer, LowRank)
        assert torch.equal(layer.down, twin.down) and torch.equal(layer.up, twin.up) and layer.alpha == twin.alpha
    with pytest.raises(AdapterError, match="kohya"):
        convert(file, "kohya", tmp_path / "x.safetensors")
