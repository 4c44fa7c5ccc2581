"""What an adapter file can hold for one layer of a model, whatever the algorithm: a change of its weight and bias.

A kind is one file in `kinds/` that defines `KIND`. It says which tensors make it up, which weight they fit (from shapes
alone, without torch), and makes the layer from their values. DoRA is no kind of its own: its magnitude may stand on top
of any kind that changes a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod
from typing import TYPE_CHECKING, NamedTuple, Protocol

from .plugins import discover

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
MAGNITUDES = ("magnitude", "dora_scale")  # parts that make a DoRA of what they stand beside


class Change(NamedTuple):
    """What is added to a layer's weight and to its bias; None leaves it alone."""

    weight: Tensor | None
    bias: Tensor | None = None


class Layer(Protocol):
    """One adapted layer, read from a file."""

    @property
    def rank(self) -> int:
        """Rank of the factors; 0 where the kind has none."""
        ...

    def change(self, weight: Tensor, bias: Tensor | None = None) -> Change:
        """Compute the dense change in float32.

        Args:
            weight: The layer's own, `(out, in)`, `(out, in, kernel, kernel)` or, of a norm, `(channels,)`.
            bias: The layer's own, `(out,)`.
        """
        ...


@dataclass(frozen=True)
class Kind:
    """How one algorithm is stored.

    Args:
        name: Short, for machine output.
        title: For people.
        paper: Where it comes from.
        required: Sets of parts; a layer that has all of one set is of this kind.
        optional: Parts it may have besides.
        rank: From the parts' shapes; 0 if there is none.
        fit: From the parts' shapes and the weight's (None: not known): a sentence if they do not fit, else None.
        read: From the parts' values, alpha (None: the file has none) and the weight's shape (None: not known).
        product: Its parts are multiplied, so that one of them being zero makes the change zero.
    """

    name: str
    title: str
    paper: str
    required: tuple[frozenset[str], ...]
    optional: frozenset[str]
    rank: Callable[[Shapes], int]
    fit: Callable[[Shapes, Shape | None], str | None]
    read: Callable[[Mapping[str, Tensor], float | None, Shape | None], Layer]
    product: bool = True

    def takes(self, parts: frozenset[str]) -> bool:
        """Whether these parts are a whole layer of this kind."""
        return any(need <= parts <= need | self.optional for need in self.required)


@cache
def kinds() -> dict[str, Kind]:
    """Every kind by name."""
    from . import kinds as folder

    return discover(folder, "KIND")


@lru_cache(maxsize=256)
def kind_of(parts: frozenset[str]) -> Kind | None:
    """Give the kind that a layer's parts make up, a magnitude left aside."""
    return next((kind for kind in kinds().values() if kind.takes(parts - {*MAGNITUDES, "alpha"})), None)


def flat(shape: Shape) -> Shape:
    """A 1x1 convolution is a linear layer: leave the two ones out."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def show(shape: tuple[int | str, ...]) -> str:
    """Write a shape in words."""
    return "(" + ", ".join(str(size) for size in shape) + ")"


def unlike(made: Shape, target: Shape | None) -> str | None:
    """Say that a change of one shape does not fit a weight of another; kernels may be folded into the inputs."""
    if target is None or flat(made) == flat(target):
        return None
    if len(made) == 2 and len(target) == 4 and made == (target[0], prod(target[1:])):
        return None
    return f"its change is {show(flat(made))} but the layer is {show(flat(target))}"
