"""Some outputs of a layer as a layer of its own: the part of a fused projection that one layer of the model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .dora import Decomposed
from .kind import Change, Layer, Shape
from .kinds.lora import LowRank

if TYPE_CHECKING:
    from torch import Tensor

Spans = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Rows:
    """Rows of a layer whose change is known as a whole only.

    Args:
        inner: The fused layer.
        spans: First and one past the last row, in this layer's order.
        whole: Weight shape of the fused layer.
    """

    inner: Layer
    spans: tuple[tuple[int, int], ...]
    whole: Shape

    @property
    def rank(self) -> int:
        return self.inner.rank

    def change(self, weight: Tensor, bias: Tensor | None = None) -> Change:
        """Change rows of the fused layer, of which only these are known and the others do not matter."""
        fused = weight.new_ones(self.whole)
        _put(fused, weight, self.spans)
        fused_bias = None
        if bias is not None:
            fused_bias = bias.new_zeros(self.whole[0])
            _put(fused_bias, bias, self.spans)
        made = self.inner.change(fused, fused_bias)
        return Change(*(None if part is None else _take(part, self.spans) for part in made))


def of_rows(layer: Layer, spans: Spans, whole: Shape) -> Layer:
    """Give some outputs of a layer; low-rank factors stay such. Magnitudes count outputs (layers.py refuses others)."""
    if isinstance(layer, LowRank):
        bias = None if layer.bias is None else _take(layer.bias, spans)
        return replace(layer, up=_take(layer.up, spans), bias=bias)
    if isinstance(layer, Decomposed):
        return Decomposed(of_rows(layer.inner, spans, whole), _take(layer.magnitude, spans), True)
    return Rows(layer, tuple(spans), whole)


def _take(part: Tensor, spans: Spans) -> Tensor:
    import torch

    return torch.cat([part[first:last] for first, last in spans])


def _put(whole: Tensor, part: Tensor, spans: Spans) -> None:
    at = 0
    for first, last in spans:
        whole[first:last] = part[at : at + last - first]
        at += last - first
