"""Sample pictures during training: the base first, one seed throughout, and a stop that reaches into them."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from intarsia.pipelines.events import Artifact, Cancelled, CancelToken, Event
from intarsia.pipelines.image import render
from intarsia.training.run import train
from PIL import Image
from training_fakes import Tiny, assert_same, load, losses, picture, request, run, snapshot


def samples(events: list[Event]) -> dict[int, bytes]:
    made = {e.step: e.path for e in events if isinstance(e, Artifact) and e.kind == "sample"}
    return {step: Image.open(path).tobytes() for step, path in made.items()}


def test_samples_begin_with_the_base_and_follow_what_was_learned(tiny: Tiny, tmp_path: Path) -> None:
    model = load(tiny("sdxl"))
    asked = request(
        "blora", [picture(tmp_path / "a.png")], steps=5, sample_every=2, sample_prompt="a cat", learning_rate=0.05
    )
    base = render(model, "a cat", seed=asked.seed)[0].tobytes()
    shown = samples(run(asked, model, tmp_path / "job"))
    assert list(shown) == [0, 2, 4, 5]
    assert shown[0] == base
    far = numpy.frombuffer(shown[5], dtype=numpy.uint8).astype(int) - numpy.frombuffer(base, dtype=numpy.uint8)
    assert numpy.abs(far).max() > 2
    assert render(model, "a cat", seed=asked.seed)[0].tobytes() == base, "the layers are off again"


def test_samples_do_not_change_the_run(tiny: Tiny, tmp_path: Path) -> None:
    model = load(tiny("sdxl"))
    paths = [picture(tmp_path / "a.png")]
    with_samples = run(request("blora", paths, sample_every=2), model, tmp_path / "with")
    assert losses(with_samples) == losses(run(request("blora", paths), model, tmp_path / "without"))
    prompts = {e.label for e in with_samples if isinstance(e, Artifact) and e.kind == "sample"}
    assert len(prompts) == 1 and prompts.pop().startswith("A [v"), "the picture's own prompt is the default"


def test_a_stop_reaches_into_a_sample_and_keeps_the_steps(tiny: Tiny, tmp_path: Path) -> None:
    model = load(tiny("sdxl"))
    before = snapshot(model)
    token, seen = CancelToken(), list[Event]()
    asked = request("blora", [picture(tmp_path / "a.png")], steps=5, sample_every=3)
    with pytest.raises(Cancelled):
        for event in train(asked, model, tmp_path / "job", token):
            seen.append(event)
            if event.type == "stage" and event.name == "sample" and len(losses(seen)) == 3:
                token.cancel()
    last = seen[-1]
    assert isinstance(last, Artifact) and (last.kind, last.step) == ("checkpoint", 3)
    assert list(samples(seen)) == [0]
    assert_same(before, snapshot(model))
    assert not torch.is_inference_mode_enabled()
