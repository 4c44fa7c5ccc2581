"""Forms made from an `Options` class: one control per option, and one dictionary back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component
from pydantic import BaseModel

from ...pipelines.errors import InputError
from ...pipelines.options import OptionInfo, describe

SLIDER_STEPS = 1000  # a range with more values than this is typed, not dragged


def control(info: OptionInfo, prefix: str = "") -> Component:
    """Make the control of one option: its label, bounds, unit and explanation come from the option itself."""
    label = info.label if not info.unit or info.unit in info.label.lower() else f"{info.label}, {info.unit}"
    shared: dict[str, Any] = {"label": label, "info": info.help or None, "elem_id": f"{prefix}{info.name}"}
    if info.kind == "bool":
        return gr.Checkbox(value=bool(info.default), **shared)
    if info.kind == "choice":
        names = [(choice.replace("_", " "), choice) for choice in info.choices]
        return gr.Dropdown(choices=names, value=info.default, filterable=False, **shared)
    if info.kind in ("int", "float"):
        return _number(info, shared)
    if info.kind == "text":
        return gr.Textbox(value=info.default or "", max_length=None, lines=1, **shared)
    raise TypeError(f"no control for {info.name}: give it a type forms know, or a control of its own")


def _number(info: OptionInfo, shared: dict[str, Any]) -> Component:
    whole = info.kind == "int"
    span = None if info.low is None or info.high is None else info.high - info.low
    step = info.multiple_of or (1 if whole else 0.1 if (span or 0) > 5 else 0.05)
    if not info.optional and span is not None and span >= 1 and span / step <= SLIDER_STEPS:
        return gr.Slider(minimum=info.low or 0, maximum=info.high or 0, step=step, value=info.default, **shared)
    if info.optional:  # a number control cannot be empty, text can: empty means None
        return gr.Textbox(value=_written(info.default), placeholder="auto", max_lines=1, **shared)
    # Bounds are not given to the control: it would clip a typed value silently, the request refuses it aloud.
    return gr.Number(value=info.default, precision=0 if whole else None, **shared)


def _written(value: float | None) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Form:
    """The controls of one `Options` class, by option name."""

    options: type[BaseModel]
    infos: Mapping[str, OptionInfo]
    controls: Mapping[str, Component]

    @property
    def components(self) -> list[Component]:
        return list(self.controls.values())

    def read(self, values: Mapping[Component, Any]) -> dict[str, Any]:
        """Collect the options from what the page sent, unchecked: `Options.parse` does that.

        Raises:
            InputError: A number field that may not be empty is.
        """
        found: dict[str, Any] = {}
        for name, component in self.controls.items():
            value: Any = values[component]
            info = self.infos[name]
            if info.optional and info.kind in ("int", "float"):
                found[name] = str(value or "").strip() or None  # the class reads numbers from text
            elif value is None:
                raise InputError(f"{info.label} is empty.", "Fill it in.")
            elif info.kind == "int" and float(value).is_integer():
                found[name] = int(value)  # sliders send 20.0
            else:
                found[name] = value
        return found

    def show(self, options: BaseModel) -> list[Any]:
        """Give the values of the controls that show `options`, in the order of `components`."""
        values = {name: getattr(options, name) for name in self.controls}
        empty = {name for name, info in self.infos.items() if info.optional and info.kind in ("int", "float")}
        return [_written(value) if name in empty else value for name, value in values.items()]


class FormBuilder:
    """Places the controls of one class one by one, so that a tab can lay them out.

    Args:
        options: The class.
        prefix: Put before the option's name in the control's id in the page.
    """

    def __init__(self, options: type[BaseModel], prefix: str) -> None:
        self._options, self._prefix = options, prefix
        self._infos = {info.name: info for info in describe(options)}
        self._controls: dict[str, Component] = {}

    def place(self, *names: str) -> None:
        """Make the controls of these options here."""
        for name in names:
            self._controls[name] = control(self._infos[name], self._prefix)

    def put(self, name: str, component: Component) -> Component:
        """Use a control the tab made itself."""
        self._controls[name] = component
        return component

    def info(self, name: str) -> OptionInfo:
        return self._infos[name]

    def build(self) -> Form:
        return Form(self._options, self._infos, dict(self._controls))


def simple_form(
    options: type[BaseModel], prefix: str, shown: int = 4, skip: Iterable[str] = (), last: Iterable[str] = ()
) -> Form:
    """Make a whole form: the first options in view, the rest folded away (classes declare the important ones first)."""
    builder = FormBuilder(options, prefix)
    names = [info.name for info in describe(options) if info.name not in set(skip)]
    names.sort(key=lambda name: name in set(last))
    with gr.Column(elem_classes="pairs"):
        builder.place(*names[:shown])
    if names[shown:]:
        with gr.Accordion("More settings", open=False, elem_classes="quiet"), gr.Column(elem_classes="pairs"):
            builder.place(*names[shown:])
    return builder.build()
