"""The tools for adapter files: `intarsia adapters merge RULE`, `resize`, `extract`, `slice`, `diff`, `bake`."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..pipelines.events import Artifact, Event
from ..pipelines.options import describe
from ..pipelines.requests import AdapterUse, ToolRequest
from ..pipelines.tool import Tool
from .cli_console import Console, guarded, table
from .cli_flags import command, flag, flags, given_values
from .cli_work import end, work
from .studio import Studio

SEED = tuple(info for info in describe(ToolRequest) if info.name == "seed")


def add_tools(group: typer.Typer) -> None:
    """Register every tool that is found, those that merge under `merge`."""
    merges = typer.Typer(help="Make one adapter of several.", no_args_is_help=True, rich_markup_mode=None)
    group.add_typer(merges, name="merge")
    there = {info.name for info in group.registered_commands}  # convert also reads pickles there
    for tool in Studio.tools().values():
        if tool.name not in there:
            _add(merges if tool.merge else group, tool)


def _add(group: typer.Typer, tool: Tool[Any]) -> None:
    own = describe(tool.options)
    parameters = [
        *([_adapters(tool)] if tool.most else []),
        *flags(own),
        *(flags(SEED) if tool.merge else []),
        *_targets(tool),
        flag("machine", bool, "Write events and the result as lines of JSON.", "--json"),
    ]

    @command(group, tool.name, tool.help, parameters)
    def run(given: dict[str, Any]) -> None:
        console = Console(bool(given["machine"]))
        with guarded(console), Studio() as studio:
            values = given_values(SEED, given) | {
                "tool": tool.name,
                "adapters": [AdapterUse.read(text) for text in given.get("adapters") or ()],
                "options": given_values(own, given),
                "name": given.get("name") or "",
                "out": str(given.get("out") or ""),
                "dry": bool(given.get("dry_run")) or tool.makes == "nothing",
            }
            show = _Figures(console)
            job, final, made = work(studio, ToolRequest.parse(values), console, seen=show)
            results = [item.path for kind in ("adapter", "model") for item in made.get(kind, [])]
            end(console, job, final, {"figures": show.values, "results": results}, "\n".join(results))


def _adapters(tool: Tool[Any]) -> inspect.Parameter:
    """The adapters as what stands behind the command."""
    help = "Library name or file" + (", with :WEIGHT if not 1." if tool.weighted else ".")
    info = typer.Argument(help=help, show_default=False)
    annotation = Annotated[list[str], info]
    return inspect.Parameter("adapters", inspect.Parameter.KEYWORD_ONLY, default=..., annotation=annotation)


def _targets(tool: Tool[Any]) -> list[inspect.Parameter]:
    if tool.makes == "nothing":
        return []
    out = flag("out", Path, "Where to write the result.", shown="PATH")
    dry = flag("dry_run", bool, "Show the error it would introduce and write nothing.", "--dry-run")
    name = flag("name", str, "Name of the result in the library.", shown="TEXT")
    return [out, dry] if tool.makes == "model" else [name, out, dry]


class _Figures:
    """Writes the figures of every layer as soon as they are known, before anything is written."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.values: dict[str, Any] = {}

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Artifact) or event.kind != "report":
            return
        self.values = json.loads(Path(event.path).read_text("utf-8"))
        if not self._console.machine:
            rows = [(row[0], *(f"{number:.4g}" for number in row[1:])) for row in self.values["rows"]]
            typer.echo(table(rows, tuple(self.values["columns"])))
