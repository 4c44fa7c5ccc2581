"""Merge by adding first factors to first factors and second to second, as PEFT's "linear" does.

Paper: none; PEFT's `add_weighted_adapter`. The product of the sums has cross terms: sound only for adapters that share
one factor. Here every scale is folded into the factors first, so that adapters with rsLoRA's scale merge rightly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..factors import Factors
from ..merging import on_factors, weighted_sum
from ..tool import FileOptions, Parts, merging

if TYPE_CHECKING:
    import torch


class LinearOptions(FileOptions):
    """Options of the sum of factors."""


def _rule(parts: Parts, options: LinearOptions, rng: torch.Generator) -> Factors:
    return on_factors(parts, weighted_sum)


TOOL = merging(
    "linear", "Merge factor by factor", "Sums the factors, not the changes: for adapters that share one of them.", "",
    LinearOptions, _rule,
)  # fmt: skip
