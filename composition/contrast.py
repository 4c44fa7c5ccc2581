"""CLoRA's mathematics (arXiv:2403.19776): the contrast between concepts' maps, and the masks cut from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Change = Literal["none", "dilate", "erode", "open", "close"]
EPS = 1e-12


def spread_out(maps: Tensor) -> Tensor:
    """Bring each map to the range 0 to 1; one that is the same everywhere becomes 0, without a gradient.

    Args:
        maps: `(maps, cells)`.
    """
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    flat = high - low <= EPS
    return torch.where(flat, 0.0, (maps - low) / torch.where(flat, 1.0, high - low))


def contrast(embeddings: Tensor, labels: Sequence[int], temperature: float) -> Tensor:
    """NT-Xent: the mean over ordered pairs of one label of -log(e^(c/t) / (e^(c/t) + sum over others of e^(c'/t))).

    c is the cosine of the pair, c' those of its first entry with every entry of another label.

    Args:
        embeddings: `(entries, cells)`; one that is 0 everywhere is at right angles to all.
        labels: The concept of each.
        temperature: t.
    """
    lengths = embeddings.norm(dim=1, keepdim=True)
    unit = embeddings / torch.where(lengths <= EPS, 1.0, lengths)
    cosines = unit @ unit.T / temperature
    label = torch.tensor(labels, device=embeddings.device)
    same = label[:, None] == label[None]
    pairs = same & ~torch.eye(len(labels), dtype=torch.bool, device=label.device)
    if bool(same.all()) or not bool(pairs.any()):  # no other concept, or no pair of one
        return cosines.sum() * 0
    others = cosines.masked_fill(same, float("-inf")).logsumexp(1, keepdim=True)
    return F.softplus(others - cosines)[pairs].mean()


def loss_of(maps: Tensor, places: Sequence[Sequence[Sequence[int]]], temperature: float) -> Tensor:
    """The contrast of a picture: every word of a concept in every branch is one entry of that concept.

    Args:
        maps: `(branches, cells, words)`.
        places: Of each concept in each branch, the positions of its words.
        temperature: As `contrast`.
    """
    entries: list[Tensor] = []
    labels: list[int] = []
    for label, branches in enumerate(places):
        for branch, words in enumerate(branches):
            entries += [maps[branch, :, word] for word in words]
            labels += [label] * len(words)
    return contrast(spread_out(torch.stack(entries)), labels, temperature)


def territories(maps: Sequence[Tensor], threshold: float, change: Change) -> Tensor:
    """Cut the masks of the branches: each concept where one of its words is strong, the plain branch elsewhere.

    Args:
        maps: Of each concept in its own branch, `(words, height, width)`.
        threshold: Part of each map's maximum that a cell must exceed.
        change: Applied to each concept's mask, over 3 x 3 cells.

    Returns:
        `(1 + concepts, height, width)`, 0 or 1; the plain branch's first, 1 where every other is 0.
    """
    cut = [(map_ > threshold * map_.amax((1, 2), keepdim=True)).any(0).float() for map_ in maps]
    masks = changed(torch.stack(cut), change)
    return torch.cat([1 - masks.amax(0, keepdim=True), masks])


def changed(masks: Tensor, change: Change) -> Tensor:
    """Grow or shrink masks `(masks, height, width)` by a cell, or both in turn; the canvas' edge shrinks none."""
    for move in CHANGES[change]:
        masks = F.max_pool2d(masks, 3, 1, 1) if move == "grow" else -F.max_pool2d(-masks, 3, 1, 1)
    return masks


CHANGES: Mapping[Change, tuple[Literal["grow", "shrink"], ...]] = {
    "none": (),
    "dilate": ("grow",),
    "erode": ("shrink",),
    "open": ("shrink", "grow"),
    "close": ("grow", "shrink"),
}


def fused(predictions: Tensor, masks: Tensor) -> Tensor:
    """Each branch where its mask is, averaged where several are.

    Args:
        predictions: `(branches, channels, height, width)`.
        masks: `(branches, rows, columns)`, somewhere 1 at every cell; repeated to the size of the latents.

    Returns:
        `(1, channels, height, width)`.
    """
    fine = F.interpolate(masks[:, None], predictions.shape[-2:], mode="nearest")  # (branches, 1, height, width)
    return (fine * predictions).sum(0, keepdim=True) / fine.sum(0, keepdim=True)
