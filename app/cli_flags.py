"""Command-line flags made from the options classes, so that form, file and command line share one schema."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import typer

from ..pipelines.errors import InputError
from ..pipelines.options import OptionInfo, plain_number

SHOWN = {"int": "INTEGER", "float": "NUMBER"}  # how --help names the value of each kind of option


def flags(options: Iterable[OptionInfo]) -> list[inspect.Parameter]:
    """Make one keyword parameter per option.

    None stands for "not given", so that defaults stay in the schema; numbers stay text, so that the schema reads and
    refuses them in the same words everywhere.
    """
    made: list[inspect.Parameter] = []
    for option in options:
        if option.kind == "bool":
            made.append(flag(option.name, bool, explain(option)))
        else:
            made.append(flag(option.name, str, explain(option), shown=SHOWN.get(option.kind, "TEXT")))
    return made


def flag(
    name: str,
    kind: Any,  # noqa: ANN401 - any type expression
    help: str,
    spelling: str | None = None,
    shown: str | None = None,
) -> inspect.Parameter:
    """Make one optional keyword parameter that typer turns into `--name`."""
    spellings = () if spelling is None else (spelling,)
    made = typer.Option(*spellings, help=help, show_default=False, metavar=shown)
    annotation = Annotated[kind | None, made]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def command(app: typer.Typer, name: str, help: str, parameters: list[inspect.Parameter]) -> Callable[..., None]:
    """Register a function that takes its flags as one dictionary: `@command(app, "x", "...", flags(...))`."""

    def register(work: Callable[[dict[str, Any]], None]) -> None:
        def run(**given: Any) -> None:  # noqa: ANN401 - whatever the flags hold
            work(given)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] - typer reads it
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(name, help=help)(run)

    return register


def explain(option: OptionInfo) -> str:
    """Write a flag's help: what it does, what is allowed, its default."""
    facts: list[str] = []
    if option.choices:
        facts.append(", ".join(option.choices))
    elif option.kind in ("int", "float") and option.low is not None and option.high is not None:
        facts.append(f"{plain_number(option.low)} to {plain_number(option.high)} {option.unit}".strip())
    if option.required:
        facts.append("required")
    elif option.default not in (None, ""):
        facts.append(f"default {option.default}")
    text = option.help or f"{option.label}."
    return f"{text} ({'; '.join(facts)})" if facts else text


def given_values(options: Iterable[OptionInfo], given: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the options that were given; those without a plain type are read as JSON.

    Raises:
        InputError: Such a value is not JSON.
    """
    values: dict[str, Any] = {}
    for option in options:
        value = given.get(option.name)
        if value is None:
            continue
        if option.kind == "other":
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise InputError(f"--{option.name.replace('_', '-')} is not JSON: {error}.") from None
        values[option.name] = value
    return values
