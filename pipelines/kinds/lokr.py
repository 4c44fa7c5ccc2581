"""LoKr: the change is a Kronecker product of a small and a large factor, either of them perhaps low-rank.

Paper: arXiv:2309.14859, section 3.3. As in the released code, alpha counts only where a factor is low-rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from ..kind import Change, Kind, Shape, Shapes, show, unlike

if TYPE_CHECKING:
    from torch import Tensor

FIRST = (frozenset({"lokr_w1"}), frozenset({"lokr_w1_a", "lokr_w1_b"}))
SECOND = (
    frozenset({"lokr_w2"}),
    frozenset({"lokr_w2_a", "lokr_w2_b"}),
    frozenset({"lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
)


@dataclass(frozen=True)
class Kronecker:
    """One adapted layer: delta = scale * kron(first, second).

    Args:
        first: `(a, c)`, whole.
        second: `(b, d)` or `(b, d, kernel, kernel)`, whole; the layer is `(a b, c d)`.
        scale: alpha / rank, 1 if neither factor was low-rank.
        rank: Of the low-rank factors, 0 if there are none.
    """

    first: Tensor
    second: Tensor
    scale: float
    rank: int

    def change(self, weight: Tensor, bias: Tensor | None = None) -> Change:
        import torch

        first = self.first.float()
        first = first.reshape(*first.shape, *[1] * (self.second.ndim - 2))
        delta = self.scale * torch.kron(first, self.second.float().contiguous())
        return Change(delta.reshape(weight.shape).to(weight.device))


def _rank(shapes: Shapes) -> int:
    for name in ("lokr_w1_b", "lokr_w2_b"):
        if shapes.get(name):
            return shapes[name][0]
    return 0


def _fit(shapes: Shapes, target: Shape | None) -> str | None:
    first, second = _made(shapes, "lokr_w1"), _made(shapes, "lokr_w2")
    if first is None or second is None or len(first) != 2 or len(second) not in (2, 4) or not prod(first + second):
        told = ", ".join(f"{name.removeprefix('lokr_')} {show(shape)}" for name, shape in sorted(shapes.items()))
        return f"{told} are no LoKr factors"
    return unlike((first[0] * second[0], first[1] * second[1], *second[2:]), target)


def _made(shapes: Shapes, name: str) -> Shape | None:
    """The shape of one factor, None if its own factors do not match."""
    if name in shapes:
        return shapes[name]
    a, b, core = shapes[f"{name}_a"], shapes[f"{name}_b"], shapes.get("lokr_t2")
    if len(a) != 2 or len(b) != 2:
        return None
    if name == "lokr_w2" and core is not None:
        return (a[1], b[1], *core[2:]) if len(core) == 4 and core[:2] == (a[0], b[0]) else None
    return (a[0], b[1]) if a[1] == b[0] else None


def _read(parts: Mapping[str, Tensor], alpha: float | None, target: Shape | None) -> Kronecker:
    import torch

    first = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if "lokr_w2" in parts:
        second = parts["lokr_w2"]
    elif "lokr_t2" in parts:
        second = torch.einsum("ijhw,jn,im->mnhw", parts["lokr_t2"], parts["lokr_w2_b"], parts["lokr_w2_a"])
    else:
        second = parts["lokr_w2_a"] @ parts["lokr_w2_b"]
    if target is not None and len(target) == 4 and second.ndim == 2:  # the kernel was folded into the inputs
        second = second.reshape(second.shape[0], -1, *target[2:])
    rank = _rank({name: tuple(part.shape) for name, part in parts.items()})
    return Kronecker(first, second, 1.0 if not rank or alpha is None else alpha / rank, rank)


KIND = Kind(
    name="lokr",
    title="LoKr",
    paper="arXiv:2309.14859",
    required=tuple(one | other for one in FIRST for other in SECOND),
    optional=frozenset(),
    rank=_rank,
    fit=_fit,
    read=_read,
)
