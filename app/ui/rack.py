"""The adapters in use: rows with weight sliders, several at once, the two halves of a B-LoRA together.

The rack's value is `{"uses": [...], "kept": [...]}`: what is in use, and what was and would come back as it was. Its
offers, entries of the library that fit what a person types, are a component of their own: the page's clock renews them,
and must never touch what is in use. All lists hold rows as `row` makes them; `groups` is None until a row is opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import gradio as gr

from ...pipelines.requests import AdapterUse
from ..studio import Query
from .desk import CALM, Desk, Seen, shown
from .library_view import family_title

if TYPE_CHECKING:
    from ..library_entry import Entry

Value = dict[str, Any]
Use = TypeVar("Use", bound=AdapterUse)
SETTINGS = ("weight", "blocks", "first", "last")  # of an AdapterUse
OFFERED = 12  # entries shown while a person looks for one
MAX_TEXT = 200  # characters of what is looked for
ROLE_ORDER = {"content": 0, "style": 1}


def component(elem_id: str = "rack") -> gr.HTML:
    """Make a rack; it is drawn and edited in the browser (assets/rack.js)."""
    return gr.HTML(
        value={"uses": [], "kept": []},
        html_template='<div class="rack"></div>',
        js_on_load="intarsia.rack(element, props, trigger, watch); /* 'change' 'word' 'groups' */",
        apply_default_css=False,
        elem_id=elem_id,
        elem_classes="rack-of",
    )


def offers(name: str = "rack") -> gr.HTML:
    """Make what the library offers under a name: racks and pickers show "rack"."""
    return gr.HTML(
        value={"text": "", "rows": []},
        html_template="<span></span>",
        js_on_load=f"intarsia.offers('{name}', props, trigger, watch); /* 'find' */",
        apply_default_css=False,
        elem_id=f"{name}-shelf",
        elem_classes="shelf-of",
    )


def connect_rows(desk: Desk, rack: gr.HTML) -> None:
    """Opening a row asks which parts of the model its adapter changes."""

    @shown
    def groups(value: Value, event: gr.EventData) -> Value:
        name = str(event.adapter)
        found = [asdict(group) for group in desk.studio.block_groups(name)]
        uses = [{**use, "groups": found} if use["adapter"] == name else use for use in value["uses"]]
        return {**value, "uses": uses}

    rack.groups(groups, rack, rack, **CALM)


def connect(desk: Desk, rack: gr.HTML, shelf: gr.HTML, seen: gr.State) -> None:
    """Its rows as `connect_rows`; and typing a name asks what fits it in the library."""

    @shown
    def find(given: Seen, event: gr.EventData) -> Value:
        given.wanted = str(event.text)[:MAX_TEXT]
        return offered(desk, given)

    connect_rows(desk, rack)
    shelf.find(find, seen, shelf, trigger_mode="always_last", **CALM)


def offered(desk: Desk, seen: Seen) -> Value:
    """The first entries that fit what a person looks for."""
    entries = desk.studio.shelf.page(Query(text=seen.wanted, limit=OFFERED)).entries
    return {"text": seen.wanted, "rows": [row(entry) for entry in entries]}


def row(entry: Entry, use: AdapterUse | None = None) -> dict[str, Any]:
    """Describe a library entry as a row, as it is used or would be at first."""
    use = use or AdapterUse(adapter=entry.name)
    half = entry.role in ROLE_ORDER
    return {
        "adapter": entry.name,
        **{name: getattr(use, name) for name in SETTINGS},
        "group": entry.group or "",
        "group_name": entry.name.removesuffix(f"-{entry.role}") if half else entry.name,
        "role": entry.role,
        "trigger": entry.trigger,
        "family": entry.family,
        "note": family_title(entry.family),
        "groups": None,
    }


def with_entries(value: Value, entries: Iterable[Entry]) -> Value:
    """Put entries into use that are not yet; one that was in use before comes back as it was."""
    used = {use["adapter"] for use in value["uses"]}
    kept = {use["adapter"]: use for use in value["kept"]}
    added = sorted((entry for entry in entries if entry.name not in used), key=lambda e: ROLE_ORDER.get(e.role, 0))
    return {**value, "uses": [*value["uses"], *(kept.get(entry.name) or row(entry) for entry in added)]}


def requested(value: Mapping[str, Any] | None) -> tuple[AdapterUse, ...]:
    """Read what is in use, as a request wants it."""
    uses = (value or {}).get("uses", [])
    return tuple(AdapterUse.parse({name: use[name] for name in ("adapter", *SETTINGS)}) for use in uses)


def restored(desk: Desk, uses: Iterable[AdapterUse]) -> tuple[Value, list[str]]:
    """Show the adapters of a restored request, each with its weight, its parts and its steps.

    Returns:
        The rack's value, and the names that are not in the library.
    """
    rows: list[dict[str, Any]] = []
    missing: list[str] = []
    for use, entry in found(desk, uses):
        if entry is None:
            missing.append(use.adapter)
        else:
            rows.append(row(entry, use))
    return {"uses": rows, "kept": []}, missing


def found(desk: Desk, uses: Iterable[Use]) -> list[tuple[Use, Entry | None]]:
    """Find the entries that a request used: by what is in the file where the request knows it, else by name."""
    by_name: dict[str, Entry] = {}
    by_hash: dict[str, Entry] = {}
    for entry in desk.studio.shelf.entries():
        by_name[entry.name] = by_hash[entry.sha256] = entry
    return [(use, by_hash.get(use.sha256) if use.sha256 else by_name.get(use.adapter)) for use in uses]


def group_of(desk: Desk, name: str) -> list[Entry]:
    """Give an entry and, if it is half of a pair, the other half too."""
    entry = desk.studio.shelf.find(name)
    if not entry.group:
        return [entry]
    return desk.studio.shelf.group(entry.group)
