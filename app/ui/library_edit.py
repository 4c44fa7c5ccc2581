"""The form that edits one adapter's card: name, trigger words, tags, licence, notes, and which family it is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..studio import Change
from .desk import Desk
from .library_report import panel_head
from .library_view import FAMILY_TITLES, family_title
from .pieces import esc

if TYPE_CHECKING:
    from ...pipelines.report import Report
    from ..library_entry import Entry


def edit_html(entry: Entry, report: Report) -> str:
    """The form, filled with what is known; a family chosen here counts from now on for this file."""
    families = "".join(f'<option value="{esc(name)}">{esc(family_title(name))}</option>' for name in FAMILY_TITLES)
    said = f"{family_title(report.family)}, {report.confidence}: {report.reason}."
    return (
        f'<section class="panel" data-panel="edit {esc(entry.name)}" aria-label="Edit {esc(entry.name)}">'
        f"{panel_head(entry.name, 'Edit')}<form class='edit' data-name=\"{esc(entry.name)}\">"
        + field("name", "Name", entry.name)
        + field("trigger", "Trigger words", entry.trigger)
        + field("tags", "Tags, with commas between", ", ".join(entry.tags))
        + field("licence", "Licence", entry.licence)
        + f'<label>Notes<textarea name="notes" rows="4">{esc(entry.notes)}</textarea></label>'
        + '<label>Made for<select name="family"><option value="">As told by the file</option>'
        + f'{families}</select></label><p class="soft">Now: {esc(said)}</p>'
        + '<div class="tools"><button type="button" class="btn primary" data-act="save">Save</button>'
        + '<button type="button" class="btn" data-act="close">Cancel</button></div></form></section>'
    )


def field(name: str, label: str, value: str) -> str:
    return f'<label>{label}<input type="text" name="{name}" value="{esc(value)}" autocomplete="off"></label>'


def save(desk: Desk, name: str, told: Mapping[str, Any]) -> Entry:
    """Take the form's values over; only what differs is changed.

    Raises:
        IntarsiaError: The name is taken, a text too long, or the file contradicts the family; nothing was changed.
    """
    shelf = desk.studio.shelf
    entry = shelf.find(name)
    family = str(told.get("family", ""))
    if family:
        shelf.inspect(name, family).require_usable()
    wanted = [tag for text in str(told.get("tags", "")).split(",") if (tag := text.strip())]

    def changed(key: str) -> str | None:
        text = str(told.get(key, getattr(entry, key))).strip()
        return None if text == getattr(entry, key) else text

    change = Change(
        name=changed("name"),
        notes=changed("notes"),
        licence=changed("licence"),
        trigger=changed("trigger"),
        tag=tuple(tag for tag in wanted if tag not in entry.tags),
        untag=tuple(tag for tag in entry.tags if tag not in wanted),
    )
    edited = shelf.edit(name, change)
    if family:
        shelf.decide(edited.name, family)
    return edited
