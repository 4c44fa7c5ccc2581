"""Finding models: what is recognized, and what each refusal says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fakes import Tiny
from intarsia.pipelines.errors import WeightsError
from intarsia.pipelines.sources import check_weights, native_size, resolve, unet_shapes
from safetensors.numpy import save_file


@pytest.mark.parametrize(("family", "size"), [("sd15", 64), ("sdxl", 64), ("sd3", 64), ("flux1", 1024)])
def test_a_folder_tells_its_family_and_its_own_size(tiny: Tiny, family: str, size: int) -> None:
    source = resolve(str(tiny(family)))
    assert (source.kind, source.family) == ("folder", family)
    assert native_size(source) == (size, size)
    check_weights(source)


def test_finding_a_model_does_not_import_torch(tiny: Tiny) -> None:
    code = "import sys; from intarsia.pipelines.sources import *; s = resolve(sys.argv[1]); unet_shapes(s);"
    code += "import intarsia.pipelines.picture; assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tiny("sdxl"))], check=True)


def test_shapes_name_every_layer_with_its_component(tiny: Tiny) -> None:
    shapes = unet_shapes(resolve(str(tiny("sdxl"))))
    assert shapes["unet.up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k"] == (32, 80)
    assert shapes["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"] == (32, 32)
    assert shapes["text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"] == (48, 48)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nope", "no model called"),
        ("/nope/model.safetensors", "no model at"),
        ("./nope", "no model at"),
        ("someone/something", "hub cannot be reached"),
    ],
)
def test_a_model_that_is_not_there_is_named(name: str, words: str) -> None:
    with pytest.raises(WeightsError, match=words) as caught:
        resolve(name)
    assert caught.value.hint


def test_folders_that_are_no_supported_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="not a diffusers model"):
        resolve(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(WeightsError, match="cannot be read"):
        resolve(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(WeightsError, match="KandinskyPipeline, which is not supported"):
        resolve(str(tmp_path))


def test_stable_diffusion_2_is_refused_by_name(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    shutil.copytree(tiny("sd15"), folder)
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"cross_attention_dim": 1024}))
    with pytest.raises(WeightsError, match="Stable Diffusion 2"):
        resolve(str(folder))


def test_missing_pickled_and_cut_weights_are_told_apart(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny("sd15"), folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-100])
    with pytest.raises(WeightsError, match="cut off"):
        check_weights(resolve(str(folder)))
    weights.unlink()
    with pytest.raises(WeightsError, match="holds no weights"):
        resolve(str(folder))
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"Only \.safetensors"):
        resolve(str(folder))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["cond_stage_model.model.ln_final.weight"], "Stable Diffusion 2"),
        (["double_blocks.0.img_attn.qkv.weight"], "FLUX in one file"),
        (["model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"], "Stable Diffusion 3"),
        (["lora_unet_x.lora_down.weight"], "is an adapter, not a model"),
        (["something.else"], "no checkpoint that is known"),
    ],
)
def test_single_files_of_other_kinds_are_refused_by_name(tmp_path: Path, names: list[str], words: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({name: np.zeros(2, np.float32) for name in names}, path)
    with pytest.raises(WeightsError, match=words):
        resolve(str(path))


def test_a_model_in_the_hub_cache_is_found_without_a_network(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "models--some--one"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("abc")
    shutil.copytree(tiny("sdxl"), root / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    source = resolve("some/one")
    assert (source.kind, source.family, source.path) == ("hub", "sdxl", root / "snapshots" / "abc")
