"""A small model and small pictures for the tests of training."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from intarsia.pipelines.events import Artifact, CancelToken, Event
from intarsia.pipelines.models import Model
from intarsia.pipelines.models import load as load_model
from intarsia.pipelines.requests import TrainingPicture, TrainRequest
from intarsia.pipelines.sources import resolve
from intarsia.training import loop
from intarsia.training.encode import Cache, encode
from intarsia.training.layers import trainable
from intarsia.training.run import resolve as plan_run
from intarsia.training.run import train
from intarsia.training.schedule import NoiseSchedule
from PIL import Image, ImageDraw
from safetensors.torch import load_file

Tiny = Callable[..., Path]


def load(folder: Path) -> Model:
    """Load a tiny pipeline onto the CPU."""
    return load_model(resolve(str(folder)))


def picture(path: Path, size: tuple[int, int] = (64, 64), seed: int = 0) -> Path:
    """Draw a red disc on a coloured ground."""
    image = Image.new("RGB", size, (40 + 60 * seed % 200, 120, 200))
    ImageDraw.Draw(image).ellipse([size[0] // 5, size[1] // 5, size[0] * 4 // 5, size[1] * 4 // 5], fill=(200, 30, 30))
    image.save(path)
    return path


def request(recipe: str, pictures: list[Path], **options: Any) -> TrainRequest:  # noqa: ANN401
    """Ask for a short run without samples."""
    quick: dict[str, Any] = {"steps": 4, "sample_every": 0, "checkpoint_every": 0, "rank": 4}
    given = tuple(TrainingPicture(path=str(path), caption="a cat") for path in pictures)
    return TrainRequest(recipe=recipe, name="thing", pictures=given, seed=3, options=quick | options)


def run(asked: TrainRequest, model: Model, folder: Path, token: CancelToken | None = None) -> list[Event]:
    """Train to the end and give the events."""
    return list(train(asked, model, folder, token or CancelToken()))


def losses(events: list[Event]) -> list[float]:
    """Give the losses among events, in order."""
    return [event.value for event in events if event.type == "metric" and event.name == "loss"]


def snapshot(model: Model) -> dict[str, Any]:
    """Everything of a denoiser that training might leave behind: modules, tensors, flags, modes, attributes."""
    denoiser = model.denoiser
    return {
        "modules": {name: id(module) for name, module in denoiser.named_modules()},
        "state": {name: tensor.clone() for name, tensor in denoiser.state_dict().items()},
        "flags": {name: parameter.requires_grad for name, parameter in denoiser.named_parameters()},
        "gradients": {name: parameter.grad is None for name, parameter in denoiser.named_parameters()},
        "modes": {name: module.training for name, module in denoiser.named_modules()},
        "attributes": sorted(vars(denoiser)),
        "processors": {name: id(processor) for name, processor in denoiser.attn_processors.items()},
        "checkpointing": denoiser.is_gradient_checkpointing,
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Compare two snapshots, tensors bit for bit."""
    first, second = before.pop("state"), after.pop("state")
    assert before == after
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def adapters(events: list[Event]) -> dict[str, dict[str, torch.Tensor]]:
    return {e.label: load_file(e.path) for e in events if isinstance(e, Artifact) and e.kind == "adapter"}


def assert_equal(first: dict[str, dict[str, torch.Tensor]], second: dict[str, dict[str, torch.Tensor]]) -> None:
    assert first.keys() == second.keys() and first
    for label, tensors in first.items():
        assert tensors.keys() == second[label].keys()
        assert all(torch.equal(tensor, second[label][name]) for name, tensor in tensors.items())


@contextmanager
def trainer_for(asked: TrainRequest, model: Model) -> Generator[loop.Trainer]:
    """A trainer as `train` makes it."""
    plan = plan_run(asked, model, asked.pictures)
    work = encode(model, plan.pictures, plan.prompts, plan.settings, asked.seed, CancelToken())
    cache: Cache
    while True:
        try:
            next(work)
        except StopIteration as end:
            cache = end.value
            break
    schedule = NoiseSchedule.of(model.components["scheduler"], model.device)
    with trainable(model.denoiser, plan.settings.ranks, plan.settings.scale, asked.seed) as layers:
        yield loop.Trainer(
            model.denoiser, layers, loop.Task(plan.recipe, plan.options, plan.settings, cache, schedule, asked.seed)
        )


def held_out(trainer: loop.Trainer) -> float:
    """Loss at sixteen noises and timesteps that training does not meet."""
    total = 0.0
    with torch.no_grad():
        for number in range(10_000, 10_016):
            batch = trainer.batch(number, loop.generator(0, number))
            total += float((trainer.predict(batch) - batch.target).square().mean())
    return total / 16
