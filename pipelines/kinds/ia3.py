"""(IA)3: every input or output channel of a layer is scaled. Paper: arXiv:2205.05638, section 3.3.

LyCORIS stores what is added to one and scales the weight alone; PEFT stores the factor itself and, at the output,
scales the bias with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from ..kind import Change, Kind, Shape, Shapes, show

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rescaled:
    """One adapted layer: delta = weight * gain along the inputs or the outputs.

    Args:
        gain: `(channels,)`, what is added to a factor of one.
        on_input: Along the inputs, else along the outputs.
        with_bias: The bias is scaled too.
    """

    gain: Tensor
    on_input: bool
    with_bias: bool

    @property
    def rank(self) -> int:
        return 0

    def change(self, weight: Tensor, bias: Tensor | None = None) -> Change:
        gain, own = self.gain.float().to(weight.device), weight.float()
        axis = [1] * (own.ndim - 2)
        delta = own * (gain.reshape(1, -1, *axis) if self.on_input else gain.reshape(-1, 1, *axis))
        scaled = self.with_bias and not self.on_input and bias is not None
        return Change(delta, bias.float() * gain if scaled and bias is not None else None)


def _rank(shapes: Shapes) -> int:
    return 0


def _fit(shapes: Shapes, target: Shape | None) -> str | None:
    shape = next(shape for name, shape in shapes.items() if name != "on_input")
    long = [size for size in shape if size != 1]
    if prod(shapes.get("on_input", ())) != 1:
        return f"its mark on_input is {show(shapes['on_input'])}, not one number"
    if len(long) > 1 or not all(shape):
        return f"{show(shape)} is no row of channels"
    if len(shape) == 4 and target is not None and target[0] == target[1]:
        return "PEFT does not store whether it scales the inputs or the outputs, and here they are equally many"
    if target is not None and max(shape, default=1) not in target[:2]:
        return f"it scales {max(shape, default=1)} channels but the layer is {show(target)}"
    return None


def _read(parts: Mapping[str, Tensor], alpha: float | None, target: Shape | None) -> Rescaled:
    if "ia3" in parts:
        return Rescaled(parts["ia3"].flatten(), bool(parts["on_input"].flatten()[0] != 0), with_bias=False)
    factor = parts["ia3_l"]  # (out, 1) at the output, (1, in) at the input; convolutions the same with two more ones
    on_input = factor.ndim > 1 and factor.shape[0] == 1 and (target is None or target[0] != 1)
    if factor.ndim == 4:  # (1, channels, 1, 1) either way, see _fit
        on_input = target is not None and factor.shape[1] == target[1]
    return Rescaled(factor.flatten() - 1, on_input, with_bias=True)


KIND = Kind(
    name="ia3",
    title="(IA)\N{SUPERSCRIPT THREE}",
    paper="arXiv:2205.05638",
    required=(frozenset({"ia3", "on_input"}), frozenset({"ia3_l"})),
    optional=frozenset(),
    rank=_rank,
    fit=_fit,
    read=_read,
    product=False,
)
