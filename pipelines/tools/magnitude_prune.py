"""Merge the largest numbers of each adapter by a weighted sum. As PEFT's "magnitude_prune"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..factors import Factors
from ..merging import NumberOptions, on_numbers, trimmed, weighted_sum
from ..tool import Parts, merging

if TYPE_CHECKING:
    import torch


def _rule(parts: Parts, options: NumberOptions, rng: torch.Generator) -> Factors:
    return on_numbers(
        parts, options,
        lambda tensors, weights: weighted_sum([trimmed(t, options.density) for t in tensors], weights),
    )  # fmt: skip


TOOL = merging(
    "magnitude-prune", "Merge the largest numbers", "Keeps each adapter's largest numbers and sums them.", "",
    NumberOptions, _rule,
)  # fmt: skip
