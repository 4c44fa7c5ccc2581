"""The commands that list and look: `intarsia adapters ...`, `intarsia models ...`, `intarsia doctor`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import present
from .cli_console import Console, guarded, table
from .cli_tools import add_tools
from .studio import Studio

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Machine = Annotated[bool, typer.Option("--json", help="Write JSON.")]
MARKS = {"ok": "ok  ", "warning": "warn", "bad": "BAD "}


def add_adapters(app: typer.Typer) -> None:
    """Register `adapters import|list|inspect|convert|remove`."""
    group = typer.Typer(help="The library of adapters.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name="adapters")
    group.command("import", help="Check adapter files and copy them into the library.")(_import)
    group.command("list", help="List the library.")(_list)
    group.command("inspect", help="Say what an adapter file holds.")(_inspect)
    group.command("convert", help="Write an adapter file in another trainer's spelling.")(_convert)
    group.command("remove", help="Remove an adapter from the library.")(_remove)
    add_tools(group)


def _import(
    files: Annotated[list[Path], typer.Argument(help="One or several .safetensors files.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Name in the library; the file's own if not given.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of an entry of that name.")] = False,
    machine: Machine = False,
) -> None:
    with guarded(Console(machine)), Studio() as studio:
        entries = [studio.import_adapter(file, name, replace) for file in files]
        _write(machine, [record(entry) for entry in entries], _adapters_table(entries))


def _list(machine: Machine = False) -> None:
    with guarded(Console(machine)), Studio() as studio:
        entries = list(studio.shelf.entries())
        text = _adapters_table(entries) if entries else "The library is empty. Add files with: intarsia adapters import"
        _write(machine, [record(entry) for entry in entries], text)


def _inspect(
    file: Annotated[str, typer.Argument(help="A .safetensors file, or a name in the library.", show_default=False)],
    model: Annotated[str, typer.Option(help="Match it with this model's modules.", show_default=False)] = "",
    machine: Machine = False,
) -> None:
    with guarded(Console(machine)), Studio() as studio:
        values = studio.inspect(file, model).as_dict()
        rows = [(key, _cell(value)) for key, value in values.items() if value not in (None, "", [], {})]
        _write(machine, values, table(rows, ("what", "value")))


def _convert(
    file: Annotated[str, typer.Argument(help="A .safetensors file, or a name in the library.", show_default=False)],
    to: Annotated[str, typer.Option(help="kohya or diffusers.")],
    out: Annotated[Path, typer.Option(help="Where to write it.")],
    machine: Machine = False,
) -> None:
    with guarded(Console(machine)), Studio() as studio:
        made = studio.convert_adapter(file, to, out)
        told = "".join(f"\nNot the same: {text}." for text in made.lost) or " Every tensor is the same."
        _write(machine, record(made), f"{made.path}: {made.layers} layers as {made.dialect} names them.{told}")


def _remove(
    name: Annotated[str, typer.Argument(help="Name in the library.", show_default=False)], machine: Machine = False
) -> None:
    with guarded(Console(machine)), Studio() as studio:
        studio.shelf.remove(name)
        _write(machine, {"removed": name}, f"Removed {name}.")


def add_models(app: typer.Typer) -> None:
    """Register `models list|info`."""
    group = typer.Typer(help="The models at hand.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name="models")
    group.command("list", help="List the models at hand.")(_models)
    group.command("info", help="Say what is known of a model.")(_model)


def _models(machine: Machine = False) -> None:
    with guarded(Console(machine)), Studio() as studio:
        models = studio.models()
        rows = [(info.name, info.family, info.kind, present.size(info.size) if info.size else "-") for info in models]
        _write(machine, [record(info) for info in models], table(rows, ("name", "family", "kind", "size")))


def _model(
    name: Annotated[str, typer.Argument(help="mini, a folder, a .safetensors checkpoint or a hub id.")] = "mini",
    machine: Machine = False,
) -> None:
    with guarded(Console(machine)), Studio() as studio:
        values = record(studio.model(name))
        _write(machine, values, table([(key, _cell(value)) for key, value in values.items()], ("what", "value")))


def doctor(machine: Machine = False) -> None:
    """Look at everything the studio needs, and say what to do where something is missing."""
    with guarded(Console(machine)), Studio() as studio:
        checks = studio.doctor()
        lines = [
            f"{MARKS[check.state]}  {check.name}: {check.text}" + (f"\n      {check.hint}" if check.hint else "")
            for check in checks
        ]
        _write(machine, [record(check) for check in checks], "\n".join(lines))
        if any(check.state == "bad" for check in checks):
            raise typer.Exit(present.EXIT_PERSON)


def record(value: DataclassInstance) -> dict[str, Any]:
    """Make a dataclass ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(value), default=_plain))


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _write(machine: bool, value: object, text: str) -> None:
    typer.echo(json.dumps(value) if machine else text)


def _cell(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _adapters_table(entries: list[Any]) -> str:
    rows = [
        (
            entry.name,
            entry.family,
            entry.algorithm,
            str(entry.rank),
            entry.role,
            entry.trigger,
            present.size(entry.size),
        )
        for entry in entries
    ]
    return table(rows, ("name", "family", "algorithm", "rank", "role", "trigger", "size"))
