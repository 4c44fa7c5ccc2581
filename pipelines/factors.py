"""The arithmetic of merging and resizing: changes of a layer as two thin matrices, in float64, never made dense.

A sum of low-rank changes is their factors side by side, and its best approximation of a lower rank follows from two QR
decompositions and one small SVD, so that nothing here grows with the size of the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from .dora import Decomposed
from .errors import AdapterError
from .kind import Layer, Shape
from .kinds.ia3 import Rescaled
from .kinds.lora import LowRank
from .rows import Rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROUNDING = 1e-6  # singular values below this share of the largest are float32's rounding, not information


@dataclass(frozen=True)
class Factors:
    """A change as `up @ down`, every scale folded in.

    Args:
        down: `(rank, in * kernel * kernel)`, float64.
        up: `(out, rank)`, float64.
        bias: `(out,)`, float64, or None.
        shape: Of the layer's weight, `(out, in)` or `(out, in, kernel, kernel)`.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None
    shape: Shape

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def dense(self) -> Tensor:
        """The change as `(out, in * kernel * kernel)`."""
        return self.up @ self.down


def needs_weight(layer: Layer) -> bool:
    """Whether what a layer changes depends on the weight it sits on."""
    if isinstance(layer, Rows):
        return needs_weight(layer.inner)
    return isinstance(layer, Decomposed | Rescaled)


def factors(layer: Layer, shape: Shape, weight: Tensor | None = None) -> Factors:
    """Take a layer of any kind as factors; those of dense kinds have the full rank of the change.

    The scale is shared evenly by both factors, so that neither is much larger than the other.

    Args:
        shape: Of the layer's weight.
        weight: The weight itself, for kinds that need it.

    Raises:
        AdapterError: The layer needs the weight and it is not given, or it is no matrix (a norm).
    """
    import torch

    if len(shape) < 2:
        raise AdapterError("A norm has no matrix that low-rank factors could change.")
    if isinstance(layer, LowRank):
        root = abs(layer.scale) ** 0.5
        sign = -1.0 if layer.scale < 0 else 1.0
        bias = None if layer.bias is None else layer.scale * layer.bias.double()
        return Factors(sign * root * layer.down.double().flatten(1), root * layer.up.double().flatten(1), bias, shape)
    if weight is None and needs_weight(layer):
        raise AdapterError("What it changes depends on the model's own weights.", "Name the model with --model.")
    made = layer.change(torch.zeros(shape) if weight is None else weight.float())
    bias = None if made.bias is None else made.bias.double()
    if made.weight is None:
        empty = torch.zeros(0, dtype=torch.float64)
        return Factors(empty.reshape(0, prod(shape[1:])), empty.reshape(shape[0], 0), bias, shape)
    return replace(of_dense(made.weight, shape), bias=bias)


def of_dense(change: Tensor, shape: Shape) -> Factors:
    """Factor a dense change as far as its values are more than rounding.

    The eigenvectors of the smaller Gram matrix are found much faster than a full SVD, and in float64 they are as good
    for everything that float32 can hold.
    """
    import torch

    matrix = change.double().flatten(1)
    wide = matrix.shape[0] <= matrix.shape[1]
    values, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    values, vectors = values.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    kept = int((values > ROUNDING * values[:1].clamp(min=1e-300)).sum())
    vectors, root = vectors[:, :kept], values[:kept].sqrt()
    if wide:
        return Factors((vectors.T @ matrix) / root[:, None], vectors * root, None, shape)
    return Factors(vectors.T * root[:, None], (matrix @ vectors) / root, None, shape)


def together(parts: Sequence[tuple[float, Factors]]) -> Factors:
    """The exact weighted sum: ranks add up."""
    import torch

    down = torch.cat([weight * part.down for weight, part in parts])
    up = torch.cat([part.up for _, part in parts], dim=1)
    biases = [weight * part.bias for weight, part in parts if part.bias is not None]
    return Factors(down, up, torch.stack(biases).sum(0) if biases else None, parts[0][1].shape)


def norm(change: Factors) -> float:
    """Frobenius norm of weight and bias change together."""
    import torch

    if not change.rank:
        square = 0.0
    else:
        _, left = torch.linalg.qr(change.up)
        _, right = torch.linalg.qr(change.down.T)
        square = float((left @ right.T).square().sum())
    return (square + (0.0 if change.bias is None else float(change.bias.square().sum()))) ** 0.5


def distance(one: Factors, other: Factors) -> float:
    """Frobenius norm of the difference."""
    return norm(together([(1.0, one), (-1.0, other)]))


def reduced(change: Factors, rank: int = 0, energy: float = 1.0) -> Factors:
    """The nearest change of a lower rank (Eckart-Young), its singular values shared evenly by both factors.

    Args:
        rank: The most it may have; 0 for no limit.
        energy: Share of the squared norm to keep; with less than 1 the smallest rank that keeps it.
    """
    import torch

    if not change.rank:
        return change
    q_up, r_up = torch.linalg.qr(change.up)
    q_down, r_down = torch.linalg.qr(change.down.T)
    u, values, v = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    keep = kept_rank(values, rank, energy)
    root = values[:keep].sqrt()
    up, down = (q_up @ u[:, :keep]) * root, root[:, None] * (v[:keep] @ q_down.T)
    return replace(change, down=down, up=up)


def kept_rank(values: Tensor, rank: int, energy: float) -> int:
    """How many singular values, largest first, a rank and an energy ask for; at least one."""
    import torch

    most = min(rank or len(values), len(values))
    squares = values.square()
    total = float(squares.sum())
    if energy >= 1 or not total:
        return max(1, most)
    share = torch.cumsum(squares, 0) / total
    return max(1, min(most, int((share < energy).sum()) + 1))


def stored(change: Factors, dtype: torch.dtype) -> tuple[LowRank, Factors]:
    """Give the layer as a file will hold it, and what is left of the change by that rounding."""
    kernel = change.shape[2:]
    if not change.rank:  # nothing is changed, which a file cannot say with no rank at all
        down, up = change.down.new_zeros(1, prod(change.shape[1:])), change.up.new_zeros(len(change.up), 1)
        change = replace(change, down=down, up=up)
    down = change.down.to(dtype).reshape(change.rank, *change.shape[1:])
    up = change.up.to(dtype).reshape(change.shape[0], change.rank, *[1] * len(kernel))
    bias = None if change.bias is None else change.bias.to(dtype)
    rounded = Factors(
        down.double().flatten(1), up.double().flatten(1), None if bias is None else bias.double(), change.shape
    )
    return LowRank(down, up, float(change.rank), bias), rounded
