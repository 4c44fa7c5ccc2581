"""The command that makes the pictures Mini learns from: `intarsia corpus build`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from ..pipelines.errors import Cancelled, InputError
from ..pipelines.events import CancelToken
from . import present
from .cli_console import Console, guarded, stopping
from .settings import Home

Out = Annotated[
    Path | None, typer.Option(help="Folder to write; `corpus` in the studio's home if not given.", show_default=False)
]
Workers = Annotated[int | None, typer.Option(help="Processes that render; one per core if none.", show_default=False)]
Machine = Annotated[bool, typer.Option("--json", help="Write events and the result as lines of JSON.")]


def add_corpus(app: typer.Typer) -> None:
    """Register `corpus build`."""
    group = typer.Typer(help="The pictures Mini learns from.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name="corpus")
    group.callback()(lambda: None)  # with one command only, typer would leave its name out
    group.command("build", help="Fetch the icon sets with npm and render them; cut off, it goes on.")(_build)


def _build(out: Out = None, workers: Workers = None, machine: Machine = False) -> None:
    from ..training.corpus import build

    console, token, began = Console(machine), CancelToken(), time.monotonic()
    with guarded(console), stopping(token, console):
        if workers is not None and workers < 1:
            raise InputError(f"{workers} processes cannot render.", "Give --workers 1 or more.")
        folder = (out or Home.default().corpus).absolute()
        try:
            for event in build(folder, workers or os.cpu_count() or 1, token):
                console.show(event)
        except Cancelled:
            console.result({"state": "stopped"}, "Stopped. The same command goes on from here.")
            raise typer.Exit(present.EXIT_STOPPED) from None
        seconds = round(time.monotonic() - began, 1)
        console.result({"state": "done", "folder": str(folder), "seconds": seconds}, str(folder))
