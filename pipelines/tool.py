"""What a tool for adapter files is. A tool is one file in `tools/` that defines `TOOL`; no heavy imports at its top.

A tool works first and writes later: what it gives back holds the figures of every layer, so that a person sees the
error it introduces before a file exists.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from .adapter_types import AdapterFile, LowRank, Role
from .errors import AdapterError
from .events import CancelToken, Progress
from .factors import Factors, distance, factors, needs_weight, norm, stored, together
from .kind import Shape, flat, show
from .options import Options, option
from .plugins import discover
from .requests import AdapterUse

if TYPE_CHECKING:
    import torch
    from torch import Tensor

O = TypeVar("O", bound="ToolOptions")  # noqa: E741 - the options of one tool
Parts = Sequence[tuple[float, Factors]]
Makes = Literal["adapter", "model", "nothing"]


class ToolOptions(Options):
    """Options every tool has."""

    model: str = option(
        "", label="Model", help="Whose weights are read; DoRA and (IA)3 need the model they sit on.", high=1000
    )


class FileOptions(ToolOptions):
    """Options of the tools that write an adapter."""

    dtype: Literal["float16", "bfloat16", "float32"] = option(
        "float16", label="Stored as", help="Its rounding is part of the error that is shown."
    )


@dataclass(frozen=True)
class Source:
    """One adapter a tool works on, at a weight."""

    name: str
    adapter: AdapterFile
    weight: float = 1.0


@dataclass(frozen=True)
class Inputs:
    """All a tool may know.

    Args:
        sources: The adapters, in the order given.
        shapes: Canonical path to the shape of the layer's weight.
        weight_of: Reads a layer's weight from the model that was named; None if none was.
        seed: Everything random follows from it.
        token: Carries the wish to stop.
    """

    sources: tuple[Source, ...]
    shapes: Mapping[str, Shape]
    weight_of: Callable[[str], Tensor] | None = None
    seed: int = 0
    token: CancelToken = field(default_factory=CancelToken)

    def factors(self, source: Source, path: str) -> Factors:
        """Take one layer of an adapter as factors.

        Raises:
            AdapterError: It needs the model's weight, and no model was named.
        """
        layer = source.adapter.layers[path]
        weight = self.weight_of(path) if self.weight_of is not None and needs_weight(layer) else None
        try:
            return factors(layer, self.shape(source, path), weight)
        except AdapterError as error:
            raise AdapterError(f"{source.name}, {path}: {error.message}", error.hint) from None

    def shape(self, source: Source, path: str) -> Shape:
        """Shape of the weight a layer sits on."""
        layer = source.adapter.layers[path]
        if isinstance(layer, LowRank):
            return (layer.up.shape[0], *layer.down.shape[1:])
        if path not in self.shapes:
            raise AdapterError(f"{source.name}: {path} is not known.", "Name the model it was made for with --model.")
        return self.shapes[path]


@dataclass(frozen=True)
class Made:
    """What a tool found or made.

    Args:
        columns: Names of the figures.
        rows: Layer by layer, its canonical path and its figures.
        told: In sentences: the sum of it, and what a person should know.
        save: Writes the result; None if there is nothing to write.
        layers: Of the adapter that was made, as they will be stored; none if it was not made layer by layer.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float, ...]], ...]
    told: tuple[str, ...]
    save: Callable[[Path], None] | None = None
    layers: Mapping[str, LowRank] = field(default_factory=dict[str, LowRank])


Work = Generator[Progress, None, Made]


@dataclass(frozen=True)
class Tool(Generic[O]):
    """One thing that can be done with adapter files.

    Args:
        name: As in the command line and in folders.
        title: For people.
        help: One sentence.
        paper: Where it comes from, "" if from nowhere.
        options: Its options' class.
        least: Adapters it wants at least; `most` at most.
        makes: What it writes.
        work: Does it, layer by layer.
        merge: It makes one adapter of several (listed apart).
        weighted: Each adapter's weight counts.
    """

    name: str
    title: str
    help: str
    paper: str
    options: type[O]
    least: int
    most: int
    makes: Makes
    work: Callable[[Inputs, O], Work]
    merge: bool = False
    weighted: bool = False

    def check(self, sources: Sequence[AdapterUse]) -> None:
        """Refuse a wrong number of adapters, and what it would not heed.

        Raises:
            AdapterError: There are too few or too many, or one is given in part or at a weight that does not count.
        """
        if not self.least <= len(sources) <= self.most:
            wanted = f"{self.least}" if self.least == self.most else f"{self.least} or more"
            raise AdapterError(f"{self.title} takes {wanted} adapters; {len(sources)} were given.", self.help)
        for use in sources:
            if use.blocks or (use.first, use.last) != (0, 1):
                raise AdapterError(
                    f"{self.title} takes {use.adapter} as a whole, in all steps.", "Cut a part out with Slice first."
                )
            if use.weight != 1 and not self.weighted:
                raise AdapterError(f"{self.title} knows no weights.", f"Give {use.adapter} without one.")


@cache
def tools() -> dict[str, Tool[Any]]:
    """Every tool by name."""
    from . import tools as folder

    return discover(folder, "TOOL")


COLUMNS = ("norm", "error", "relative", "rank")


