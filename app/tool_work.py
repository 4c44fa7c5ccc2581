"""Does a tool's work: reads its adapters, measures, and only then writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..pipelines.adapter_file import read_adapter
from ..pipelines.atomic import replacing
from ..pipelines.errors import InputError
from ..pipelines.events import Artifact, CancelToken, Event, Notice, Stage
from ..pipelines.identify import inspect, yardstick
from ..pipelines.model_weights import places
from ..pipelines.requests import ToolRequest
from ..pipelines.sources import resolve, unet_shapes
from ..pipelines.tool import Inputs, Made, Source, tools

if TYPE_CHECKING:
    from torch import Tensor

    from ..pipelines.kind import Shape
    from .shelf import Shelf


def work(request: ToolRequest, shelf: Shelf, folder: Path, token: CancelToken) -> Iterator[Event]:
    """Use a tool; its figures are a report before its result is an adapter or a model.

    An adapter that is to enter the library is left in `folder` for the caller to take.

    Raises:
        IntarsiaError: An adapter or the model cannot be used, or the target is taken.
    """
    tool = tools()[request.tool]
    options = tool.options.parse(request.options)
    target = _target(request, folder)
    yield Stage(name="read", detail=", ".join(use.adapter for use in request.adapters))
    made = yield from tool.work(_inputs(request, options.model, shelf, token), options)
    yield Artifact(kind="report", path=str(_report(made, folder / "figures.json")), label=tool.title)
    for text in made.told:
        yield Notice(text=text)
    token.check()
    if request.dry or made.save is None:
        return
    yield Stage(name="write", detail=target.name)
    made.save(target)
    assert tool.makes != "nothing"
    yield Artifact(kind=tool.makes, path=str(target), label=request.name or target.stem)


def _target(request: ToolRequest, folder: Path) -> Path:
    if not request.out:
        return folder / f"{request.name}.safetensors"
    target = Path(request.out).expanduser().absolute()
    if not target.parent.is_dir():
        raise InputError(f"There is no folder {target.parent} to write to.", "Make it first.")
    if target.exists():
        raise InputError(f"{target} is already there.", "Choose another name.")
    return target


def _inputs(request: ToolRequest, model: str, shelf: Shelf, token: CancelToken) -> Inputs:
    source = resolve(model) if model else None
    shapes: dict[str, Shape] = dict(unet_shapes(source)) if source and request.adapters else {}
    sources: list[Source] = []
    for use in request.adapters:
        entry = shelf.find(use.adapter)
        if source is None:
            shapes |= yardstick(inspect(entry.path).yardstick).shapes
        sources.append(Source(entry.name, read_adapter(entry.path, shapes if source else None), use.weight))

    @cache
    def table():  # noqa: ANN202 - places by path
        assert source is not None
        return places(source)

    def weight_of(path: str) -> Tensor:
        return table()[path].read()

    return Inputs(tuple(sources), shapes, weight_of if source else None, request.seed, token)


def _report(made: Made, path: Path) -> Path:
    """Write the figures as JSON."""
    rows = [[name, *numbers] for name, numbers in made.rows]
    report = {"columns": ["layer", *made.columns], "rows": rows, "told": made.told}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(report), "utf-8")
    return path
