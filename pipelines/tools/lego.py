"""LoRA-LEGO: every rank of every adapter is a piece; like pieces are joined, and their middles make the result.

Paper: arXiv:2409.16167. The constants of its rescaling are not public: here a layer's norm is
brought to that of the exact sum. A piece (a, b) is also (-a, -b) and (c a, b / c): the two halves are brought to one
length, and signs are chosen by likeness to the middle, so that the grouping does not depend on how a file spells it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..factors import Factors, norm, together
from ..merging import most_rank, with_bias
from ..options import option
from ..tool import FileOptions, Parts, merging

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROUNDS = 100


class LegoOptions(FileOptions):
    """Options of LoRA-LEGO."""

    rank: int = option(0, label="Rank", help="Of the result; 0 is the largest that came in.", low=0, high=4096)


def _rule(parts: Parts, options: LegoOptions, rng: torch.Generator) -> Factors:
    import torch

    whole = together(parts)
    rank = options.rank or most_rank(parts)
    bare = replace(whole, bias=None)
    if rank >= whole.rank:
        return whole
    columns = whole.down.shape[1]
    sizes, others = whole.down.norm(dim=1), whole.up.norm(dim=0)
    lengths = (sizes * others).sqrt()
    down = whole.down * (lengths / sizes.clamp(min=1e-300))[:, None]
    up = whole.up * (lengths / others.clamp(min=1e-300))
    middles = centres(torch.cat([down, up.T], dim=1), rank, rng)
    made = Factors(middles[:, :columns], middles[:, columns:].T.contiguous(), None, whole.shape)
    gain = (norm(bare) / max(norm(made), 1e-300)) ** 0.5
    return with_bias(replace(made, down=gain * made.down, up=gain * made.up), parts)


def centres(points: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """k-means in which a point and its opposite are the same, begun as k-means++ does; `(count, size)`."""
    import torch

    first = int(torch.randint(len(points), (1,), generator=rng))
    middles = points[first : first + 1]
    while len(middles) < count:
        squares = _squares(points, middles).amin(1).clamp(min=0)
        some = squares if squares.sum() > 0 else torch.ones_like(squares)
        middles = torch.cat([middles, points[torch.multinomial(some, 1, generator=rng)]])
    near = torch.full((len(points),), -1)
    for _ in range(ROUNDS):
        fresh = _squares(points, middles).argmin(1)
        if torch.equal(fresh, near):
            break
        near = fresh
        aligned = points * torch.where((points * middles[near]).sum(1, keepdim=True) < 0, -1.0, 1.0)
        sums = torch.zeros_like(middles).index_add_(0, near, aligned)
        counts = torch.bincount(near, minlength=count)
        middles = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], middles)
    return middles


def _squares(points: Tensor, middles: Tensor) -> Tensor:
    """Squared distances `(points, middles)`, each to the nearer of a middle and its opposite."""
    return points.square().sum(1)[:, None] + middles.square().sum(1)[None] - 2 * (points @ middles.T).abs()


TOOL = merging(
    "lego", "LoRA-LEGO", "Joins like ranks of all adapters into as many as are wanted.", "arXiv:2409.16167",
    LegoOptions, _rule,
)  # fmt: skip
