"""What the merge rules that work on single numbers share: where they work, trimming, and electing signs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from .errors import AdapterError
from .factors import Factors, of_dense, reduced, together
from .options import option
from .tool import FileOptions, Parts

if TYPE_CHECKING:
    from torch import Tensor

Rule: TypeAlias = "Callable[[Sequence[Tensor], Sequence[float]], Tensor]"
Election = Literal["total", "frequency"]


class NumberOptions(FileOptions):
    """Options of the rules that keep, drop or choose single numbers."""

    on: Literal["change", "factors"] = option(
        "change", label="Works on", help="The whole change, cut to the rank again; or the two factors, each on its own."
    )
    rank: int = option(
        0, label="Rank", help="Of the result, where it works on the change; 0 is the largest that came in.", low=0,
        high=4096,
    )  # fmt: skip
    density: float = option(0.5, label="Density", help="Share of the numbers that is kept.", low=0.01, high=1)


def on_numbers(parts: Parts, options: NumberOptions, rule: Rule) -> Factors:
    """Apply a rule for tensors and their weights to the dense changes, or to both factors (weights as their roots).

    Raises:
        AdapterError: It is to work on factors of different ranks.
    """
    if options.on == "change":
        dense = rule([part.dense() for _, part in parts], [weight for weight, _ in parts])
        return with_bias(reduced(of_dense(dense, parts[0][1].shape), options.rank or most_rank(parts)), parts)
    return on_factors(parts, rule)


def on_factors(parts: Parts, rule: Rule) -> Factors:
    """Apply a rule to the first factors, then to the second; a weight counts as its root, with its sign on the first.

    Raises:
        AdapterError: The ranks differ.
    """
    same_rank(parts)
    roots = [abs(weight) ** 0.5 for weight, _ in parts]
    signed = [root if weight >= 0 else -root for root, (weight, _) in zip(roots, parts, strict=True)]
    down = rule([part.down for _, part in parts], signed)
    up = rule([part.up for _, part in parts], roots)
    return with_bias(Factors(down, up, None, parts[0][1].shape), parts)


def most_rank(parts: Parts) -> int:
    """The largest rank that came in."""
    return max(part.rank for _, part in parts)


def same_rank(parts: Parts) -> None:
    """Refuse factors that cannot be added number by number.

    Raises:
        AdapterError: The ranks differ.
    """
    ranks = sorted({part.rank for _, part in parts})
    if len(ranks) > 1:
        raise AdapterError(
            f"The adapters have ranks {ranks[0]} and {ranks[-1]}; their factors cannot be added number by number.",
            "Let it work on the change, or resize them to one rank first.",
        )


def with_bias(change: Factors, parts: Parts) -> Factors:
    """Add the exact sum of the biases, which no rule is made for."""
    return replace(change, bias=together(parts).bias)


def trimmed(tensor: Tensor, density: float) -> Tensor:
    """Keep the largest numbers, as many as a share of all; the others become zero."""
    import torch

    if density >= 1:
        return tensor
    kept = torch.zeros(tensor.numel(), dtype=tensor.dtype)
    kept[tensor.abs().flatten().topk(int(density * tensor.numel())).indices] = 1
    return tensor * kept.reshape(tensor.shape)


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum of tensors at their weights."""
    import torch

    return torch.stack([weight * tensor for weight, tensor in zip(weights, tensors, strict=True)]).sum(0)


def agreed_mean(tensors: Sequence[Tensor], weights: Sequence[float], election: Election) -> Tensor:
    """TIES' last two steps: elect a sign for each number, then take the mean of those that have it.

    The sign is that of the sum of the unweighted numbers ("total") or of most of them ("frequency"); a tie is positive.
    """
    import torch

    stack = torch.stack(list(tensors))
    votes = (stack if election == "total" else stack.sign()).sum(0)
    agree = stack.sign() == torch.where(votes >= 0, 1.0, -1.0)
    scaled = torch.stack([weight * tensor for weight, tensor in zip(weights, tensors, strict=True)])
    return (scaled * agree).sum(0) / agree.sum(0).clamp(min=1)
