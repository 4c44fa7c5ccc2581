"""TIES: trim small numbers, elect a sign for each number, take the mean of those that agree.

Paper: arXiv:2306.01708, algorithm 1. As in PEFT a weight multiplies what survives; unlike there, every adapter's scale
is folded in before the signs are elected, so that the spelling of alpha does not decide an election.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..factors import Factors
from ..merging import Election, NumberOptions, agreed_mean, on_numbers, trimmed
from ..options import option
from ..tool import Parts, merging

if TYPE_CHECKING:
    import torch


class TiesOptions(NumberOptions):
    """Options of TIES."""

    signs: Election = option(
        "total", label="Signs", help="Elected by the sum of the numbers, or by how many there are of each."
    )


def _rule(parts: Parts, options: TiesOptions, rng: torch.Generator) -> Factors:
    return on_numbers(
        parts, options,
        lambda tensors, weights: agreed_mean([trimmed(t, options.density) for t in tensors], weights, options.signs),
    )  # fmt: skip


TOOL = merging(
    "ties", "TIES", "Keeps the large numbers, and of these only those that agree in sign.", "arXiv:2306.01708",
    TiesOptions, _rule,
)  # fmt: skip
