"""Compare two adapters layer by layer: how large, how alike, and how much each disturbs the other.

Crosstalk follows Orthogonal Adaptation (arXiv:2312.02432, section 4): the part of one adapter's change that acts on
inputs the other was trained to see, the span of its first factor; 0 if they leave each other alone, 1 if not at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import InputError
from ..events import Progress
from ..factors import ROUNDING, Factors, distance, norm
from ..tool import Inputs, Made, Tool, ToolOptions, Work, one_family

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = ("norm of first", "norm of second", "distance", "cosine", "overlap in", "overlap out", "first on second",
           "second on first")  # fmt: skip


class DiffOptions(ToolOptions):
    """Options of comparing."""


def _work(inputs: Inputs, options: DiffOptions) -> Work:
    first, second = inputs.sources
    one_family(inputs.sources)
    shared = [
        path for path in first.adapter.layers
        if path in second.adapter.layers and len(inputs.shape(first, path)) > 1
    ]  # fmt: skip
    if not shared:
        raise InputError(f"{first.name} and {second.name} change no layer in common.", "There is nothing to compare.")
    rows: list[tuple[str, tuple[float, ...]]] = []
    for number, path in enumerate(shared, 1):
        inputs.token.check()
        rows.append((path, compared(inputs.factors(first, path), inputs.factors(second, path))))
        yield Progress(stage="diff", step=number, total=len(shared))
    alone = [len(source.adapter.layers) - len(shared) for source in (first, second)]
    told = [
        f"{len(rows)} layers in common; {alone[0]} only in {first.name}, {alone[1]} only in {second.name}.",
        f"Distance {_root(rows, 2):.3g}; norms {_root(rows, 0):.3g} and {_root(rows, 1):.3g}.",
        f"Crosstalk of {first.name} on {second.name}'s inputs {_share(rows, 6, 0):.3g}, the other way "
        f"{_share(rows, 7, 1):.3g} (0 is none, 1 is all of the change).",
    ]
    return Made(COLUMNS, tuple(rows), tuple(told))


def compared(one: Factors, other: Factors) -> tuple[float, ...]:
    """Norms, distance, cosine, overlap of input and output spaces, and crosstalk both ways.

    An overlap is the mean squared cosine of the principal angles: 1 if the smaller space lies in the larger.
    """
    sizes = norm(one), norm(other)
    apart = distance(one, other)
    product = 2 * sizes[0] * sizes[1]
    cosine = (sizes[0] ** 2 + sizes[1] ** 2 - apart**2) / product if product else 0.0
    ins, outs = (basis(one.down.T), basis(other.down.T)), (basis(one.up), basis(other.up))
    return (
        *sizes, apart, cosine, overlap(*ins), overlap(*outs),
        crosstalk(one, ins[1]), crosstalk(other, ins[0]),
    )  # fmt: skip


def basis(columns: Tensor) -> Tensor:
    """An orthonormal basis of what columns span, `(size, dimensions)`."""
    import torch

    u, values, _ = torch.linalg.svd(columns, full_matrices=False)
    return u[:, : int((values > ROUNDING * values[:1].clamp(min=1e-300)).sum())]


def overlap(one: Tensor, other: Tensor) -> float:
    """Mean squared cosine of the principal angles of two spaces given by bases."""
    smaller = min(one.shape[1], other.shape[1])
    return float((one.T @ other).square().sum()) / smaller if smaller else 0.0


def crosstalk(change: Factors, inputs: Tensor) -> float:
    """Share of a change's norm that acts on a space of inputs, given by a basis `(in, dimensions)`."""
    from dataclasses import replace

    whole = norm(replace(change, bias=None))
    return norm(replace(change, down=change.down @ inputs, bias=None)) / whole if whole else 0.0


def _root(rows: list[tuple[str, tuple[float, ...]]], column: int) -> float:
    return sum(row[column] ** 2 for _, row in rows) ** 0.5


def _share(rows: list[tuple[str, tuple[float, ...]]], column: int, size: int) -> float:
    """A share over all layers, each weighing as its change does."""
    whole = _root(rows, size)
    return sum((row[column] * row[size]) ** 2 for _, row in rows) ** 0.5 / whole if whole else 0.0


TOOL = Tool("diff", "Compare", "Two adapters, layer by layer.", "arXiv:2312.02432", DiffOptions, 2, 2, "nothing", _work)
