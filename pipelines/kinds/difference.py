"""A whole difference of a layer, of its weight, its bias or both; LyCORIS calls it full, or norm on a norm layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..kind import Change, Kind, Shape, Shapes, show, unlike

if TYPE_CHECKING:
    from torch import Tensor

NAMES = (("diff", "diff_b"), ("w_norm", "b_norm"))  # of weight and bias


@dataclass(frozen=True)
class Difference:
    """One adapted layer; the shapes are those of the layer's own weight and bias."""

    weight: Tensor | None
    bias: Tensor | None

    @property
    def rank(self) -> int:
        return 0

    def change(self, weight: Tensor, bias: Tensor | None = None) -> Change:
        delta = None if self.weight is None else self.weight.float().reshape(weight.shape).to(weight.device)
        return Change(delta, None if self.bias is None else self.bias.float().to(weight.device))


def _rank(shapes: Shapes) -> int:
    return 0


def _fit(shapes: Shapes, target: Shape | None) -> str | None:
    for weight, bias in NAMES:
        if target is not None and bias in shapes and shapes[bias] != target[:1]:
            return f"its bias is {show(shapes[bias])} but the layer has {target[0]} outputs"
        if weight in shapes:
            return unlike(shapes[weight], target)
    return None


def _read(parts: Mapping[str, Tensor], alpha: float | None, target: Shape | None) -> Difference:
    weight, bias = ("w_norm", "b_norm") if parts.keys() & {"w_norm", "b_norm"} else ("diff", "diff_b")
    return Difference(parts.get(weight), parts.get(bias))


KIND = Kind(
    name="difference",
    title="full difference",
    paper="",
    required=tuple(frozenset({name}) for names in NAMES for name in names),
    optional=frozenset({"diff", "diff_b", "w_norm", "b_norm"}),
    rank=_rank,
    fit=_fit,
    read=_read,
    product=False,
)
