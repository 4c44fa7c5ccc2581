"""One schema for form, flags, file, API and picture metadata: frozen pydantic models made of `option()` fields.

A field made with `option()` carries everything a form or a flag needs: default, label, explanation, bounds, unit.
Unknown keys are errors. Imports nothing heavy: the page and `--help` read these classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Self, TypeVar, Union, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticUndefined

from .errors import InputError

T = TypeVar("T")
WRONG_TYPE = ("_type", "_parsing", "_from_float", "finite_number")  # how pydantic's names for a wrong type end


def option(
    default: T,
    *,
    label: str,
    help: str = "",
    low: float | None = None,
    high: float | None = None,
    multiple_of: int | None = None,
    unit: str = "",
) -> T:
    """Declare one field of an `Options` class.

    Args:
        default: Value used when nothing is given; `...` makes the field required.
        label: Short name shown beside the control.
        help: One sentence for tooltips and `--help`.
        low: Smallest value allowed; for text, the smallest length.
        high: Largest value allowed; for text, the largest length.
        multiple_of: The value must be a multiple of this.
        unit: Unit shown beside the control, such as "steps" or "pixels".
    """
    text = isinstance(default, str)
    bounds: dict[str, Any] = (
        {"min_length": low, "max_length": high} if text else {"ge": low, "le": high, "multiple_of": multiple_of}
    )
    used = {key: value for key, value in bounds.items() if value is not None}
    extra: dict[str, Any] = {"unit": unit, "low": low, "high": high, "multiple_of": multiple_of}
    return cast(T, Field(default=default, title=label, description=help, json_schema_extra=extra, **used))


class Options(BaseModel):
    """Base of every request and every method's or recipe's options: frozen, strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Validate a mapping, as from a form, a file or the API.

        Raises:
            InputError: Naming the first wrong field, its value and what is allowed.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise explain(error, cls) from None

    def to_json(self) -> str:
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote; same errors as `parse`."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise explain(error, cls) from None


def explain(error: ValidationError, cls: type[BaseModel]) -> InputError:
    """Turn pydantic's report into one sentence about its first entry, and a hint that says what would do."""
    first = error.errors()[0]
    kind, place, value = first["type"], first["loc"], first.get("input")
    if kind in ("json_invalid", "json_type"):
        return InputError("The settings are no JSON that can be read.", "Copy them again from where they came.")
    if not place:  # what a validator of the whole says is a sentence
        reason = _lowered(first["msg"])
        return InputError(f"{reason[:1].upper()}{reason[1:]}.")
    owner, field = _owner(cls, place)
    if kind == "extra_forbidden":
        known = ", ".join(owner.model_fields)
        return InputError(f"There is no setting called {place[-1]}.", f"The settings are: {known}.")
    info = next((info for info in describe(owner) if info.name == field), None)
    if info is None:
        where = ".".join(str(part) for part in place) or cls.__name__
        return InputError(f"{where} cannot be {_shown(value)}: {_lowered(first['msg'])}.")
    return _refused(info, _called(info, place), kind, value, _lowered(first["msg"]))


def _refused(info: OptionInfo, name: str, kind: str, value: object, reason: str) -> InputError:
    """Say what is wrong with the value of one option."""
    if kind == "missing":
        return InputError(f"{name} is missing.", info.help or "Give it.")
    if kind == "string_too_long" and isinstance(value, str) and info.high is not None:
        most = int(info.high)
        return InputError(
            f"{name} is too long: it has {len(value):,} characters, at most {most:,} are allowed.",
            f"Shorten it by {len(value) - most:,} characters.",
        )
    if kind == "string_too_short" and isinstance(value, str) and info.low is not None:
        if not value:
            return InputError(f"{name} is empty.", info.help or "Fill it in.")
        least = int(info.low)
        return InputError(f"{name} is too short: it has {len(value)} characters, at least {least} are needed.")
    if kind == "multiple_of" and info.multiple_of:
        step = info.multiple_of
        below = int(float(str(value)) // step * step)
        near = [number for number in (below, below + step) if _within(number, info)]
        hint = f"Try {' or '.join(str(number) for number in near)}."
        return InputError(f"{name} cannot be {_shown(value)}: it must be a multiple of {step}.", hint)
    if kind == "literal_error":
        return InputError(f"{name} cannot be {_shown(value)}.", f"Choose one of {', '.join(info.choices)}.")
    if value is None:
        return InputError(f"{name} is empty.", _allowed(info) or info.help or "Fill it in.")
    words = {
        "greater_than_equal": f"the least is {plain_number(info.low)}",
        "less_than_equal": f"the most is {plain_number(info.high)}",
        "bool": "it must be true or false",
        "int": "it must be a whole number",
        "float": "it must be a number",
        "text": "it must be text",
    }
    wanted = words.get(kind) or (words.get(info.kind) if kind.endswith(WRONG_TYPE) else None) or reason
    return InputError(f"{name} cannot be {_shown(value)}: {wanted}.", _allowed(info))


def _owner(cls: type[BaseModel], place: tuple[int | str, ...]) -> tuple[type[BaseModel], str]:
    """Find the class that holds the value at a place in a report, and the name it has there."""
    name = ""
    for position, part in enumerate(place):
        if isinstance(part, int) or part not in cls.model_fields:
            continue
        name = part
        inner = _models_in(cls.model_fields[part].annotation)
        if inner and position + 1 < len(place):
            cls, name = inner[0], ""
    return cls, name


def _models_in(annotation: Any) -> list[type[BaseModel]]:  # noqa: ANN401 - a type expression has no narrower type
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models_in(part)]


