"""The commands that list and look, `intarsia models ...` and `intarsia doctor`; and how a list is written."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import present
from .cli_console import Console, guarded, table
from .studio import Studio

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Machine = Annotated[bool, typer.Option("--json", help="Write JSON.")]
MARKS = {"ok": "ok  ", "warning": "warn", "bad": "BAD "}


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
        write(machine, [record(info) for info in models], table(rows, ("name", "family", "kind", "size")))


def _model(
    name: Annotated[str, typer.Argument(help="mini, a folder, a .safetensors checkpoint or a hub id.")] = "mini",
    machine: Machine = False,
) -> None:
    with guarded(Console(machine)), Studio() as studio:
        values = record(studio.model(name))
        write(machine, values, table([(key, cell(value)) for key, value in values.items()], ("what", "value")))


def doctor(machine: Machine = False) -> None:
    """Look at everything the studio needs, and say what to do where something is missing."""
    with guarded(Console(machine)), Studio() as studio:
        checks = studio.doctor()
        lines = [
            f"{MARKS[check.state]}  {check.name}: {check.text}" + (f"\n      {check.hint}" if check.hint else "")
            for check in checks
        ]
        write(machine, [record(check) for check in checks], "\n".join(lines))
        if any(check.state == "bad" for check in checks):
            raise typer.Exit(present.EXIT_PERSON)


def record(value: DataclassInstance) -> dict[str, Any]:
    """Make a dataclass ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(value), default=_plain))


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def write(machine: bool, value: object, text: str) -> None:
    """Write a result to stdout: JSON for machines, a text for people."""
    typer.echo(json.dumps(value) if machine else text)


def cell(value: object) -> str:
    """Write a value as a cell of a table."""
    return value if isinstance(value, str) else json.dumps(value)
