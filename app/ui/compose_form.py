"""The Compose tab as one form: its parts, how a request is read from them, and how a layout is shown in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from ...composition.layout import ComposeRequest, parse_layout
from ...pipelines.errors import InputError
from . import compose_value, rack
from .desk import Desk, uploaded
from .forms import Form
from .pieces import esc


@dataclass(frozen=True)
class ComposeTab:
    """The parts of the tab that others read or fill."""

    form: Form
    board: gr.HTML
    styles: gr.HTML
    seeds: gr.Textbox
    method: gr.Dropdown
    methods: Mapping[str, Form]
    compared: gr.CheckboxGroup
    message: gr.HTML
    frame: gr.HTML
    under: gr.HTML
    caption: gr.HTML
    sheet: gr.HTML
    behind: gr.HTML
    history: gr.HTML
    offers: gr.HTML
    file: gr.HTML
    stop: gr.Button

    @property
    def live(self) -> list[Component]:
        """What the page's clock keeps up to date."""
        return [self.under, self.caption, self.sheet, self.behind, self.history, self.stop]

    @property
    def asked(self) -> list[Component]:
        """What a request is read from."""
        forms = [component for form in self.methods.values() for component in form.components]
        return [*self.form.components, self.board, self.styles, self.seeds, self.method, self.compared, *forms]

    @property
    def filled(self) -> list[Component]:
        """What bringing a layout back fills."""
        return [*self.asked, self.message]


def request_of(desk: Desk, tab: ComposeTab, values: Mapping[Component, Any], names: list[str]) -> ComposeRequest:
    """Read the whole tab as a request for these methods.

    Raises:
        InputError: A field, a concept or a mask cannot be used.
    """
    methods = [{"method": name, "options": tab.methods[name].read(values)} for name in names]
    return ComposeRequest.parse(
        {
            **tab.form.read(values),
            "concepts": compose_value.concepts_of(desk, values[tab.board]),
            "styles": rack.requested(values[tab.styles]),
            "seeds": compose_value.read_seeds(str(values[tab.seeds] or "")),
            "methods": methods,
        }
    )


def open_layout(desk: Desk, tab: ComposeTab, files: list[tuple[str, str]]) -> list[Any]:
    """Open an uploaded layout; gives values for `tab.filled`."""
    request, notes = compose_value.opened(desk, [(name, uploaded(path)) for name, path in files])
    return fill(desk, tab, request, notes, "Layout opened")


def restore(desk: Desk, tab: ComposeTab, name: str, path: Path) -> list[Any]:
    """Read the layout in a composed picture; gives values for `tab.filled`.

    Raises:
        InputError: It was not composed.
    """
    found = desk.studio.restore(path)
    if found.composition is None:
        raise InputError(f"{name} was not composed: it holds no layout.", "Drop it on the Generate tab.")
    request, lost = compose_value.with_own_masks(desk, parse_layout(found.composition), {})
    return fill(desk, tab, request, [*found.notes, *lost])


def fill(
    desk: Desk, tab: ComposeTab, request: ComposeRequest, notes: list[str], title: str = "Layout restored"
) -> list[Any]:
    """Show a request in the whole tab, and say what of it could not be found."""
    board, lost = compose_value.board_of(desk, request)
    styles, missing = rack.restored(desk, request.styles)
    used = {use.method: use.options for use in request.methods}
    unknown = [f"There is no method {name} any more." for name in used if name not in tab.methods]
    names = [name for name in used if name in tab.methods]
    forms: list[Any] = []
    for name, form in tab.methods.items():
        forms += form.show(form.options.model_validate(used.get(name, {})))
    lines = [*notes, *lost, *unknown, *(f"The adapter {name} is not in the library." for name in missing)]
    said = "".join(f"<li>{esc(line)}</li>" for line in lines)
    told = f'<div class="told"><b>{title}{", except:" if lines else "."}</b>{f"<ul>{said}</ul>" if said else ""}</div>'
    compared = names if len(names) > 1 else gr.skip()
    chosen = names[0] if names else gr.skip()
    seeds = compose_value.written_seeds(request.seeds)
    return [*tab.form.show(request), board, styles, seeds, chosen, compared, *forms, told]
