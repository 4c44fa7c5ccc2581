"""DoRA: a layer's weight is split into directions, which an adapter of any kind turns, and their lengths.

Paper: arXiv:2402.09353, eq. 5. As in PEFT and LyCORIS the length is divided out of the changed weight, not of the
original; lengths may be those of the rows (per output, PEFT and newer LyCORIS) or of the columns (per input).
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .kind import MAGNITUDES, Change, Layer, Shape, show

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Decomposed:
    """One adapted layer: weight + delta = magnitude * (weight + inner) / |weight + inner|.

    Args:
        inner: Turns the directions.
        magnitude: `(out,)` or `(in,)`.
        on_output: It is the length per output.
    """

    inner: Layer
    magnitude: Tensor
    on_output: bool

    @property
    def rank(self) -> int:
        return self.inner.rank

    def change(self, weight: Tensor, bias: Tensor | None = None) -> Change:
        own = weight.float()
        inner = self.inner.change(weight, bias)
        turned = own if inner.weight is None else own + inner.weight
        axis = 0 if self.on_output else 1
        length = turned.transpose(0, axis).flatten(1).norm(dim=1).clamp(min=1e-12)  # (channels,)
        gain = self.magnitude.float().to(own.device) / length
        shape = [1] * own.ndim
        shape[axis] = -1
        return Change(gain.reshape(shape) * turned - own, inner.bias)


def magnitude_of(parts: Container[str]) -> str | None:
    """The part that is a magnitude, if there is one."""
    return next((name for name in MAGNITUDES if name in parts), None)


def misfit(part: str, shape: Shape, target: Shape | None) -> str | None:
    """Say why a magnitude fits no layer of a shape, else None."""
    size = max(shape, default=1)
    if not shape or len([side for side in shape if side != 1]) > 1:
        return f"its magnitude {show(shape)} is no row of lengths"
    if target is None or (len(target) > 1 and size == target[0 if per_output(part, shape, target) else 1]):
        return None
    return f"its magnitude has {size} lengths but the layer is {show(target)}"


def per_output(part: str, shape: Shape, target: Shape | None) -> bool:
    """Whether a magnitude counts outputs: PEFT's always does, LyCORIS' by the side it lies along."""
    if part == "magnitude" or len(shape) < 2:
        return True
    return shape[0] != 1 or (target is not None and target[0] == 1)
