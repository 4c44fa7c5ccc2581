"""Training runs from request to files: what they write, what they say, and what goes wrong."""

from __future__ import annotations

import base64
import errno
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from intarsia.pipelines.errors import InputError, IntarsiaError, MemoryLimitError
from intarsia.pipelines.events import Artifact
from intarsia.pipelines.headers import read_header
from intarsia.pipelines.identify import inspect
from intarsia.pipelines.requests import TrainingPicture
from intarsia.pipelines.sources import resolve, unet_shapes
from intarsia.training import checkpoint, loop
from intarsia.training.recipes.blora import BLora
from PIL import Image
from training_fakes import (
    Tiny,
    adapters,
    assert_equal,
    held_out,
    load,
    picture,
    request,
    run,
    trainer_for,
)

# Targets and weights


@pytest.mark.parametrize(("recipe", "more"), [("lora", {"alpha": 2.0}), ("blora", {})])
def test_the_files_give_plain_diffusers_the_trained_network(
    recipe: str, more: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    model = load(tiny("sdxl"))
    asked = request(recipe, [picture(tmp_path / "a.png")], steps=5, learning_rate=0.05, **more)
    made = [e for e in run(asked, model, tmp_path / "job") if isinstance(e, Artifact) and e.kind == "adapter"]
    with trainer_for(asked, model) as trainer:
        probe = trainer.batch(77, loop.generator(0, 77))
        before = trainer.predict(probe).detach()
        for number in range(5):
            trainer.step(number)
        with torch.no_grad():
            expected = trainer.predict(probe)
    pipeline: Any = DiffusionPipeline.from_pretrained(tiny("sdxl"))
    for event in made:
        pipeline.load_lora_weights(event.path, adapter_name=event.label)
    pipeline.set_adapters([event.label for event in made])
    with torch.no_grad():
        got = pipeline.unet(
            probe.noisy, probe.timesteps, probe.tokens, added_cond_kwargs=probe.added, return_dict=False
        )[0]
    assert torch.allclose(got, expected, atol=1e-5)
    assert float((expected - before).abs().max()) > 1e-2, "training changed nothing, the comparison is empty"


def test_the_halves_say_what_they_are(tiny: Tiny, tmp_path: Path) -> None:
    asked = request("blora", [picture(tmp_path / "a.png")], steps=1)
    made = [e for e in run(asked, load(tiny("sdxl")), tmp_path / "job") if isinstance(e, Artifact)]
    shapes = unet_shapes(resolve(str(tiny("sdxl"))))
    for event, role in zip(made, ("content", "style"), strict=True):
        report = inspect(Path(event.path), shapes)
        assert (event.label, report.role, report.family, report.rank) == (f"thing-{role}", role, "sdxl", 4)
        assert report.trigger == BLora().trigger("thing", BLora.options()) and report.base == tiny("sdxl").name
        assert report.modules == report.matched == 16
        assert str(tmp_path) not in str(dict(report.metadata))


def test_a_result_carries_its_licence_its_settings_and_its_last_sample(tiny: Tiny, tmp_path: Path) -> None:
    asked = request("lora", [picture(tmp_path / "a.png")], steps=2, sample_every=1, rank=3)
    asked = asked.model_copy(update={"licence": "CC-BY-4.0"})
    events = list(run(asked, load(tiny("sdxl")), tmp_path / "job"))
    made, samples = (
        [e for e in events if isinstance(e, Artifact) and e.kind == kind] for kind in ("adapter", "sample")
    )
    texts = read_header(Path(made[0].path)).metadata
    assert texts["modelspec.license"] == "CC-BY-4.0" and texts["modelspec.sai_model_spec"] == "1.0.1"
    assert json.loads(texts["intarsia.options"])["rank"] == 3
    kind, _, body = texts["modelspec.thumbnail"].partition(",")
    assert kind == "data:image/webp;base64"
    face = Image.open(io.BytesIO(base64.b64decode(body))).convert("RGB")
    last = Image.open(samples[-1].path).convert("RGB").resize(face.size)
    assert np.abs(np.asarray(face, float) - np.asarray(last, float)).mean() < 12


def test_missing_captions_and_small_buckets_are_said(tiny: Tiny, tmp_path: Path) -> None:
    paths = [picture(tmp_path / "a.png"), picture(tmp_path / "b.png"), picture(tmp_path / "c.png", (256, 64))]
    asked = request("lora", paths, steps=1, batch=2)
    asked = asked.model_copy(update={"pictures": tuple(p.model_copy(update={"caption": ""}) for p in asked.pictures)})
    said = [e.text for e in run(asked, load(tiny("sdxl")), tmp_path / "job") if e.type == "notice"]
    assert any(text.startswith("3 of 3 pictures have no caption") for text in said)
    assert any("1 of 2 sizes" in text and "batch of 2" in text for text in said)


def test_an_autoencoder_that_gives_no_numbers_is_named_with_the_picture(tiny: Tiny, tmp_path: Path) -> None:
    model = load(tiny("sdxl"))
    with torch.no_grad():
        next(model.components["vae"].encoder.parameters()).fill_(torch.nan)
    with pytest.raises(InputError, match=r"no numbers for .*a\.png"):
        run(request("blora", [picture(tmp_path / "a.png")]), model, tmp_path / "job")


def test_half_precision_trains_float32_factors(tiny: Tiny, tmp_path: Path) -> None:
    model = load(tiny("sdxl"))
    for part in (model.denoiser, *model.text_encoders.values()):
        part.to(torch.bfloat16)
    with trainer_for(request("blora", [picture(tmp_path / "a.png")], learning_rate=0.01), model) as trainer:
        first = held_out(trainer)
        for number in range(40):
            trainer.step(number)
        assert {parameter.dtype for parameter in trainer.parameters} == {torch.float32}
        assert held_out(trainer) < first
    assert model.denoiser.dtype == torch.bfloat16


# What goes wrong


def test_a_full_disk_keeps_the_last_checkpoint(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny("sdxl"))
    asked = request("blora", [picture(tmp_path / "a.png")], steps=5, checkpoint_every=1)
    write, seen = checkpoint.write, list[Path]()

    def full(path: Path, content: bytes) -> None:
        seen.append(path)
        if len(seen) > 7:  # three files each: the third checkpoint's second
            path.write_bytes(content[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.raises(MemoryLimitError, match="disk is full"):
        run(asked, model, tmp_path / "job")
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "job").step == 2
    whole = run(asked, model, tmp_path / "whole")
    rest = run(asked.model_copy(update={"resume_from": str(tmp_path / "job")}), model, tmp_path / "rest")
    assert_equal(adapters(whole), adapters(rest))


def test_a_loss_that_is_no_number_names_the_learning_rate(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(*given: Any, **more: Any) -> torch.Tensor:  # noqa: ANN401
        return given[1].mean() * torch.nan

    monkeypatch.setattr(BLora, "loss", diverged)
    asked = request("blora", [picture(tmp_path / "a.png")], learning_rate=0.25)
    with pytest.raises(InputError) as caught:
        run(asked, load(tiny("sdxl")), tmp_path / "job")
    assert "step 1" in caught.value.message and "0.25" in caught.value.hint


@pytest.mark.parametrize(
    ("error", "amount"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0"), "2.50 GiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."), "4096 bytes"),
    ],
)
def test_too_little_memory_says_what_to_lower(
    error: Exception, amount: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(self: object, number: int) -> float:
        raise error

    monkeypatch.setattr(loop.Trainer, "step", short)
    asked = request("lora", [picture(tmp_path / "a.png")], batch=2)
    with pytest.raises(MemoryLimitError) as caught:
        run(asked, load(tiny("sdxl")), tmp_path / "job")
    assert amount in caught.value.message
    assert "batch (2)" in caught.value.hint and "resolution (64)" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"recipe": "lorra"}, "no recipe 'lorra'"),
        ({"options": {"stepz": 3}}, "no setting called stepz"),
        ({"options": {"steps": 0}}, "Steps cannot be 0"),
        ({"pictures": ()}, "exactly one picture"),
        ({"pictures": (TrainingPicture(path="/nowhere/a.png"),)}, r"no file or folder /nowhere/a\.png"),
    ],
)
def test_bad_requests_are_refused_in_words(change: dict[str, Any], said: str, tiny: Tiny, tmp_path: Path) -> None:
    asked = request("blora", [picture(tmp_path / "a.png")]).model_copy(update=change)
    with pytest.raises(IntarsiaError, match=said):
        run(asked, load(tiny("sdxl")), tmp_path / "job")


def test_an_unreadable_picture_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(tmp_path / "b.png").read_bytes()[:90])
    with pytest.raises(InputError, match=r"a\.png"):
        run(request("blora", [tmp_path / "a.png"]), load(tiny("sdxl")), tmp_path / "job")
