"""Sample pictures during training: one prompt, one seed, so that the pictures differ by what was learned alone."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..pipelines.events import Artifact, CancelToken, Event, Stage
from .recipe import Drawing

if TYPE_CHECKING:
    from ..pipelines.models import Model


@dataclass(frozen=True)
class Sampler:
    """Draws the sample picture.

    Args:
        prompt: What to draw.
        seed: The same for every picture of the run.
        every: Steps between samples; 0 is never.
        last: Steps of the run; the finished adapter is always shown.
        folder: Where the pictures go.
        drawing: How they are drawn.
    """

    prompt: str
    seed: int
    every: int
    last: int
    folder: Path
    drawing: Drawing

    def due(self, step: int) -> bool:
        return bool(self.every) and (step % self.every == 0 or step == self.last)

    def draw(self, model: Model, step: int, token: CancelToken) -> Iterator[Event]:
        """Draw and save the picture after `step` steps; step 0 is the model as it was.

        Yields:
            The stage, then the picture as an artifact of kind "sample".

        Raises:
            Cancelled: A stop was asked for.
        """
        from ..pipelines.batch import render_many

        yield Stage(name="sample", detail=self.prompt)
        how = self.drawing
        with set_aside(model, there=True):
            (image,) = render_many(
                model, [self.prompt], [self.seed], steps=how.steps, guidance=how.guidance, scheduler=how.scheduler,
                token=token,
            )  # fmt: skip
        path = self.folder / f"sample-{step:06d}.png"
        temporary = path.with_name(f".{path.name}")
        image.save(temporary, format="PNG")
        temporary.replace(path)
        yield Artifact(kind="sample", path=str(path), label=self.prompt, step=step)


@contextmanager
def set_aside(model: Model, there: bool = False) -> Generator[None]:
    """Keep autoencoder and text encoders off the accelerator for a while: training works on what they gave.

    Args:
        model: Changed for the time of the context; nothing happens on a CPU or with CPU offload.
        there: The other way round, for a sample picture within the time.
    """
    parts = (
        [] if model.device.type == "cpu" or model.offload else [*model.text_encoders.values(), model.components["vae"]]
    )
    away, home = (model.device, torch.device("cpu")) if there else (torch.device("cpu"), model.device)
    try:
        for part in parts:
            part.to(away)
        yield
    finally:
        for part in parts:
            part.to(home)
