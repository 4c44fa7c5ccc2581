"""LoHa: the change is the elementwise product of two low-rank matrices. Papers: arXiv:2108.06098, arXiv:2309.14859."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from ..kind import Change, Kind, Shape, Shapes, show, unlike

if TYPE_CHECKING:
    from torch import Tensor

PAIRS = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
CORES = frozenset({"hada_t1", "hada_t2"})


@dataclass(frozen=True)
class Hadamard:
    """One adapted layer: delta = alpha / rank * (a1 b1) o (a2 b2).

    Args:
        a1, b1, a2, b2: `(out, rank)` and `(rank, in * kernel * kernel)`; with cores `(rank, out)` and `(rank, in)`.
        t1, t2: Tucker cores `(rank, rank, kernel, kernel)`, or None.
        alpha: As in the file.
    """

    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor
    t1: Tensor | None
    t2: Tensor | None
    alpha: float

    @property
    def rank(self) -> int:
        return self.b1.shape[0]

    def change(self, weight: Tensor, bias: Tensor | None = None) -> Change:
        first, second = _product(self.a1, self.b1, self.t1), _product(self.a2, self.b2, self.t2)
        return Change((self.alpha / self.rank * first * second).reshape(weight.shape).to(weight.device))


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    import torch

    if core is None:
        return a.float() @ b.float()
    return torch.einsum("ijhw,jn,im->mnhw", core.float(), b.float(), a.float())  # (out, in, kernel, kernel)


def _rank(shapes: Shapes) -> int:
    return shapes["hada_w1_b"][0] if shapes["hada_w1_b"] else 0


def _fit(shapes: Shapes, target: Shape | None) -> str | None:
    made = [_made(shapes, number) for number in "12"]
    if made[0] is None or made[0] != made[1] or not prod(made[0]):
        return "its four matrices " + ", ".join(show(shapes[name]) for name in sorted(PAIRS)) + " are no LoHa factors"
    return unlike(made[0], target)


def _made(shapes: Shapes, number: str) -> Shape | None:
    """The shape of the product of one half, None if its factors do not match."""
    a, b, core = (shapes.get(f"hada_{name}") for name in (f"w{number}_a", f"w{number}_b", f"t{number}"))
    if not a or not b or len(a) != 2 or len(b) != 2:
        return None
    if core is None:
        return (a[0], b[1]) if a[1] == b[0] else None
    return (a[1], b[1], *core[2:]) if len(core) == 4 and core[:2] == (a[0], b[0]) else None


def _read(parts: Mapping[str, Tensor], alpha: float | None, target: Shape | None) -> Hadamard:
    pairs = (parts["hada_w1_a"], parts["hada_w1_b"], parts["hada_w2_a"], parts["hada_w2_b"])
    rank = float(pairs[1].shape[0])
    return Hadamard(*pairs, parts.get("hada_t1"), parts.get("hada_t2"), rank if alpha is None else alpha)


KIND = Kind(
    name="loha",
    title="LoHa",
    paper="arXiv:2108.06098",
    required=(PAIRS, PAIRS | CORES),
    optional=frozenset(),
    rank=_rank,
    fit=_fit,
    read=_read,
)
