"""Merge exactly: the factors of all adapters side by side, so that the ranks add up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..factors import Factors, together
from ..tool import FileOptions, Parts, merging

if TYPE_CHECKING:
    import torch


class CatOptions(FileOptions):
    """Options of the exact merge."""


def _rule(parts: Parts, options: CatOptions, rng: torch.Generator) -> Factors:
    return together(parts)


TOOL = merging(
    "cat", "Merge exactly", "One adapter that does what all do together; its rank is the sum of theirs.",
    "arXiv:2106.09685", CatOptions, _rule,
)  # fmt: skip
