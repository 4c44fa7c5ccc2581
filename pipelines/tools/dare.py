"""DARE: drop numbers at random and enlarge the rest, so that several adapters disturb each other less.

Paper: arXiv:2311.03099; then a weighted sum or TIES' election, as in PEFT, but from a seed of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from ..factors import Factors
from ..merging import NumberOptions, agreed_mean, on_numbers, weighted_sum
from ..options import option
from ..tool import Parts, merging

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class DareOptions(NumberOptions):
    """Options of DARE."""

    signs: Literal["none", "total", "frequency"] = option(
        "none", label="Signs", help="None: a plain sum. Else TIES' election by the sum of the numbers, or by how many."
    )


def _rule(parts: Parts, options: DareOptions, rng: torch.Generator) -> Factors:
    import torch

    def dropped(tensor: Tensor) -> Tensor:
        kept = torch.bernoulli(torch.full_like(tensor, options.density), generator=rng)
        return tensor * kept / options.density

    def rule(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        thinned = [dropped(tensor) for tensor in tensors]
        if options.signs == "none":
            return weighted_sum(thinned, weights)
        return agreed_mean(thinned, weights, options.signs)

    return on_numbers(parts, options, rule)


TOOL = merging("dare", "DARE", "Drops numbers at random and enlarges the rest.", "arXiv:2311.03099", DareOptions, _rule)
