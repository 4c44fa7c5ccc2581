"""Loading: folders, single files, damage, and what stays in memory."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import Tiny
from fakes import clip_tokenizer as tiny_tokenizer
from fakes_single_file import single_file
from intarsia.pipelines import architectures, loading, models
from intarsia.pipelines.errors import InputError, MemoryLimitError, WeightsError
from intarsia.pipelines.models import Resident, choose_device, load
from intarsia.pipelines.sources import resolve
from safetensors.torch import load_file, save_file


def use_settings_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let single files be read as tiny ones: the shipped settings are those of the real size."""

    def config_folder(family: str) -> Path:
        return folder

    def tokenizer(pad: str) -> Any:  # noqa: ANN401
        return tiny_tokenizer()

    monkeypatch.setattr(loading, "config_folder", config_folder)
    monkeypatch.setattr(loading, "clip_tokenizer", tokenizer)


@pytest.mark.parametrize(("family", "layers"), [("sd15", 1), ("sdxl", 2)])
def test_a_single_file_gives_the_weights_of_its_folder(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, layers: int
) -> None:
    folder = tiny(family)
    path = single_file(folder, family, tmp_path / "one.safetensors", layers)
    use_settings_of(folder, monkeypatch)
    one, whole = load(resolve(str(path))), load(resolve(str(folder)))
    assert one.family == family
    for name, module in whole.modules.items():
        wanted, found = module.state_dict(), one.modules[name].state_dict()
        assert wanted.keys() == found.keys()
        assert all(torch.equal(found[key], value) for key, value in wanted.items()), name


def test_a_single_file_says_how_it_was_trained(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny("sdxl")
    path = single_file(folder, "sdxl", tmp_path / "one.safetensors", 2)
    save_file(load_file(path) | {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}, path)
    use_settings_of(folder, monkeypatch)
    config = load(resolve(str(path))).components["scheduler"].config
    assert (config.prediction_type, config.rescale_betas_zero_snr) == ("v_prediction", True)
    assert config.timestep_spacing == "trailing"


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_shipped_settings_build_the_real_family(family: str) -> None:
    config = json.loads((loading.config_folder(family) / "unet" / "config.json").read_text())
    with torch.device("meta"):
        unet = loading.D.UNet2DConditionModel.from_config(config)
    shapes = {f"unet.{name}": tuple(weight.shape) for name, weight in unet.named_parameters()}
    wanted = architectures.reference(family).shapes
    found = architectures.ModuleIndex({k: v for k, v in shapes.items() if k.endswith(".weight")}).shapes
    assert found == {name: shape for name, shape in wanted.items() if name.startswith("unet.")}


def test_the_shipped_vocabulary_gives_the_published_numbers() -> None:
    tokenizer = loading.clip_tokenizer("!")
    assert len(tokenizer) == 49408
    numbers = tokenizer("a photo of a cat", padding="max_length", max_length=9).input_ids
    assert numbers == [49406, 320, 1125, 539, 320, 2368, 49407, 0, 0]


def test_the_same_model_is_loaded_once_and_another_frees_it(tiny: Tiny) -> None:
    resident = Resident()
    first = resident.get(str(tiny("sd15")))
    assert resident.get(str(tiny("sd15"))) is first
    kept = weakref.ref(first.denoiser)
    second = resident.get(str(tiny("sdxl")))
    assert not first.components
    assert kept() is None, "the first model's weights are still held"
    assert second.denoiser.dtype == torch.float32
    assert not any(weight.requires_grad for module in second.modules.values() for weight in module.parameters())


def test_a_model_that_changed_on_disk_is_loaded_again(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("sd15"), tmp_path / "copy")
    resident = Resident()
    first = resident.get(str(folder))
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(tiny("sd15", seed=1) / "vae" / weights.name, weights)
    assert resident.get(str(folder)) is not first


def test_a_denoiser_with_missing_tensors_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("sd15"), tmp_path / "copy")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["conv_in.weight"]
    save_file(tensors, path)
    with pytest.raises(WeightsError, match="conv_in"):
        load(resolve(str(folder)))


def test_wrong_shapes_are_a_sentence_not_a_traceback(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("sd15"), tmp_path / "copy")
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"block_out_channels": [8, 16, 32, 32]}))
    with pytest.raises(WeightsError, match="cannot be loaded"):
        load(resolve(str(folder)))


def test_sd3_without_its_t5_loads(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("sd3"), tmp_path / "copy")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / "text_encoder_3")
    shutil.rmtree(folder / "tokenizer_3")
    assert set(load(resolve(str(folder))).text_encoders) == {"text_encoder", "text_encoder_2"}


def test_an_unknown_device_is_refused_with_those_there_are() -> None:
    assert choose_device("cpu") == "cpu"
    with pytest.raises(InputError, match="no device warp:3") as caught:
        choose_device("warp:3")
    assert "cpu" in caught.value.hint


def test_a_model_larger_than_memory_is_refused_before_loading(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        available = 1000

    def memory() -> Any:  # noqa: ANN401
        return Full

    monkeypatch.setattr(models.psutil, "virtual_memory", memory)
    with pytest.raises(MemoryLimitError, match="needs about"):
        load(resolve(str(tiny("sd15"))))
