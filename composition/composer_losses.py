"""LoRA-Composer's mathematics (arXiv:2403.11627): losses of attention maps in places, and the latents' new start.

Maps are `(height, width)` on one grid; a place is the set of its cells, true or false.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor

import torch
from torch import Tensor
from torch.nn import functional as F

TOP = 0.2  # part of a place's cells whose mean is looked at


def bounds(place: Tensor) -> tuple[int, int, int, int]:
    """First and last (not included) row, first and last column of the cells of a place."""
    rows, columns = place.any(1).nonzero(), place.any(0).nonzero()
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def hill(place: Tensor) -> Tensor:
    """A Gaussian over the bounds of a place, which reach from -1 to 1; sigma 1, peak 1, 0 outside the place."""
    first, last, left, right = bounds(place)
    down, across = (_slope(cells, place) for cells in (last - first, right - left))
    found = torch.zeros(place.shape, device=place.device)
    found[first:last, left:right] = down[:, None] * across[None]
    return found / found.max() * place


def _slope(cells: int, like: Tensor) -> Tensor:
    at = torch.linspace(-1, 1, cells, device=like.device) if cells > 1 else torch.zeros(1, device=like.device)
    return torch.exp(-(at**2) / 2)


def smooth(maps: Tensor) -> Tensor:
    """Blur maps `(maps, height, width)` by a Gaussian of 3 x 3 cells, sigma 0.5; a map one cell wide stays."""
    if min(maps.shape[1:]) < 2:
        return maps
    side = torch.exp(-torch.tensor([1.0, 0.0, 1.0], device=maps.device) / (2 * 0.5**2))
    kernel = torch.outer(side, side) / side.sum() ** 2
    return F.conv2d(F.pad(maps[:, None], (1, 1, 1, 1), mode="reflect"), kernel[None, None])[:, 0]


def strongest(values: Tensor, place: Tensor) -> Tensor:
    """Mean of the k largest values, k = a fifth of the place's cells."""
    count = min(max(1, floor(TOP * int(place.sum()))), values.numel())
    return values.flatten().topk(count).values.mean()


def enhancement(word: Tensor, place: Tensor) -> Tensor:
    """max(0, 1 - the mean of the strongest of map * hill): a word must be attended to, and most in the middle."""
    return (1 - strongest(word * hill(place), place)).clamp(min=0)


def fill(word: Tensor, place: Tensor) -> Tensor:
    """How far the map's maxima of rows and of columns are from those of the place, averaged over each side."""
    within, target = word * place, place.float()
    return sum(((within.amax(axis) - target.amax(axis)).abs().mean() for axis in (1, 0)), torch.zeros(()).to(word))


def leak(own: Tensor, place: Tensor) -> Tensor:
    """Mean of the strongest self-attention from the place's cells to those outside.

    Args:
        own: `(cells, cells)`, from the first to the second.
        place: `(height, width)`.
    """
    inside = place.flatten()
    if bool(inside.all()):
        return own.sum() * 0
    return strongest(own[inside][:, ~inside], place)


def total(
    cross: Sequence[Tensor], own: Tensor, places: Sequence[Tensor], weights: tuple[float, float, float]
) -> Tensor:
    """The loss of a picture.

    Args:
        cross: Of each concept, the maps of its words `(words, height, width)`.
        own: Self-attention, `(cells, cells)`.
        places: Of each concept, `(height, width)`, true somewhere.
        weights: Of enhancement, fill and leak.
    """
    parts: list[Tensor] = []
    for words, place in zip(cross, places, strict=True):
        for word in smooth(words):
            parts += [weights[0] * enhancement(word, place), weights[1] * fill(word, place)]
        parts.append(weights[2] * leak(own, place))
    return torch.stack(parts).sum()


def restart(latents: Tensor, scores: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
    """Fill each place with the patch of the noise that its concept attends to most.

    Args:
        latents: `(1, channels, height, width)`.
        scores: Of each concept, its attention on a coarser grid `(rows, columns)`.
        places: Of each concept, `(height, width)`; the later of two lies on top.

    Returns:
        The shape of `latents`, with the mean and the standard deviation they had.
    """
    moved = latents.clone()
    for score, place in zip(scores, places, strict=True):
        first, last, left, right = bounds(place)
        row, column = best(score, (last - first, right - left), (latents.shape[2], latents.shape[3]))
        patch = latents[:, :, row : row + last - first, column : column + right - left]
        target = moved[:, :, first:last, left:right]
        target.copy_(torch.where(place[first:last, left:right], patch, target))
    return (moved - moved.mean()) / moved.std() * latents.std() + latents.mean()


def best(score: Tensor, patch: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Row and column where a patch of the latents begins that gathers most of a score.

    Args:
        score: `(rows, columns)` of a coarser grid.
        patch: (height, width) in cells of the latents.
        size: (height, width) of the latents.
    """
    down, across = score.shape[0] / size[0], score.shape[1] / size[1]
    window = max(1, round(patch[0] * down)), max(1, round(patch[1] * across))
    sums = F.avg_pool2d(score[None, None], window, stride=1)[0, 0]
    row, column = divmod(int(sums.argmax()), sums.shape[1])
    return min(round(row / down), size[0] - patch[0]), min(round(column / across), size[1] - patch[1])
