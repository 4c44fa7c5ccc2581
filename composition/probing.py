"""A short run of the model that shows where the words of a prompt go; the picture itself is begun anew afterwards."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..pipelines.attach import Branches
from ..pipelines.denoise import Work, denoise
from ..pipelines.errors import InputError
from ..pipelines.hooks import Step
from ..pipelines.step_ranges import StepRanges
from .attention import is_cross, layers, recorded
from .composition import Composition
from .joint_attention import joined, joint_layers
from .routing import joint_scores

FEWEST = 16  # cells on the longer side of the coarser maps of a UNet, or its finer ones are read


@dataclass(frozen=True)
class Sight:
    """What a probe has seen.

    Args:
        scores: Of each phrase for each image token, `(phrases, image)`.
        features: What the image tokens got from attention, `(image, channels)` for each layer that was read.
        grid: (height, width) of the image tokens.
    """

    scores: Tensor
    features: Sequence[Tensor]
    grid: tuple[int, int]


@dataclass(frozen=True)
class Probe:
    """How to look.

    Args:
        steps: Of the run; the last one is looked at.
        pixels: Of a cell of a UNet's maps: 16 or 32; 0 for 32 unless the maps get too coarse.
        block: Of a transformer's layers that join text and image; None for the last one of FLUX, the middle one of SD3.
        temperature: Of a transformer's scores.
    """

    steps: int
    pixels: int
    block: int | None
    temperature: float


class _Recorder(Protocol):
    on: bool


@dataclass
class _Outputs:
    """What self-attention layers gave, by path, for the sample that has the prompt."""

    on: bool = True
    kept: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass(frozen=True)
class _Last:
    """Turns recorders on for one step of a run."""

    index: int
    recorders: Sequence[_Recorder]

    def before(self, step: Step) -> Tensor:
        for recorder in self.recorders:
            recorder.on = step.index == self.index
        return step.latents

    def after(self, step: Step) -> Tensor:
        return step.latents


def probed(composition: Composition, hung: Branches, work: Work, probe: Probe, words: Sequence[Sequence[int]]) -> Sight:
    """Run some steps with the adapters that act at the moment, and look at the last.

    Args:
        composition: The picture.
        hung: Its adapters.
        work: Just begun; its latents stay as they are.
        probe: How to look.
        words: Positions of each phrase in the text.

    Raises:
        InputError: The model has no such attention.
        Cancelled: A stop was asked for.
    """
    look = _look_at_unet if composition.model.spec.denoiser == "unet" else _look_at_transformer
    return look(composition, hung, work, probe, words)


def _look_at_unet(
    composition: Composition, hung: Branches, work: Work, probe: Probe, words: Sequence[Sequence[int]]
) -> Sight:
    denoiser = composition.model.denoiser
    grid = level(composition.grid, probe.pixels)
    with recorded(denoiser, grid) as maps, _self_attention(denoiser, grid[0] * grid[1]) as outputs:
        _run(composition, hung, work, probe.steps, (maps, outputs))
    if not maps.cross:
        raise InputError(
            f"The model's attention has no cells of {probe.pixels or 'this many'} pixels.", "Choose other cells."
        )
    cross = maps.mean()[-1]  # (image, text) of the sample that has the prompt
    scores = torch.stack([cross[:, list(phrase)].mean(1) for phrase in words])
    return Sight(scores, tuple(outputs.kept.values()), grid)


def _look_at_transformer(
    composition: Composition, hung: Branches, work: Work, probe: Probe, words: Sequence[Sequence[int]]
) -> Sight:
    denoiser = composition.model.denoiser
    known = tuple(joint_layers(denoiser))
    usual = len(known) - 1 if composition.model.family == "flux1" else len(known) // 2
    block = usual if probe.block is None else probe.block
    if block >= len(known):
        raise InputError(
            f"There is no joint layer {block}: the model has {len(known)}.", f"Give 0 to {len(known) - 1}, or none."
        )
    path = known[block]
    with joined(denoiser, keep=(path,)) as seen:
        _run(composition, hung, work, probe.steps, (seen,))
    queries, keys = seen.queries[path][-1], seen.keys[path][-1]
    scores = torch.stack([joint_scores(queries, keys, phrase, probe.temperature) for phrase in words])
    return Sight(scores, (seen.outputs[path][-1],), composition.grid)


def level(grid: tuple[int, int], pixels: int) -> tuple[int, int]:
    """(height, width) of a UNet's attention whose cells are 16 or 32 pixels wide, by that of its latents."""
    halves = tuple(ceil(side / 2) for side in grid)
    quarters = tuple(ceil(side / 2) for side in halves)
    height, width = halves if pixels == 16 or (pixels == 0 and max(quarters) < FEWEST) else quarters
    return height, width


@contextmanager
def _self_attention(denoiser: nn.Module, tokens: int) -> Generator[_Outputs]:
    """Keep what the self-attention layers of so many tokens give."""
    outputs = _Outputs()

    def keeping(path: str) -> Any:  # noqa: ANN401 - torch's own hook type is a bare callable
        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if outputs.on and output.shape[1] == tokens:
                outputs.kept[path] = output[-1]

        return keep

    handles: list[RemovableHandle] = []
    try:
        for path, layer in layers(denoiser).items():
            if not is_cross(path):
                handles.append(layer.register_forward_hook(keeping(path)))
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _run(composition: Composition, hung: Branches, work: Work, steps: int, recorders: Sequence[_Recorder]) -> None:
    last = min(steps, len(work.timesteps)) - 1
    hooks = (_Last(last, recorders), StepRanges(hung, composition.attachments))
    with closing(denoise(work, composition.token, hooks)) as run:  # type: ignore[type-var]
        for stepped in run:
            if stepped.index == last:
                break
