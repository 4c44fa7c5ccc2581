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
    """Turn pydantic's report into one sentence about its first entry."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or cls.__name__
    if first["type"] == "extra_forbidden":
        known = ", ".join(cls.model_fields)
        return InputError(f"There is no setting called {where}.", f"The settings are: {known}.")
    value = repr(first.get("input"))
    shown = value if len(value) <= 60 else value[:57] + "..."
    reason = first["msg"][0].lower() + first["msg"][1:]
    return InputError(f"{where} cannot be {shown}: {reason}.", "")


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
