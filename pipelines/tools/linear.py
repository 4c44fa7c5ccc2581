"""Merge by adding first factors to first factors and second to second, as PEFT's "linear" does.

Paper: none; PEFT's `add_weighted_adapter`. The product of the sums has cross terms: sound only for adapters that share
one factor. Here every scale is folded into the factors first, so that adapters with rsLoRA's scale merge rightly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..factors import Factors
from ..merging import same_rank, weighted_sum, with_bias
from ..tool import FileOptions, Parts, merging

if TYPE_CHECKING:
    import torch


class LinearOptions(FileOptions):
    """Options of the sum of factors."""


def _rule(parts: Parts, options: LinearOptions, rng: torch.Generator) -> Factors:
    same_rank(parts)
    roots = [abs(weight) ** 0.5 for weight, _ in parts]
    signed = [root if weight >= 0 else -root for root, (weight, _) in zip(roots, parts, strict=True)]
    down = weighted_sum([part.down for _, part in parts], signed)
    up = weighted_sum([part.up for _, part in parts], roots)
    return with_bias(Factors(down, up, None, parts[0][1].shape), parts)


TOOL = merging(
    "linear", "Merge factor by factor", "Sums the factors, not the changes: for adapters that share one of them.", "",
    LinearOptions, _rule,
)  # fmt: skip
