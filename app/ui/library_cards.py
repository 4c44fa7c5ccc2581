"""The library's cards: one per adapter, with what it is, whether it fits, what it wants in the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..present import size
from .desk import Desk
from .library_view import CARDS, View, family_title, kind_of
from .pieces import button, chip, clock, empty, esc, facts, file_url, thumbnail

if TYPE_CHECKING:
    from ..library_entry import Entry, Page

MAX_TAGS = 6  # shown on a card


def cards_html(desk: Desk, view: View, page: Page) -> str:
    """The cards of a page, and a button for more of them; or why there are none."""
    if not page.entries:
        return nothing(view)
    make = trash_card if view.trashed else card
    served = desk.studio.home.thumbnails
    head = ""
    if view.trashed:
        count = f"{page.total:,} adapter" + ("" if page.total == 1 else "s")
        head = (
            '<div class="trash-head"><p class="soft">Restore brings an adapter back. Emptying the trash deletes the '
            "studio's own files for good.</p>"
            + button("Empty trash", "empty", "danger", confirm=f"Delete {count} for good?")
            + "</div>"
        )
    rest = page.total - len(page.entries)
    more = button(f"Show {min(rest, CARDS)} more", "more", "wide") if rest > 0 else ""
    return f'{head}<div class="cards">{"".join(make(entry, served) for entry in page.entries)}</div>{more}'


def nothing(view: View) -> str:
    """What stands where no card does."""
    if view.narrowed:
        return empty("Nothing found", "No adapter fits this search.", button("Clear search", "clear", "primary"))
    if view.trashed:
        return empty("The trash is empty", "What you remove from the library waits here until you empty the trash.")
    return empty(
        "No adapters yet",
        "Drop a LoRA or B-LoRA file here, or train one from a picture of yours.",
        button("Train one", "none", "primary", tab="Train"),
    )


def card(entry: Entry, served: Path) -> str:
    """One adapter that is listed.

    Args:
        entry: What the library knows of it.
        served: Folder whose pictures the page may show by address.
    """
    words = f'<p class="trigger">Trigger words: <b>{esc(entry.trigger)}</b></p>' if entry.trigger else ""
    warning = f'<p class="warning">{esc(entry.warnings[0])}</p>' if entry.warnings else ""
    if len(entry.warnings) > 1:
        warning += f'<p class="soft">{len(entry.warnings) - 1} more in its report.</p>'
    lost = '<p class="warning">Its file is gone.</p>' if entry.missing else ""
    tools = (
        button("Use in Generate", "use", "primary", name=entry.name, tab="Generate")
        + button("Report", "report", name=entry.name)
        + button("Edit", "edit", name=entry.name)
        + button("Tools", "pick", name=entry.name)
        + f'<button type="button" class="icon danger" data-act="remove" data-name="{esc(entry.name)}"'
        f' title="To the trash" aria-label="Move {esc(entry.name)} to the trash">{BIN}</button>'
    )
    return (
        f'<article class="card" data-name="{esc(entry.name)}">{face(entry, served)}'
        f'<div class="card-body"><div class="card-head"><h3 title="{esc(entry.name)}">{esc(entry.name)}</h3>'
        f'{star(entry)}</div><div class="chips">{chips(entry)}</div><p class="matched">{esc(matched(entry))}</p>'
        f"{words}{lost}{warning}<details><summary>Details</summary>{details(entry)}</details>"
        f'<div class="tools">{tools}</div></div></article>'
    )


def trash_card(entry: Entry, served: Path) -> str:
    """One adapter that waits in the trash."""
    return (
        f'<article class="card" data-name="{esc(entry.name)}">{face(entry, served)}'
        f'<div class="card-body"><h3 title="{esc(entry.name)}">{esc(entry.name)}</h3>'
        f'<div class="chips">{chips(entry)}</div><details><summary>Details</summary>{details(entry)}</details>'
        f'<div class="tools">{button("Restore", "restore", "primary", name=entry.name)}</div></div></article>'
    )


def star(entry: Entry) -> str:
    """The mark of a favourite, to be switched."""
    on = "true" if entry.favourite else "false"
    said = f"{entry.name} is a favourite" if entry.favourite else f"Make {entry.name} a favourite"
    return (
        f'<button type="button" class="icon star" data-act="star" data-name="{esc(entry.name)}" data-on="{on}"'
        f' aria-pressed="{on}" aria-label="{esc(said)}" title="Favourite">{STAR}</button>'
    )


BIN = (
    '<svg viewBox="0 0 20 20" aria-hidden="true">'
    '<path class="line" d="M4 5.5h12M8 5.5V3.8h4v1.7M5.5 5.5l.7 10.7h7.6l.7-10.7M8.4 8.6v4.6M11.6 8.6v4.6"/></svg>'
)
STAR = (
    '<svg viewBox="0 0 20 20" aria-hidden="true">'
    '<path d="m10 2.6 2.3 4.7 5.1.7-3.7 3.6.9 5.1-4.6-2.4-4.6 2.4.9-5.1L2.6 8l5.1-.7Z"/></svg>'
)


def chips(entry: Entry) -> str:
    """Kind, family, rank, role and tags."""
    unsure = "" if entry.confidence == "certain" else f", {entry.confidence}"
    title = f"How sure the family is: {entry.confidence}"
    found = [chip(kind_of(entry), "kind"), chip(family_title(entry.family) + unsure, "family", title)]
    if entry.base.lower() == "mini":
        found.append(chip("Mini"))
    if entry.rank:
        found.append(chip(f"rank {entry.rank}"))
    if entry.role != "concept":
        found.append(chip(entry.role, "role"))
    found += [chip(tag, "tag") for tag in entry.tags[:MAX_TAGS]]
    if len(entry.tags) > MAX_TAGS:
        found.append(chip(f"{len(entry.tags) - MAX_TAGS} more tags"))
    return "".join(found)


def details(entry: Entry) -> str:
    """Where it lies and where it came from; its hash can be copied."""
    listed = facts(
        (
            ("File", entry.path.name),
            ("Folder", entry.folder),
            ("Size", size(entry.size)),
            ("Made for", entry.base),
            ("By", entry.author),
            ("Licence", entry.licence),
            ("From", entry.source),
            ("Added", clock(entry.created)),
            ("Notes", entry.notes),
        )
    )
    return listed + copyable("SHA-256", entry.sha256)


def copyable(label: str, text: str) -> str:
    """A long word with a button that copies it."""
    return (
        f'<div class="copyable"><span>{esc(label)}</span><code>{esc(text)}</code>'
        f'<button type="button" class="btn mini-btn" data-copy="{esc(text)}" aria-label="Copy {esc(label)}">Copy'
        "</button></div>"
    )


def face(entry: Entry, served: Path) -> str:
    """The card's picture, or two letters where there is none."""
    picture = entry.thumbnail
    if picture is not None and picture.parent == served:
        return f'<img class="face" src="{file_url(picture)}" alt="" loading="lazy">'
    if picture is not None and picture.is_file():
        return f'<img class="face" src="{thumbnail(str(picture))}" alt="">'
    letters = "".join(word[0] for word in entry.name.replace("_", "-").split("-") if word)[:2].upper()
    return f'<div class="face letters {esc(entry.role)}" aria-hidden="true">{esc(letters)}</div>'


def matched(entry: Entry) -> str:
    """Say how much of the file fits its family."""
    return f"{entry.matched} of {entry.modules} modules matched"
