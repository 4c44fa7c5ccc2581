"""How much two adapters disturb each other: the overlap of the inputs that their changes read, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import nn

from ..pipelines.attach import Attachment
from ..pipelines.bases import Basis
from ..pipelines.events import CancelToken
from ..pipelines.factors import Factors, factors
from ..pipelines.fitted import fitted

CLAIM = 1e-3  # of crosstalk that disjoint bases may have once they were rounded to 16 bits


@dataclass(frozen=True)
class Crosstalk:
    """Of one pair of adapters.

    Args:
        names: Of the pair.
        layers: |dW_i dW_j^T| / (|dW_i| |dW_j|) from 0 to 1, by canonical path of the layers both change.
        overall: The root of the sum of squares of what stands above, over that of what stands below.
        remark: What their headers say of their bases, as a sentence.
        disjoint: Whether they were trained in columns of one basis that have nothing in common, and keep to it.
    """

    names: tuple[str, str]
    layers: Mapping[str, float]
    overall: float
    remark: str
    disjoint: bool


def crosstalk(
    components: Mapping[str, nn.Module], attachments: Sequence[Attachment], token: CancelToken
) -> tuple[Crosstalk, ...]:
    """Measure every pair; weights cancel out.

    Raises:
        AdapterError: An adapter does not fit.
        Cancelled: A stop was asked for.
    """
    pairs = list(combinations([attachment.name for attachment in attachments], 2))
    found: dict[tuple[str, str], dict[str, tuple[float, float]]] = {pair: {} for pair in pairs}
    for module, uses in fitted(components, attachments).layers:
        token.check()
        shape = tuple(module.weight.shape)
        if len(uses) < 2 or len(shape) < 2:
            continue
        weight = module.weight.detach().cpu()
        parts = {one.name: factors(one.adapter.layers[path], shape, weight) for one, path in uses}
        for first, second in combinations(parts, 2):
            found[first, second][uses[0][1]] = _overlap(parts[first], parts[second])
    return tuple(_judged(attachments, pair, layers) for pair, layers in found.items())


def _overlap(one: Factors, other: Factors) -> tuple[float, float]:
    """|dW_i dW_j^T|, and the product of both norms, from small matrices: |U M V^T|^2 = tr(U^T U M V^T V M^T)."""
    grams = [part.up.T @ part.up for part in (one, other)]
    sizes = [_trace(gram, part.down @ part.down.T) for gram, part in zip(grams, (one, other), strict=True)]
    meeting = one.down @ other.down.T
    return _trace(grams[0] @ meeting, grams[1] @ meeting.T) ** 0.5, (sizes[0] * sizes[1]) ** 0.5


def _trace(one: torch.Tensor, other: torch.Tensor) -> float:
    """Trace of a product of two matrices that is no less than 0, whatever rounding says."""
    return max(0.0, float((one * other.T).sum()))


def _judged(
    attachments: Sequence[Attachment], pair: tuple[str, str], layers: Mapping[str, tuple[float, float]]
) -> Crosstalk:
    above = sum(top**2 for top, _ in layers.values()) ** 0.5
    below = sum(bottom**2 for _, bottom in layers.values()) ** 0.5
    overall = above / below if below else 0.0
    named = {attachment.name: attachment for attachment in attachments}
    remark, disjoint = _remark(named[pair[0]], named[pair[1]], overall)
    shares = {path: top / bottom if bottom else 0.0 for path, (top, bottom) in layers.items()}
    return Crosstalk(pair, shares, overall, remark, disjoint)


def _remark(one: Attachment, other: Attachment, overall: float) -> tuple[str, bool]:
    """Hold what two headers say against each other, and against what was measured."""
    both = f"{one.name} and {other.name}"
    bases = [Basis.of(attachment.adapter.metadata) for attachment in (one, other)]
    without = [attachment.name for attachment, basis in zip((one, other), bases, strict=True) if basis is None]
    if without:
        return f"No basis is recorded for {' and '.join(without)}; {both} overlap by {overall:.3f}.", False
    first, second = bases
    assert first is not None and second is not None
    if not first.same_matrices(second):
        return f"{both} were trained in different bases; they overlap by {overall:.3f}.", False
    if count := first.shared_with(second):
        return f"{both} share {count} columns of a basis; they overlap by {overall:.3f}.", False
    if overall > CLAIM:
        return f"{both} claim disjoint bases but overlap by {overall:.3f}: one was changed since.", False
    return f"{both} were trained in disjoint bases.", True
