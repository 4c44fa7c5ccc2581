"""The Library tab: a card per adapter; files come in by dropping them anywhere or by the button."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from ...pipelines.errors import InputError, IntarsiaError
from ..present import size
from .desk import TOAST_SECONDS, Desk, shown, uploaded
from .pieces import button, chip, clock, empty, esc, facts, thumbnail

if TYPE_CHECKING:
    from ..shelf import Entry

ALGORITHMS = {"lora": "LoRA", "blora": "B-LoRA", "lcm": "LCM-LoRA"}


@dataclass(frozen=True)
class LibraryTab:
    """The parts of the tab that others read or fill."""

    cards: gr.HTML
    add: gr.UploadButton


def build(desk: Desk) -> LibraryTab:
    """Lay the tab out; the page connects it."""
    with gr.Row(elem_classes="tab-head"):
        gr.HTML(
            "<h2>Library</h2><p>Drop .safetensors files anywhere on this page, one or several.</p>",
            apply_default_css=False,
        )
        add = gr.UploadButton("Add files", file_count="multiple", elem_id="library-add", scale=0, min_width=120)
    cards = gr.HTML(
        elem_id="library", apply_default_css=False, js_on_load="intarsia.actions(element, trigger); /* 'act' */"
    )
    return LibraryTab(cards, add)


def shelf_html(desk: Desk) -> str:
    """All cards, newest first; halves of a pair stand together."""
    entries = sorted(desk.studio.shelf.entries(), key=lambda entry: entry.created, reverse=True)
    if not entries:
        return empty(
            "No adapters yet",
            "Drop a LoRA or B-LoRA file here, or train one from a picture of yours.",
            button("Train one", "none", "primary", tab="Train"),
        )
    return f'<div class="cards">{"".join(card(entry) for entry in entries)}</div>'


def card(entry: Entry) -> str:
    """One adapter: what it is, whether it fits, what it wants in the prompt."""
    kind = ALGORITHMS.get(entry.algorithm, entry.algorithm)
    chips = chip(kind) + chip(entry.family) + (chip(f"rank {entry.rank}") if entry.rank else "")
    if entry.role != "concept":
        chips += chip(entry.role, "role")
    words = f'<p class="trigger">Trigger words: <b>{esc(entry.trigger)}</b></p>' if entry.trigger else ""
    fits = f'<p class="matched">{esc(matched(entry))}</p>'
    warnings = "".join(f'<p class="warning">{esc(text)}</p>' for text in getattr(entry, "warnings", ()))
    tools = (
        button("Use in Generate", "use", "primary", name=entry.name, tab="Generate")
        + button("Remove", "remove", "danger", name=entry.name, confirm="Really remove?")
    )  # fmt: skip
    more = facts(
        (
            ("File", Path(entry.path).name),
            ("Size", size(entry.size)),
            ("Made for", entry.base),
            ("Added", clock(entry.created)),
            ("SHA-256", entry.sha256),
        )
    )
    return (
        f'<article class="card" data-name="{esc(entry.name)}">{face(entry)}'
        f'<div class="card-body"><h3 title="{esc(entry.name)}">{esc(entry.name)}</h3><div class="chips">{chips}</div>'
        f"{fits}{words}{warnings}<details><summary>Details</summary>{more}</details>"
        f'<div class="tools">{tools}</div></div></article>'
    )


def face(entry: Entry) -> str:
    """The card's picture, or two letters where there is none."""
    if entry.thumbnail and Path(entry.thumbnail).is_file():
        return f'<img class="face" src="{thumbnail(str(entry.thumbnail))}" alt="">'
    letters = "".join(word[0] for word in entry.name.replace("_", "-").split("-") if word)[:2].upper()
    return f'<div class="face letters {esc(entry.role)}" aria-hidden="true">{esc(letters)}</div>'


def matched(entry: Entry) -> str:
    """Say how much of the file fits its family."""
    return f"{entry.matched} of {entry.modules} modules matched"


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


def connect(desk: Desk, tab: LibraryTab, **calm: Any) -> None:  # noqa: ANN401 - listener settings
    """Removing and the button; dropping and "use" are connected by the page, they reach into other tabs."""

    @shown
    def act(event: gr.EventData) -> str:
        if event.act == "remove":
            desk.studio.shelf.remove(str(event.name))
        return shelf_html(desk)

    @shown
    def add(paths: list[str] | None) -> str:
        if not paths:
            raise InputError("No file was chosen.", "")
        take_in(desk, [(Path(path).name, path) for path in paths])
        return shelf_html(desk)

    tab.cards.act(act, None, tab.cards, **calm)
    tab.add.upload(add, tab.add, tab.cards, **calm)
