"""Merge to a chosen rank: the nearest change of that rank to the exact sum. As PEFT's "svd"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..factors import Factors, reduced, together
from ..merging import most_rank
from ..options import option
from ..tool import FileOptions, Parts, merging

if TYPE_CHECKING:
    import torch


class SvdOptions(FileOptions):
    """Options of the merge by singular values."""

    rank: int = option(0, label="Rank", help="Of the result; 0 is the largest that came in.", low=0, high=4096)
    energy: float = option(
        1.0, label="Energy", help="Share of the squared norm to keep, with the smallest rank that does.", low=0.01,
        high=1,
    )  # fmt: skip


def _rule(parts: Parts, options: SvdOptions, rng: torch.Generator) -> Factors:
    rank = options.rank or (0 if options.energy < 1 else most_rank(parts))
    return reduced(together(parts), rank, options.energy)


TOOL = merging(
    "svd", "Merge to a rank", "The nearest adapter of a rank to all of them together.", "", SvdOptions, _rule
)
