"""How much an adapter changes, layer by layer: kind, rank, alpha, the norm of the change and how its rank is used.

Low-rank factors are never multiplied out: two QR decompositions leave a matrix of the rank's size, whose singular
values are those of the change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from .adapter_types import AdapterFile, Layer
from .block_groups import BlockGroup, block_groups
from .dora import Decomposed
from .headers import read_header
from .kinds.difference import Difference
from .kinds.ia3 import Rescaled
from .kinds.loha import Hadamard
from .kinds.lokr import Kronecker
from .kinds.lora import LowRank
from .rows import Rows

if TYPE_CHECKING:
    from torch import Tensor

    from .kind import Shape

TITLES: Mapping[type, str] = {
    LowRank: "LoRA",
    Hadamard: "LoHa",
    Kronecker: "LoKr",
    Difference: "full difference",
    Rescaled: "(IA)\N{SUPERSCRIPT THREE}",
}


@dataclass(frozen=True)
class LayerMeasure:
    """One layer of an adapter in numbers.

    Args:
        path: Canonical.
        kind: For people, such as "LoRA" or "LoHa with DoRA".
        rank: Of the factors, 0 if there are none.
        alpha: As in the file; None where the kind has none.
        dtypes: What its tensors are stored as.
        norm: Frobenius norm of the change of the weight, alpha included; of a DoRA that of what turns the directions.
            None if it follows from the model's own weight alone.
        strongest: Largest singular value of the change; None where the change is not low-rank.
        effective_rank: exp of the entropy of the singular values' shares: how many directions really count; None as
            above.
        needs_weight: The whole change depends on the weight it sits on, which is not in the file.
    """

    path: str
    kind: str
    rank: int
    alpha: float | None
    norm: float | None
    strongest: float | None = None
    effective_rank: float | None = None
    needs_weight: bool = False
    dtypes: tuple[str, ...] = ()


@dataclass(frozen=True)
class GroupMeasure:
    """A part of the model in numbers.

    Args:
        group: Which part.
        norm: Root of the sum of the squared norms of its layers.
        effective_rank: Mean over its low-rank layers; None if it has none.
        unmeasured: Layers whose norm follows from the model's own weight alone.
    """

    group: BlockGroup
    norm: float
    effective_rank: float | None
    unmeasured: int


@dataclass(frozen=True)
class FileMeasure:
    """All layers of an adapter file, and the parts of the model they lie in."""

    layers: tuple[LayerMeasure, ...]
    groups: tuple[GroupMeasure, ...]

    @property
    def needs_weight(self) -> int:
        """Layers whose whole change depends on the model's own weights."""
        return sum(layer.needs_weight for layer in self.layers)


def measure_file(path: Path) -> FileMeasure:
    """Read an adapter and measure it.

    Raises:
        AdapterError: It cannot be read without the model it was made for, or not at all.
    """
    from .adapter_file import read_adapter

    adapter = read_adapter(path)
    stored = stored_types(path)
    layers = tuple(replace(layer, dtypes=stored.get(layer.path, ())) for layer in measure(adapter))
    return FileMeasure(layers, by_group(layers, block_groups(adapter.layers, adapter.family)))


def measure(adapter: AdapterFile) -> tuple[LayerMeasure, ...]:
    """Measure every layer of an adapter."""
    return tuple(measure_layer(path, layer) for path, layer in adapter.layers.items())


def measure_layer(path: str, layer: Layer) -> LayerMeasure:
    """Measure one layer."""
    if isinstance(layer, Decomposed):
        inner = measure_layer(path, layer.inner)
        return replace(inner, kind=f"{inner.kind} with DoRA", needs_weight=True)
    if isinstance(layer, Rescaled):
        return LayerMeasure(path, TITLES[Rescaled], 0, None, None, needs_weight=True)
    if isinstance(layer, LowRank):
        values = singular_values(layer)
        norm, (strongest, effective) = float(values.norm()), _use_of_rank(values)
        return LayerMeasure(path, TITLES[LowRank], layer.rank, layer.alpha, norm, strongest, effective)
    if isinstance(layer, Rows) and isinstance(layer.inner, Rescaled):
        return measure_layer(path, layer.inner)
    made = _dense(layer)
    inside = layer.inner if isinstance(layer, Rows) else layer
    alpha = inside.alpha if isinstance(inside, Hadamard) else None
    if isinstance(inside, Kronecker) and inside.rank:
        alpha = inside.scale * inside.rank
    norm = 0.0 if made is None else float(made.double().norm())
    return LayerMeasure(path, TITLES[type(inside)], layer.rank, alpha, norm)


def singular_values(layer: LowRank) -> Tensor:
    """The singular values of a low-rank change, largest first, in float64: `(rank,)` or fewer."""
    import torch

    up, down = layer.up.double().flatten(1), layer.down.double().flatten(1)
    left, right = (torch.linalg.qr(factor, mode="r")[1] for factor in (up, down.T))
    return abs(layer.scale) * torch.linalg.svdvals(left @ right.T)


def _use_of_rank(values: Tensor) -> tuple[float, float]:
    """Largest singular value and effective rank (Roy and Vetterli, 2007); 0 and 0 for a change that is zero."""
    total = float(values.sum())
    if total == 0:
        return 0.0, 0.0
    shares = values / total
    return float(values.max()), float((-(shares * shares.clamp(min=1e-300).log()).sum()).exp())


def _dense(layer: Layer) -> Tensor | None:
    """The change of a layer whose change does not depend on the weight."""
    import torch

    return layer.change(torch.zeros(_shape(layer))).weight


def _shape(layer: Layer) -> Shape:
    """Shape of the change, as its own tensors give it."""
    if isinstance(layer, Rows):
        return (sum(last - first for first, last in layer.spans), *layer.whole[1:])
    if isinstance(layer, Hadamard):
        if layer.t1 is None:
            return layer.a1.shape[0], layer.b1.shape[1]
        return layer.a1.shape[1], layer.b1.shape[1], *layer.t1.shape[2:]
    if isinstance(layer, Kronecker):
        (a, c), (b, d, *kernel) = layer.first.shape, layer.second.shape
        return a * b, c * d, *kernel
    assert isinstance(layer, Difference), type(layer)
    return (0,) if layer.weight is None else tuple(layer.weight.shape)


def by_group(layers: Sequence[LayerMeasure], groups: Iterable[BlockGroup]) -> tuple[GroupMeasure, ...]:
    """Add layers up by the part of the model they lie in."""
    return tuple(_group(group, [layer for layer in layers if group.holds(layer.path)]) for group in groups)


def _group(group: BlockGroup, layers: Sequence[LayerMeasure]) -> GroupMeasure:
    norms = [layer.norm for layer in layers if layer.norm is not None]
    used = [layer.effective_rank for layer in layers if layer.effective_rank is not None]
    mean = sum(used) / len(used) if used else None
    return GroupMeasure(group, sqrt(sum(norm**2 for norm in norms)), mean, len(layers) - len(norms))


def stored_types(path: Path) -> dict[str, tuple[str, ...]]:
    """What each layer's tensors are stored as."""
    from .identify import choose_family, yardstick
    from .layers import collect

    header = read_header(path)
    found = collect(header, yardstick(choose_family(header, None).yardstick), plain=True)
    return {
        name: tuple(sorted({header.tensors[tensor].dtype for part, tensor in names.parts.items() if part != "alpha"}))
        for name, names in found.layers.items()
    }