def merging(
    name: str, title: str, help: str, paper: str, options: type[O], rule: Callable[[Parts, O, torch.Generator], Factors]
) -> Tool[O]:
    """Make a tool of a rule that makes one change of several, layer by layer.

    The rule gets the changes of those adapters that have the layer, each with its weight; what it makes is held against
    their exact sum.
    """

    def work(inputs: Inputs, options: O) -> Work:
        def combine(path: str, parts: Parts) -> Factors:
            import torch

            rng = torch.Generator().manual_seed(zlib.crc32(f"{inputs.seed} {path}".encode()))  # it reads 32 bits
            return rule(parts, options, rng)

        return (yield from layer_by_layer(inputs, options, name, combine))

    return Tool(name, title, help, paper, options, 2, 64, "adapter", work, merge=True, weighted=True)


def layer_by_layer(inputs: Inputs, options: ToolOptions, tool: str, make: Callable[[str, Parts], Factors]) -> Work:
    """Make an adapter layer by layer, and measure each layer, as it will be stored, against the exact sum."""
    family = one_family(inputs.sources)
    paths = list(dict.fromkeys(path for source in inputs.sources for path in source.adapter.layers))
    layers: dict[str, LowRank] = {}
    rows: list[tuple[str, tuple[float, ...]]] = []
    left: list[str] = []
    for number, path in enumerate(paths, 1):
        inputs.token.check()
        holders = [source for source in inputs.sources if path in source.adapter.layers]
        if len(inputs.shape(holders[0], path)) < 2:
            left.append(path)
            continue
        parts = [(source.weight, inputs.factors(source, path)) for source in holders]
        _one_shape(path, {part.shape: source.name for source, (_, part) in zip(holders, parts, strict=True)})
        wanted = together(parts)
        layers[path], rounded = stored(make(path, parts), dtype_of(options))
        rows.append((path, figures(wanted, rounded)))
        yield Progress(stage=tool, step=number, total=len(paths))
    told = [in_sum(rows)]
    if left:
        told.append(f"{len(left)} norms are left out, which low-rank factors cannot change: first {left[0]}.")
    from .adapter_file import write_adapter

    texts = provenance(inputs, options, tool) | _texts(inputs.sources, family)
    return Made(COLUMNS, tuple(rows), tuple(told), lambda path: write_adapter(path, layers, texts), layers)


def _one_shape(path: str, shapes: Mapping[Shape, str]) -> None:
    if len({flat(shape) for shape in shapes}) > 1:
        (one, name), (other, second), *_ = shapes.items()
        raise AdapterError(
            f"{name} and {second} are for models of another width: {path} is {show(one)} and {show(other)}.",
            "Choose adapters of one model.",
        )


def figures(wanted: Factors, made: Factors) -> tuple[float, ...]:
    """Norm of what was wanted, norm of what is amiss, their ratio, and the rank that was made."""
    size, error = norm(wanted), distance(made, wanted)
    return size, error, error / size if size else 0.0, float(made.rank)


def in_sum(rows: Sequence[tuple[str, tuple[float, ...]]]) -> str:
    """Say the error over all layers: norms add as squares."""
    size = sum(row[0] ** 2 for _, row in rows) ** 0.5
    error = sum(row[1] ** 2 for _, row in rows) ** 0.5
    ranks = [int(row[3]) for _, row in rows]
    span = f"{min(ranks, default=0)} to {max(ranks, default=0)}"
    return f"Error over {len(rows)} layers: {error / size if size else 0.0:.3g} of the change wanted; ranks {span}."


def dtype_of(options: ToolOptions) -> torch.dtype:
    """The type a tool's result is stored in."""
    import torch

    assert isinstance(options, FileOptions)
    return getattr(torch, options.dtype)


def one_family(sources: Sequence[Source]) -> str:
    """The family all adapters are for.

    Raises:
        AdapterError: They are for different ones.
    """
    families = {source.adapter.family: source.name for source in sources}
    if len(families) > 1:
        (one, name), (other, second), *_ = families.items()
        raise AdapterError(f"{name} is for {one}, {second} for {other}.", "Choose adapters of one family.")
    return next(iter(families))


def provenance(inputs: Inputs, options: ToolOptions, tool: str) -> dict[str, str]:
    """Say in the header what was done to what."""
    told = options.model_dump(mode="json")
    told |= {key: bare_name(told[key]) for key in ("model", "tuned") if told.get(key)}
    made = {
        "tool": tool,
        "options": told,
        "seed": inputs.seed,
        "from": [
            {"name": source.name, "sha256": source.adapter.sha256, "weight": source.weight} for source in inputs.sources
        ],
    }
    return {"intarsia.made": json.dumps(made, sort_keys=True)}


def bare_name(model: str) -> str:
    """A model's name without its folders: no paths of a person's disk go into a file."""
    return model.replace("\\", "/").rstrip("/").rpartition("/")[2]


def _texts(sources: Sequence[Source], family: str) -> dict[str, str]:
    """Header texts of a result: trigger words of all, and what all agree on."""
    from .adapter_file import SPEC, card

    adapters = [source.adapter for source in sources]
    triggers = dict.fromkeys(adapter.trigger for adapter in adapters if adapter.trigger)
    roles: set[Role] = {adapter.role for adapter in adapters}
    return card(
        family,
        role=roles.pop() if len(roles) == 1 else "concept",
        base=_agreed(adapters, "intarsia.base"),
        base_hash=_agreed(adapters, "intarsia.base_hash"),
        trigger=", ".join(triggers),
        licence=_agreed(adapters, SPEC + "license"),
    )


def _agreed(adapters: Sequence[AdapterFile], key: str) -> str:
    found = {adapter.metadata.get(key, "") for adapter in adapters}
    return found.pop() if len(found) == 1 else ""
