"""The command line: `intarsia` opens the page, its sub-commands do the same work without it."""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import Annotated

import typer

from ..pipelines.errors import InputError
from . import present
from .cli_compose import add_compose
from .cli_console import Console, complain, guarded
from .cli_corpus import add_corpus
from .cli_evaluate import add_evaluate
from .cli_library import add_adapters
from .cli_lists import add_models, doctor
from .cli_work import add_generate, add_train
from .studio import Studio

Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[
    str | None,  # a number is read by `port_number`, which refuses in plain words
    typer.Option(
        help="Port to listen on; 7860 or the next free one if not given.", show_default=False, metavar="INTEGER"
    ),
]
NoBrowser = Annotated[bool, typer.Option("--no-browser", help="Do not open a browser.")]

# click's own base of all usage errors; typer exports only this leaf of it
UsageError: type[Exception] = typer.BadParameter.__mro__[2]

LAST_PORT = 65_535

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
        chosen = port_number(port)
    with guarded(Console(False)), Studio().start() as studio:  # the worker loads while the page does
        from .ui.serve import launch

        for number in (signal.SIGINT, signal.SIGTERM):  # a polite kill ends the page as Ctrl-C does
            signal.signal(number, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            launch(studio, host, chosen, not no_browser, announce)


def port_number(text: str | None) -> int | None:
    """Read a port.

    Raises:
        InputError: It is no number that a port can have.
    """
    if text is None or (text.isascii() and text.isdecimal() and 1 <= int(text) <= LAST_PORT):
        return None if text is None else int(text)
    raise InputError(
        f"Port {text} does not exist.", f"Give a number from 1 to {LAST_PORT} with --port, or leave it out."
    )


def announce(address: str) -> None:
    typer.echo(f"Intarsia is open at {address}\nPress Ctrl-C to close it; a running job is finished first.")


add_generate(app)
add_compose(app)
add_train(app)
add_evaluate(app)
add_adapters(app)
add_models(app)
add_corpus(app)
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
