"""The commands that measure: `intarsia evaluate BENCH`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from ..pipelines.events import Artifact, CancelToken, Event, Stopped
from ..pipelines.options import describe
from . import present
from .cli_console import Console, guarded, stopping, table
from .cli_flags import command, flag, flags, given_values
from .studio import Studio

MACHINE = flag("machine", bool, "Write events and the result as lines of JSON.", "--json")
OUT = flag(
    "out",
    Path,
    "Folder for records, pictures and report; a stopped run goes on from it. One under the studio's home if not given.",
    shown="FOLDER",
)


def add_evaluate(app: typer.Typer) -> None:
    """Register `evaluate`, with one sub-command per bench that is found."""
    group = typer.Typer(
        help="Measure a model against pictures whose right answers are known.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    app.add_typer(group, name="evaluate")
    for bench in Studio.benches().values():
        _add_bench(group, bench.name, bench.title, bench.options)


def _add_bench(group: typer.Typer, name: str, title: str, options: type[Any]) -> None:
    own = describe(options)

    @command(group, name, title, [*flags(own), OUT, MACHINE])
    def evaluate(given: dict[str, Any]) -> None:
        console = Console(bool(given["machine"]))
        token = CancelToken()
        page: Path | None = None
        final: Event | None = None
        with guarded(console), Studio() as studio, stopping(token, console):
            for event in studio.evaluate(name, given_values(own, given), given["out"], token):
                console.show(event)
                final = event
                if isinstance(event, Artifact) and event.kind == "report":
                    page = Path(event.path)
        assert final is not None
        _end(console, final, page)


def _end(console: Console, final: Event, page: Path | None) -> None:
    """Write what was found and leave with the exit code."""
    if page is not None:
        found = json.loads(page.with_name("summary.json").read_text("utf-8"))
        value = {"state": "done", "report": str(page), "figures": found["figures"]}
        texts = [_table(one) for one in found["tables"]]
        console.result(value, "\n\n".join([*texts, *found["notes"], f"Report: {page}"]))
    elif isinstance(final, Stopped):
        resumable = final.resumable
        text = "Give the same command again to go on." if resumable else "Nothing was measured yet."
        console.result({"state": "stopped", "resumable": resumable}, text)
    code = present.exit_code(final)
    if code:
        raise typer.Exit(code)


def _table(found: dict[str, Any]) -> str:
    rows = [tuple(_cell(cell) for cell in row) for row in found["rows"]]
    lines = [found["title"], table(rows, tuple(found["columns"])), *([found["note"]] if found["note"] else [])]
    return "\n".join(lines)


def _cell(value: object) -> str:
    """Write a cell; what could not be computed is a dash."""
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
