"""Where each concept stands, as masks of any resolution; pure functions on tensors `(concepts, height, width)`."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional as F

from ..pipelines.boxes import Box
from .composition import Concept


def covered(box: Box, size: tuple[int, int]) -> Tensor:
    """Share of each cell of a grid that a box covers.

    Args:
        box: Fractions of the canvas.
        size: (height, width) of the grid.

    Returns:
        `(height, width)` from 0 to 1; a box that covers a tenth of no cell has the cell of its centre.
    """
    left, top, right, bottom = box
    mask = _span(top, bottom, size[0])[:, None] * _span(left, right, size[1])[None]
    row, column = int((top + bottom) / 2 * size[0]), int((left + right) / 2 * size[1])
    if mask.max() < 0.1:  # it would vanish
        mask[min(row, size[0] - 1), min(column, size[1] - 1)] = 1
    return mask


def _span(first: float, last: float, cells: int) -> Tensor:
    edges = torch.arange(cells + 1, dtype=torch.float64)
    return (edges[1:].clamp(max=last * cells) - edges[:-1].clamp(min=first * cells)).clamp(0, 1).float()


def places(concepts: Sequence[Concept], size: tuple[int, int]) -> Tensor:
    """Each concept's own place on a grid, whoever lies above.

    Args:
        concepts: One without a place has none anywhere.
        size: (height, width) of the grid.

    Returns:
        `(concepts, height, width)` from 0 to 1.
    """
    made: list[Tensor] = []
    for concept in concepts:
        if concept.mask is not None:
            made.append(resized(concept.mask.float()[None], size)[0])
        elif concept.box is not None:
            made.append(covered(concept.box, size))
        else:
            made.append(torch.zeros(size))
    return torch.stack(made)


def seen(masks: Tensor, orders: Sequence[int]) -> Tensor:
    """What is left of each mask where higher ones lie on top of it; of equal orders the later is the higher one.

    Args:
        masks: `(concepts, height, width)`.
        orders: Of each.

    Returns:
        The same shape; the sum over the concepts is nowhere above 1.
    """
    left = torch.ones_like(masks[0])
    found = torch.zeros_like(masks)
    for index in sorted(range(len(masks)), key=lambda i: (orders[i], i), reverse=True):
        found[index] = masks[index] * left
        left = left * (1 - masks[index])
    return found


def resized(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Average masks over the cells of a coarser grid, or repeat their cells on a finer one."""
    if tuple(masks.shape[-2:]) == size:
        return masks
    return F.adaptive_avg_pool2d(masks[None], size)[0]


def grid_of(tokens: int, canvas: tuple[int, int]) -> tuple[int, int]:
    """The grid that a number of tokens makes: the canvas' own, halved until it has as many cells.

    Args:
        tokens: Of one layer.
        canvas: (height, width) of the latents, or of a transformer's tokens.

    Raises:
        ValueError: No halving has as many cells.
    """
    height, width = canvas
    while height * width > tokens:
        height, width = ceil(height / 2), ceil(width / 2)
    if height * width != tokens:
        raise ValueError(f"{tokens} tokens are no level of a canvas of {canvas[0]} x {canvas[1]} cells")
    return height, width


def soften(masks: Tensor, radius: float) -> Tensor:
    """Blur the edges of masks by a Gaussian; their sum stays what it is where it was even.

    Args:
        masks: `(concepts, height, width)`.
        radius: Standard deviation in cells; 0 changes nothing.
    """
    if radius <= 0:
        return masks
    reach = ceil(3 * radius)
    steps = torch.arange(-reach, reach + 1, dtype=masks.dtype, device=masks.device)
    kernel = torch.exp(-(steps**2) / (2 * radius**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(masks[:, None], (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))[:, 0]
