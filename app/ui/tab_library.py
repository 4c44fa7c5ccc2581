"""The Library tab: search and filters, a card per adapter, and beside them a report or the form that edits one."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.components import Component

from ...pipelines.errors import AdapterError, InputError, IntarsiaError
from . import library_edit, library_effect, library_tools, library_watched
from .desk import TOAST_SECONDS, Desk, Seen, shown, uploaded
from .library_cards import cards_html, matched
from .library_report import Measures, report_html
from .library_view import CARDS, Panel, View, bar
from .pieces import esc

if TYPE_CHECKING:
    from ..library_entry import Entry

LOOK_EVERY = 3.0  # seconds between two looks at the library: other processes may bring something in
PATIENCE = 0.8  # seconds a click waits for a small adapter's measure


@dataclass(frozen=True)
class LibraryTab:
    """The parts of the tab that others read or fill."""

    bar: gr.HTML
    cards: gr.HTML
    panel: gr.HTML
    effect: gr.HTML
    add: gr.UploadButton
    measures: Measures
    tools: library_tools.ToolPanel
    folders: library_watched.FolderPanel

    @property
    def live(self) -> list[Component]:
        """What the page's clock keeps up to date."""
        return [self.bar, self.cards, self.panel, self.effect, self.tools.outcome, self.folders.listed]


def build(desk: Desk) -> LibraryTab:
    """Lay the tab out; the page connects it."""
    with gr.Row(elem_classes="tab-head"):
        gr.HTML(
            "<h2>Library</h2><p>Drop .safetensors files anywhere on this page, one or several.</p>",
            apply_default_css=False,
        )
        add = gr.UploadButton("Add files", file_count="multiple", elem_id="library-add", scale=0, min_width=120)
    search = gr.HTML(
        value={},
        html_template='<div class="library-bar"></div>',
        elem_id="library-bar",
        apply_default_css=False,
        js_on_load="intarsia.libraryBar(element, props, trigger, watch); /* 'query' */",
    )
    cards = gr.HTML(
        elem_id="library", apply_default_css=False, js_on_load="intarsia.actions(element, trigger); /* 'act' */"
    )
    with gr.Column(elem_id="library-drawer"):
        script = "intarsia.panel(element, trigger, watch); /* 'act' */"
        panel = gr.HTML(elem_id="library-panel", apply_default_css=False, js_on_load=script)
        effect = gr.HTML(elem_id="library-effect", apply_default_css=False, js_on_load=script)
    return LibraryTab(search, cards, panel, effect, add, Measures(desk.studio), *_more(desk))


def _more(desk: Desk) -> tuple[library_tools.ToolPanel, library_watched.FolderPanel]:
    """What is folded away under the cards."""
    return library_tools.build(desk), library_watched.build(desk)


def refresh(desk: Desk, tab: LibraryTab, seen: Seen, now: bool = True) -> list[Any]:
    """Values for `tab.live`, unchanged ones left alone; unless `now`, the cards wait for their time."""
    due = now or time.monotonic() - seen.library_seen > LOOK_EVERY
    values: list[Any] = [gr.skip(), gr.skip()]
    if due:
        seen.library_seen = time.monotonic()
        page = desk.studio.shelf.page(seen.view.query)
        values = [
            seen.fresh("library-bar", bar(desk, seen.view, page)),
            seen.fresh("library", cards_html(desk, seen.view, page)),
        ]
    panel, effect = panel_html(desk, tab, seen)
    return [
        *values,
        seen.fresh("library-panel", panel),
        seen.fresh("library-effect", effect),
        seen.fresh("tool-outcome", library_tools.outcome_html(desk, seen)),
        library_watched.refresh(desk, seen) if due else gr.skip(),
    ]


