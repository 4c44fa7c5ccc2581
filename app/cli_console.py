"""What the command line writes: a progress line for people, or JSON lines for machines."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer

from ..pipelines.errors import IntarsiaError, printable
from ..pipelines.events import CancelToken, Event, Progress
from . import present
from .settings import Home

PLAIN_EVERY = 5.0  # seconds between two progress lines where nobody watches a terminal
LINE_EVERY = 0.1


class Console:
    """Shows the events of one job.

    Progress goes to stderr and results to stdout, so that results can be piped.

    Args:
        machine: Write every event as one line of JSON to stdout and nothing else.
    """

    def __init__(self, machine: bool) -> None:
        self.machine = machine
        self._terminal = sys.stderr.isatty() and not machine
        self._pace = present.Pace()
        self._written = 0.0
        self._open = False  # an unfinished progress line stands on the terminal

    def show(self, event: Event) -> None:
        if self.machine:
            typer.echo(event.model_dump_json())
        elif isinstance(event, Progress):
            self._pace.update(event)
            self._progress(event)
        elif text := present.status(event):
            self.note(text)

    def note(self, text: str) -> None:
        """Write one line to stderr."""
        if not self.machine:
            self._clear()
            typer.echo(text, err=True)

    def result(self, value: dict[str, Any], text: str) -> None:
        """Write the outcome: an object for machines, a text for people."""
        self._clear()
        typer.echo(json.dumps({"type": "result", **value}) if self.machine else text)

    def _progress(self, event: Progress) -> None:
        last = event.step >= event.total
        if not last and time.monotonic() - self._written < (LINE_EVERY if self._terminal else PLAIN_EVERY):
            return
        self._written = time.monotonic()
        text = ", ".join(part for part in (present.status(event), self._pace.text()) if part)
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            typer.echo(f"\r\x1b[K{text[:width]}", err=True, nl=False)
            self._open = True
        else:
            typer.echo(text, err=True)

    def _clear(self) -> None:
        if self._open:
            typer.echo("", err=True)
            self._open = False


def complain(shown: present.Shown) -> None:
    """Write an error to stderr: one line, and what to do about it."""
    typer.echo(f"error: {shown.message}", err=True)
    if shown.hint:
        typer.echo(f"  {shown.hint}", err=True)


@contextmanager
def guarded(console: Console) -> Generator[None]:
    """Turn a person's errors into words and exit code 2; a bug keeps its traceback and exit code 1."""
    try:
        yield
    except IntarsiaError as error:
        shown = present.show_error(error)
    except (sqlite3.Error, OSError) as error:
        shown = present.show_error(present.storage_error(error, Home.default().root))
    else:
        return
    complain(shown)
    if console.machine:
        failure = {"state": "failed", "code": shown.code, "message": shown.message, "hint": shown.hint}
        console.result(failure, "")
    raise typer.Exit(shown.exit_code)


@contextmanager
def stopping(token: CancelToken, console: Console) -> Generator[None]:
    """Let the first Ctrl-C (or a polite kill) stop the work, and the second leave at once."""

    def ask(number: int, frame: FrameType | None) -> None:
        if token.cancelled:
            raise KeyboardInterrupt
        token.cancel()
        console.note("Stopping; press Ctrl-C again to leave at once.")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def table(rows: list[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """Set rows in columns."""
    rows = [tuple(printable(cell) for cell in row) for row in rows]
    widths = [max(len(row[index]) for row in [header, *rows]) for index in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    return "\n".join(lines)
