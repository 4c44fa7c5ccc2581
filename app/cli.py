"""The command line: `intarsia` opens the page, its sub-commands do the same work without it."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import threading
from typing import Annotated

import typer

from ..pipelines.errors import InputError
from . import present
from .cli_console import Console, complain, guarded
from .cli_lists import add_adapters, add_models, doctor
from .cli_work import add_generate, add_train
from .studio import Studio

FIRST_PORT, PORTS = 7860, 100

Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[
    int | None, typer.Option(help="Port to listen on; 7860 or the next free one if not given.", show_default=False)
]
NoBrowser = Annotated[bool, typer.Option("--no-browser", help="Do not open a browser.")]

# click's own base of all usage errors; typer exports only this leaf of it
UsageError: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="intarsia",
    help="A studio for pictures made with adapters: train, drop in, combine. Without a command, the page opens.",
    rich_markup_mode=None,  # plain help is printed in half the time
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback(invoke_without_command=True)
def start(context: typer.Context, host: Host = "127.0.0.1", port: Port = None, no_browser: NoBrowser = False) -> None:
    if context.invoked_subcommand is None:
        ui(host, port, no_browser)


@app.command()
def ui(host: Host = "127.0.0.1", port: Port = None, no_browser: NoBrowser = False) -> None:
    """Open the page."""
    with guarded(Console(False)):
        port = free_port(host, port)
        with Studio().start() as studio:  # the worker loads while the page does
            from .ui.page import launch

            address = launch(studio, host, port, open_browser=not no_browser and has_display())
            typer.echo(f"Intarsia is open at {address}\nPress Ctrl-C to close it; a running job is finished first.")
            wait_for_end()


def free_port(host: str, port: int | None) -> int:
    """Find the port to listen on: the one asked for, or from 7860 on the first that is free.

    Raises:
        InputError: The port asked for is taken, or the host is not this computer's.
    """
    for candidate in (port,) if port is not None else range(FIRST_PORT, FIRST_PORT + PORTS):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a page closed a minute ago blocks it
            try:
                probe.bind((host, candidate))
                return candidate
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    hint = "Use 127.0.0.1 for this computer alone, 0.0.0.0 for the network, and a port above 1023."
                    raise InputError(f"Cannot listen on {host}, port {candidate}: {error.strerror}.", hint) from None
    if port is not None:
        raise InputError(f"Port {port} is taken.", "Choose another with --port, or leave it out to get a free one.")
    raise InputError(f"All ports from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} are taken.", "Choose one with --port.")


def has_display() -> bool:
    """Say whether a browser could be shown."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def wait_for_end() -> None:
    """Sleep until Ctrl-C or a polite kill."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()


add_generate(app)
add_train(app)
add_adapters(app)
add_models(app)
app.command("doctor")(doctor)


def main() -> None:
    """Run the command line and leave with its exit code."""
    try:
        code = app(standalone_mode=False)
    except UsageError as error:
        hint = "See what there is with --help."
        complain(present.Shown("input", getattr(error, "format_message", error.__str__)(), hint, present.EXIT_PERSON))
        code = present.EXIT_PERSON
    except (KeyboardInterrupt, typer.Abort):
        code = present.EXIT_STOPPED
    sys.exit(code or present.EXIT_DONE)
