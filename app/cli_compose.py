"""The command `intarsia compose LAYOUT`: draw a layout file with one method, several or all of them."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from ..composition.layout import ComposeRequest, MethodUse, read_layout
from ..pipelines.atomic import replacing
from ..pipelines.errors import InputError
from ..pipelines.options import describe
from .cli_console import Console, guarded, table
from .cli_flags import command, flag, flags, given_values
from .cli_work import MACHINE, end, work
from .studio import Studio

ALL = "all"
KEPT = ("model", "prompt", "negative", "steps", "guidance", "width", "height", "scheduler", "together", "score")
OWN = tuple(info for info in describe(ComposeRequest) if info.name in KEPT)


def add_compose(app: typer.Typer) -> None:
    """Register `compose`."""
    told = typer.Argument(help="A layout file: YAML or JSON.", metavar="LAYOUT", show_default=False)
    argument = Annotated[Path, told]
    parameters = [
        inspect.Parameter("layout", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=argument),
        flag("method", str, f"How to compose, with commas; {ALL} for every method that can. Empty: the layout's.",
             shown="NAMES"),
        flag("seeds", str, "With commas. Empty: the layout's.", shown="NUMBERS"),
        flag("out", Path, "Folder for the pictures and comparison.json.", shown="FOLDER"),
        *flags(OWN),
        MACHINE,
    ]  # fmt: skip

    @command(app, "compose", "Compose several concepts in one picture, as a layout file says.", parameters)
    def compose(given: dict[str, Any]) -> None:
        console = Console(bool(given["machine"]))
        with guarded(console), Studio() as studio:
            out = _folder(given["out"])
            request = _asked(studio, given, console)
            job, final, made = work(studio, request, console)
            found = studio.comparison(job.id) or {"rows": []}
            if out is not None:
                _copy(found, out)
            rows = [{key: value for key, value in row.items() if key != "facts"} for row in found["rows"]]
            text = _told(rows) if made.get("picture") else ""
            end(console, job, final, {"rows": rows}, text)


def _asked(studio: Studio, given: dict[str, Any], console: Console) -> ComposeRequest:
    """The layout with what the flags change."""
    layout = read_layout(given["layout"])
    values = layout.model_dump() | given_values(OWN, given)
    if given["seeds"]:
        values["seeds"] = [_number(text) for text in given["seeds"].split(",")]
    request = ComposeRequest.parse(values)
    if not given["method"]:
        return request
    options = {use.method: use.options for use in layout.methods}
    if given["method"] != ALL:
        names = [name.strip() for name in given["method"].split(",") if name.strip()]
        return ComposeRequest.parse(values | {"methods": [_use(name, options) for name in names]})
    able: list[MethodUse] = []
    for name in studio.methods():
        one = request.model_copy(update={"methods": (_use(name, options),)})
        try:
            studio.check(one)
        except InputError as error:
            console.note(f"left out: {error.message}")
        else:
            able.append(_use(name, options))
    if not able:
        raise InputError("No method can draw this layout.", "See above why; give the concepts boxes and prompts.")
    return request.model_copy(update={"methods": tuple(able)})


def _use(name: str, options: dict[str, dict[str, Any]]) -> MethodUse:
    return MethodUse(method=name, options=options.get(name, {}))


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{text.strip()!r} is no seed.", "Give whole numbers with commas, such as 1,2,3.") from None


def _folder(out: Path | None) -> Path | None:
    if out is None:
        return None
    if out.exists() and not out.is_dir():
        raise InputError(f"--out cannot be {out}: it is a file.", "Name a folder.")
    out.mkdir(parents=True, exist_ok=True)
    return out.absolute()


def _copy(found: dict[str, Any], out: Path) -> None:
    """Put the pictures and the report into a folder; the report then tells of the copies."""
    import json

    for row in found["rows"]:
        target = out / f"{row['method']}-{row['seed']}.png"
        with replacing(target) as temporary:
            shutil.copyfile(row["picture"], temporary)
        row["picture"] = str(target)
    with replacing(out / "comparison.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1), "utf-8")


def _told(rows: list[dict[str, Any]]) -> str:
    header = ("method", "seed", "seconds", "passes", "present", "identity", "picture")
    lines: list[tuple[str, ...]] = []
    for row in rows:
        scores = row.get("scores")
        present = f"{sum(scores['presence'])} of {len(scores['presence'])}" if scores else "-"
        identity = f"{sum(scores['identity']) / len(scores['identity']):.2f}" if scores else "-"
        cost = (f"{row['seconds']:.1f}", str(row["passes"]))
        lines.append((row["method"], str(row["seed"]), *cost, present, identity, row["picture"]))
    return table(lines, header)
