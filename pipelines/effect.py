"""How an adapter changes pictures, by spatial frequency: the same seeds with and without it, and what differs.

The radial profile of a Fourier transform follows CMLoRA (ICLR 2025), and so does the cut between low and high: a fifth
of the largest radius. Unlike there it is the difference that is measured, as power and not as its logarithm, so that
the bands add up to the mean square of the difference (Parseval).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .atomic import replacing
from .attach import Attachment, attached
from .events import Artifact, CancelToken, Event, Notice, Progress, Stage
from .hooks import Step, StepHook
from .image import picture_size, render
from .requests import MAX_SEED, EffectRequest
from .step_ranges import StepRanges

if TYPE_CHECKING:
    from PIL import Image

    from .models import Model

NYQUIST = 0.5  # cycles per pixel
CUT = 0.2 * NYQUIST * sqrt(2)  # cycles per pixel; the corners of the plane are the largest radius


@dataclass(frozen=True)
class Effect:
    """What was measured; powers are mean squares of pixel values from 0 to 1.

    Args:
        edges: Of the bands, in cycles per pixel, one more than bands.
        base: Power of the pictures without the adapter, by band; their mean colour, which would hide all else, is left
            out.
        change: Power of the difference, by band.
        low: Share of the difference's power below the cut; `base_low` that of `base`.
        cut: In cycles per pixel.
        pairs: Pictures without and with the adapter, and their seed.
    """

    edges: tuple[float, ...]
    base: tuple[float, ...]
    change: tuple[float, ...]
    low: float
    base_low: float
    cut: float
    pairs: tuple[tuple[str, str, int], ...]


def measure_effect(
    request: EffectRequest, model: Model, attachment: Attachment, folder: Path, token: CancelToken
) -> Iterator[Event]:
    """Draw with and without an adapter and compare.

    Args:
        request: With a seed; picture i uses seed + i.
        model: Loaded.
        attachment: The adapter, read.
        folder: Where the pictures and the figures go.
        token: Checked at every step.

    Yields:
        Progress by pictures, and at the end a report: an `Effect` as JSON.

    Raises:
        IntarsiaError: The adapter or the size does not fit the model.
        Cancelled: A stop was asked for.
    """
    seeds = [(request.seed + number) % (MAX_SEED + 1) for number in range(request.count)]
    size = picture_size(request.picture, model)
    drawn: dict[tuple[bool, int], Image.Image] = {}

    def draw(on: bool, hooks: tuple[StepHook, ...]) -> Iterator[Event]:
        for seed in seeds:
            token.check()
            drawn[on, seed] = render(
                model, request.prompt, request.negative, seed, request.steps, request.guidance, size,
                hooks=(*hooks, _Stop(token)),
            )[0]  # fmt: skip
            yield Progress(stage="effect", step=len(drawn), total=2 * len(seeds))

    yield Stage(name="effect", detail=f"{len(seeds)} pictures without {attachment.name}")
    yield from draw(False, ())
    yield Stage(name="effect", detail=f"{len(seeds)} pictures with {attachment.name}")
    with attached(model.components, [attachment]) as branches:
        yield Notice(text=f"{branches.matched[attachment.name]}.")
        yield from draw(True, (StepRanges(branches, [attachment]),))
    pairs: list[tuple[str, str, int]] = []
    for seed in seeds:
        paths = [folder / f"{name}-{seed}.png" for name in ("without", "with")]
        for path, on in zip(paths, (False, True), strict=True):
            drawn[on, seed].save(path)
        pairs.append((str(paths[0]), str(paths[1]), seed))
    without, with_it = (torch.stack([_values(drawn[on, seed]) for seed in seeds]) for on in (False, True))
    found = compare(without, with_it, request.bands, tuple(pairs))
    target = folder / "effect.json"
    with replacing(target) as temporary:
        temporary.write_text(json.dumps(asdict(found)), "utf-8")
    yield Artifact(kind="report", path=str(target), label=attachment.name)


def compare(without: Tensor, with_it: Tensor, bands: int, pairs: tuple[tuple[str, str, int], ...] = ()) -> Effect:
    """Measure the difference of two stacks of pictures.

    Args:
        without: `(pictures, channels, height, width)`, values from 0 to 1.
        with_it: The same pictures changed.
        bands: How many.
        pairs: Kept with the result.
    """
    difference = with_it - without
    around = without - without.mean((-2, -1), keepdim=True)
    return Effect(
        edges=tuple(float(edge) for edge in torch.linspace(0, NYQUIST, bands + 1)),
        base=tuple(power_by_band(around, bands).tolist()),
        change=tuple(power_by_band(difference, bands).tolist()),
        low=low_share(difference),
        base_low=low_share(around),
        cut=CUT,
        pairs=pairs,
    )


def power_by_band(pictures: Tensor, bands: int) -> Tensor:
    """Add the power of pictures up by spatial frequency.

    Bands are equally wide from 0 to the Nyquist frequency, half a cycle per pixel; the corners of the plane, which lie
    above it, count to the last one. The mean of a picture lies in the first.

    Args:
        pictures: `(pictures, channels, height, width)`.
        bands: How many.

    Returns:
        `(bands,)`; their sum is the mean square of all values.
    """
    power, radius = _spectrum(pictures)
    index = (radius / NYQUIST * bands).long().clamp(max=bands - 1)
    return torch.zeros(bands, dtype=torch.float64).index_add_(0, index.flatten(), power.flatten())


def low_share(pictures: Tensor) -> float:
    """Share of the power below the cut, the mean included; 0 for pictures that are black all over."""
    power, radius = _spectrum(pictures)
    total = float(power.sum())
    return float(power[radius < CUT].sum()) / total if total else 0.0


def _spectrum(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean power over pictures and channels, and the radial frequency in cycles per pixel, both `(height, width)`."""
    height, width = pictures.shape[-2:]
    transformed = torch.fft.fft2(pictures.double()) / (height * width)
    power = transformed.abs().square().flatten(0, -3).mean(0)
    rows, columns = torch.fft.fftfreq(height).double(), torch.fft.fftfreq(width).double()
    return power, (rows[:, None].square() + columns[None].square()).sqrt()


def _values(picture: Image.Image) -> Tensor:
    """A picture as `(3, height, width)`, values from 0 to 1."""
    import numpy as np

    return torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / 255).permute(2, 0, 1)


class _Stop:
    """A step hook that ends a picture when a stop was asked for."""

    def __init__(self, token: CancelToken) -> None:
        self._token = token

    def before(self, step: Step) -> Tensor:
        self._token.check()
        return step.latents

    def after(self, step: Step) -> Tensor:
        return step.latents
