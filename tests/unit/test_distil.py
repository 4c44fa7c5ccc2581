"""Mini's distillation on drawn scenes: a run that is cut and resumed, and the file it writes."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from adapter_files import low_rank
from intarsia.pipelines.adapter_file import read_adapter
from intarsia.pipelines.attach import Attachment, attached
from intarsia.pipelines.errors import InputError
from intarsia.pipelines.sources import resolve, unet_shapes
from intarsia.training import distil
from intarsia.training.base import LatentPool
from intarsia.training.corpus import Captioned
from intarsia.training.layers import plain_attention, trainable
from PIL import Image
from training_fakes import Tiny, load

SMALL = ["--batch", "2", "--pool", "4", "--refresh", "2", "--rank", "4", "--learning-rate", "0.02", "--seed", "3"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Four captioned pictures, each a coloured square."""
    rows: list[Captioned] = []
    for index, colour in enumerate(("red", "lime", "blue", "black")):
        Image.new("RGBA", (32, 32), colour).save(tmp_path / f"{index}.png")
        rows.append(Captioned(f"{index}.png", f"{colour} square", "flat", (), "objects", f"x{index}", "train"))
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    return tmp_path


def arguments(corpus: Path, model: Path, out: Path, *more: str) -> list[str]:
    return ["--data", str(corpus), "--model", str(model), "--out", str(out), "--device", "cpu", *SMALL, *more]


def test_a_run_that_is_cut_goes_on_exactly_and_the_file_fits_the_model(
    corpus: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("sdxl", variant="vpred")
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut" / "cut.safetensors"
    title = ("--steps", "5", "--title", "fast")
    distil.main(arguments(corpus, model, whole, *title))
    step = distil.Distiller.step

    def interrupted(self: distil.Distiller, number: int, pool: LatentPool) -> float:
        if number == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(self, number, pool)

    monkeypatch.setattr(distil.Distiller, "step", interrupted)
    distil.main(arguments(corpus, model, cut, *title))
    assert read_adapter(cut).metadata["intarsia.steps"] == "3"
    monkeypatch.undo()
    distil.main(arguments(corpus, model, cut, *title))
    assert cut.read_bytes() == whole.read_bytes()
    with pytest.raises(InputError, match="differ: wish"):
        distil.main(arguments(corpus, model, cut, *title, "--guidance", "7"))

    adapter = read_adapter(whole, unet_shapes(resolve(str(model))))
    assert adapter.family == "sdxl" and adapter.metadata["intarsia.recipe"] == "lcm"
    assert json.loads(adapter.metadata["intarsia.drawing"]) == {"steps": 4, "guidance": 1.0, "scheduler": "lcm"}
    assert any(layer.down.shape[2:] == (3, 3) and layer.up.any() for layer in low_rank(adapter).values())
    with attached(load(model).components, [Attachment("fast", adapter)]):
        pass


def test_mini_without_a_caption_is_asked_with_zeros_and_without_the_layers_it_is_itself(tiny: Tiny) -> None:
    parts, _ = distil.load_mini(tiny("sdxl", variant="vpred"), torch.device("cpu"))
    states = torch.randn(2, 40, parts.unet.config["cross_attention_dim"])
    pooled = torch.randn(2, parts.text_encoder_2.config.projection_dim)
    noisy, timesteps, sizes = torch.randn(2, 8, 8, 8), torch.tensor([999, 19]), torch.ones(2, 6)

    def plain(states: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        return parts.unet(noisy, timesteps, states, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes})[0]

    with torch.no_grad(), plain_attention(parts.unet):  # as it is computed while layers learn
        own, silent = plain(states, pooled), plain(states * 0, pooled * 0)
    with trainable(parts.unet, {"conv_in": 2, "mid_block.resnets.0.conv1": 4}, 1.0, 0) as layers, torch.no_grad():
        for parameter in layers.parameters.values():
            parameter.fill_(0.1)
        network = distil.Network(parts.unet, layers, states, pooled, sizes, half=False)
        assert torch.equal(network(noisy, timesteps, taught=False), own)
        assert torch.equal(network(noisy, timesteps, taught=False, captions=False), silent)
        assert not torch.allclose(network(noisy, timesteps), own)
