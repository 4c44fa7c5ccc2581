"""The adapters in use: rows with weight sliders, several at once, the two halves of a B-LoRA together.

The component's value is `{"uses": [...], "shelf": [...]}`: what is in use, and what could be added. Both hold
`{"adapter", "weight", "group", "group_name", "role", "trigger", "family", "note"}`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import gradio as gr

from ...pipelines.requests import AdapterUse
from .desk import Desk

if TYPE_CHECKING:
    from ..shelf import Entry

Value = dict[str, list[dict[str, Any]]]
ROLE_ORDER = {"content": 0, "style": 1}


def component() -> gr.HTML:
    """Make the rack; it is drawn and edited in the browser (assets/studio.js)."""
    return gr.HTML(
        value={"uses": [], "shelf": []},
        html_template='<div class="rack"></div>',
        js_on_load="intarsia.rack(element, props, trigger, watch); /* 'change' 'word' */",
        apply_default_css=False,
        elem_id="rack",
    )


def row(entry: Entry, weight: float = 1.0) -> dict[str, Any]:
    """Describe a library entry as a row."""
    half = entry.role in ROLE_ORDER
    return {
        "adapter": entry.name,
        "weight": weight,
        "group": entry.group or "",
        "group_name": entry.name.removesuffix(f"-{entry.role}") if half else entry.name,
        "role": entry.role,
        "trigger": entry.trigger,
        "family": entry.family,
        "note": entry.family,
    }


def shelf_rows(desk: Desk) -> list[dict[str, Any]]:
    return [row(entry) for entry in desk.studio.shelf.entries()]


def with_entries(value: Value, entries: Iterable[Entry]) -> Value:
    """Put entries into use that are not yet."""
    used = {use["adapter"] for use in value["uses"]}
    added = sorted((entry for entry in entries if entry.name not in used), key=lambda e: ROLE_ORDER.get(e.role, 0))
    return {**value, "uses": [*value["uses"], *(row(entry) for entry in added)]}


def requested(value: Mapping[str, Any] | None) -> tuple[AdapterUse, ...]:
    """Read what is in use, as a request wants it."""
    uses = (value or {}).get("uses", [])
    return tuple(AdapterUse.parse({"adapter": use["adapter"], "weight": use["weight"]}) for use in uses)


def restored(desk: Desk, uses: Iterable[AdapterUse]) -> tuple[Value, list[str]]:
    """Show the adapters of a restored request.

    Returns:
        The rack's value, and the names that are not in the library.
    """
    shelf = desk.studio.shelf.entries()
    by_name, by_hash = {entry.name: entry for entry in shelf}, {entry.sha256: entry for entry in shelf}
    rows: list[dict[str, Any]] = []
    missing: list[str] = []
    for use in uses:
        entry = by_hash.get(use.sha256) if use.sha256 else by_name.get(use.adapter)
        if entry is None:
            missing.append(use.adapter)
        else:
            rows.append(row(entry, use.weight))
    return {"uses": rows, "shelf": [row(entry) for entry in shelf]}, missing


def group_of(desk: Desk, name: str) -> list[Entry]:
    """Give an entry and, if it is half of a pair, the other half too."""
    entry = desk.studio.shelf.find(name)
    if not entry.group:
        return [entry]
    return [other for other in desk.studio.shelf.entries() if other.group == entry.group]