def _called(info: OptionInfo, place: tuple[int | str, ...]) -> str:
    """Name an option as the form does; as flags and files do too where that is another word."""
    name = info.label
    if name.lower().replace(" ", "_") != info.name:
        name += f" ({info.name})"
    index = next((part for part in place if isinstance(part, int)), None)
    return name if index is None else f"{name} of {place[0]} entry {index + 1}"


def _allowed(info: OptionInfo) -> str:
    """Say what numbers an option takes; "" if any."""
    if info.kind not in ("int", "float"):
        return ""
    low, high = plain_number(info.low), plain_number(info.high)
    if low and high:
        return f"Choose a number from {low} to {high}."
    return f"Choose {low} or more." if low else f"Choose {high} or less." if high else ""


def _within(number: float, info: OptionInfo) -> bool:
    return (info.low is None or number >= info.low) and (info.high is None or number <= info.high)


def plain_number(value: float | None) -> str:
    """Write a bound without a needless point: 1, 0.5, 1e-08; "" for None."""
    if value is None:
        return ""
    return str(int(value)) if value == int(value) else f"{value:g}"


def _shown(value: object) -> str:
    """Write a value as the person did: text in quotes unless it is a number, long ones cut."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _lowered(text: str) -> str:
    text = text.removeprefix("Value error, ")  # how pydantic begins what a validator of ours says
    return text[:1].lower() + text[1:]


@dataclass(frozen=True)
class OptionInfo:
    """What a form, a flag or a table needs to know of one option."""

    name: str
    kind: Literal["bool", "int", "float", "text", "choice", "other"]
    default: Any
    required: bool
    label: str
    help: str
    low: float | None
    high: float | None
    multiple_of: int | None
    unit: str
    choices: tuple[str, ...] = ()
    optional: bool = False  # None is allowed


def describe(cls: type[BaseModel]) -> tuple[OptionInfo, ...]:
    """List the options of a class, in the order they were declared."""
    found: list[OptionInfo] = []
    for name, field in cls.model_fields.items():
        kind, choices, optional = _kind(field.annotation)
        extra: dict[str, Any] = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        found.append(
            OptionInfo(
                name=name,
                kind=kind,
                default=None if field.default is PydanticUndefined else field.default,
                required=field.is_required(),
                label=field.title or name.replace("_", " ").capitalize(),
                help=field.description or "",
                low=extra.get("low"),
                high=extra.get("high"),
                multiple_of=extra.get("multiple_of"),
                unit=extra.get("unit", ""),
                choices=choices,
                optional=optional,
            )
        )
    return tuple(found)


def _kind(
    annotation: Any,  # noqa: ANN401 - a type expression has no narrower type
) -> tuple[Literal["bool", "int", "float", "text", "choice", "other"], tuple[str, ...], bool]:
    optional = False
    if get_origin(annotation) in (Union, UnionType):
        inner = [part for part in get_args(annotation) if part is not type(None)]
        optional = len(inner) < len(get_args(annotation))
        annotation = inner[0] if len(inner) == 1 else None
    if get_origin(annotation) is Literal:
        return "choice", tuple(str(value) for value in get_args(annotation)), optional
    names: dict[Any, Literal["bool", "int", "float", "text"]] = {bool: "bool", int: "int", float: "float", str: "text"}
    return names.get(annotation, "other"), (), optional