def panel_html(desk: Desk, tab: LibraryTab, seen: Seen) -> tuple[str, str]:
    """The open report, or the form, and the measured effect; "" if nothing is open, or if its adapter went away."""
    if seen.panel is None:
        return "", ""
    try:
        entry = desk.studio.shelf.find(seen.panel.name)
        report = tab.measures.inspect(entry)
    except AdapterError:
        seen.panel = None
        return "", ""
    if seen.panel.mode == "edit":
        return library_edit.edit_html(entry, report), ""
    return report_html(entry, report, tab.measures.of(entry)), library_effect.effect_html(desk, entry)


def take_in(desk: Desk, files: Iterable[tuple[str, str]]) -> list[Entry]:
    """Import dropped files, each on its own: a toast says what came in, another one why a file was refused.

    Args:
        files: Name as the person knows it, and the uploaded file.
    """
    entries: list[Entry] = []
    for name, path in files:
        try:
            entries.append(desk.studio.import_adapter(uploaded(path)))
        except IntarsiaError as error:
            gr.Warning(
                f'<b>{esc(name)}</b>: {esc(error.message)}<div class="hint">{esc(error.hint)}</div>',
                duration=TOAST_SECONDS,
                title="Refused",
            )
    for entry in entries:
        gr.Info(f"<b>{esc(entry.name)}</b>: {esc(matched(entry))}", title="In the library", duration=6)
    return entries


def connect(desk: Desk, tab: LibraryTab, seen: gr.State, **calm: Any) -> None:  # noqa: ANN401 - listener settings
    """Searching, the cards' buttons, the panel; dropping and "use" reach into other tabs, the page connects them."""

    @shown
    def query(given: Seen, event: gr.EventData) -> list[Any]:
        given.view = View.read(dict(event.told))
        return refresh(desk, tab, given)

    @shown
    def act(given: Seen, event: gr.EventData) -> list[Any]:
        _act(desk, tab, given, event)
        return refresh(desk, tab, given)

    @shown
    def add(paths: list[str] | None, given: Seen) -> list[Any]:
        if not paths:
            raise InputError("No file was chosen.", "")
        take_in(desk, [(Path(path).name, path) for path in paths])
        return refresh(desk, tab, given)

    tab.bar.query(query, seen, tab.live, trigger_mode="always_last", **calm)
    for place in (tab.cards, tab.panel, tab.effect):
        place.act(act, seen, tab.live, **calm)
    library_tools.connect(desk, tab.tools, seen, tab.cards)
    library_watched.connect(desk, tab.folders)
    tab.add.upload(add, [tab.add, seen], tab.live, **calm)


def _act(desk: Desk, tab: LibraryTab, seen: Seen, event: gr.EventData) -> None:
    """Do what a button of a card or of the panel is for."""
    shelf = desk.studio.shelf
    match event.act:
        case "star":
            shelf.favourite(str(event.name), event.on != "true")
        case "remove":
            shelf.remove(str(event.name))
            gr.Info(f"<b>{esc(event.name)}</b> is in the trash.", title="Removed", duration=6)
        case "restore":
            shelf.restore(str(event.name))
        case "empty":
            shelf.empty_trash()
        case "save":
            library_edit.save(desk, str(event.name), dict(event.form))
            seen.panel = None
        case "effect":
            seen.unfinished.add(library_effect.start(desk, str(event.name), dict(event.form)).id)
        case "effect-stop":
            desk.studio.cancel(str(event.job))
            desk.await_end(str(event.job))
        case _:
            _look(desk, tab, seen, event)


def _look(desk: Desk, tab: LibraryTab, seen: Seen, event: gr.EventData) -> None:
    """Show something else; nothing is changed."""
    match event.act:
        case "more":
            seen.view = replace(seen.view, shown=seen.view.shown + CARDS)
        case "clear":
            seen.view = View(trashed=seen.view.trashed, sort=seen.view.sort)
        case "close":
            seen.panel = None
        case "edit":
            seen.panel = Panel(str(event.name), "edit")
        case "report":
            seen.panel = Panel(str(event.name), "report")
            wait([tab.measures.of(desk.studio.shelf.find(seen.panel.name))], PATIENCE)
        case _:
            pass
