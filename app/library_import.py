"""Bring adapter files into the library: checked one by one, copied beside their place, listed a batch at a time."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from uuid import uuid4

from ..pipelines.atomic import replacing
from ..pipelines.errors import AdapterError, InputError, IntarsiaError, MemoryLimitError
from ..pipelines.headers import reading
from .library_checks import ENDING, Checked, check, describe, source_of
from .library_entry import Entry, Outcome, make_slug, slug_of
from .library_index import Card, Index, Place, free_name

BATCH = 16  # files a transaction
CHUNK = 2**20  # bytes


@dataclass(frozen=True)
class Wish:
    """A file to bring in, and how; see `Shelf.add`."""

    path: Path
    name: str | None = None
    replace: bool = False
    numbered: bool = False
    group: str = ""
    thumbnail: Path | None = None
    source: str = ""
    family: str = ""


def bring_in(index: Index, wishes: Iterable[Wish]) -> Iterator[Outcome]:
    """Bring files in, each on its own: one that is refused does not keep the others out.

    Raises:
        MemoryLimitError: The disk is full; what was told before is listed, nothing else is left.
    """
    waiting = iter(wishes)
    while batch := list(islice(waiting, BATCH)):
        yield from _batch(index, batch)


def _batch(index: Index, batch: list[Wish]) -> list[Outcome]:
    with ExitStack() as copies:
        ready: list[tuple[Wish, Checked | IntarsiaError, Path | None]] = []
        for wish in batch:
            try:
                checked = check(index, wish.path, wish.thumbnail, wish.family)
                ready.append((wish, checked, _copied(index, checked, copies)))
            except MemoryLimitError:
                raise
            except IntarsiaError as error:
                ready.append((wish, error, None))
        moved: list[Path] = []
        try:
            with index.writing() as db:
                return [_listed(index, db, wish, found, copy, moved) for wish, found, copy in ready]
        except BaseException:
            for path in moved:  # what cannot be listed is not kept
                path.unlink(missing_ok=True)
            raise


def _copied(index: Index, checked: Checked, copies: ExitStack) -> Path | None:
    """Copy a file beside its place, unless the library has it; the copy is gone when `copies` closes."""
    sha256 = checked.report.sha256
    with index.reading() as db:
        if any(not card.entry.missing for card in index.cards(db, "WHERE sha256 = ? AND state <> 'away'", sha256)):
            return None
    copy = index.home.adapters / f".{uuid4().hex}.new"
    copies.callback(copy.unlink, missing_ok=True)
    digest = hashlib.sha256()
    with replacing(copy) as temporary, temporary.open("xb") as target:
        for chunk in _chunks(checked.path):
            digest.update(chunk)
            target.write(chunk)
    if digest.hexdigest() != sha256:
        raise AdapterError(f"{checked.path.name} changed while it was copied.", "Try again.")
    return copy


def _chunks(path: Path) -> Iterator[bytes]:
    """Read a file piece by piece; what goes wrong with the pieces elsewhere is not said to be this file's fault."""
    with reading(path) as source:
        while chunk := source.read(CHUNK):
            yield chunk


def _listed(
    index: Index,
    db: sqlite3.Connection,
    wish: Wish,
    found: Checked | IntarsiaError,
    copy: Path | None,
    moved: list[Path],
) -> Outcome:
    """List one file in the transaction of its batch."""
    if isinstance(found, IntarsiaError):
        return Outcome(wish.path, "refused", error=found)
    cards = index.cards(db, "WHERE sha256 = ? ORDER BY state = 'listed' DESC, id", found.report.sha256)
    there = next((card for card in cards if card.state != "away" and not card.entry.missing), None)
    if there is not None:
        if there.state == "listed":
            return Outcome(wish.path, "known", there.entry)
        return Outcome(wish.path, "restored", relisted(index, db, there))
    if copy is None:
        error = AdapterError(f"{wish.path.name} was removed from the library just now.", "Try again.")
        return Outcome(wish.path, "refused", error=error)
    if cards:  # its file is gone, or its folder not watched any more
        place = _settle(index, db, cards[0].entry.name, copy, moved)
        return Outcome(wish.path, "restored", relisted(index, db, replace(cards[0], place=place)))
    try:
        name = _name(db, wish)
    except InputError as error:
        return Outcome(wish.path, "refused", error=error)
    place = _settle(index, db, name, copy, moved)
    entry = describe(found, name, wish.source or source_of(index.home, wish.path), wish.group)
    return Outcome(wish.path, "added", index.put(db, Card(0, entry, place)))


def relisted(index: Index, db: sqlite3.Connection, card: Card) -> Entry:
    """List a card again, numbered if its name was taken meanwhile."""
    name = card.entry.name if card.state == "listed" else free_name(db, card.entry.name)
    return index.put(db, replace(card, entry=replace(card.entry, name=name), state="listed"))


def _name(db: sqlite3.Connection, wish: Wish) -> str:
    slug = make_slug(wish.name) if wish.name else slug_of(wish.path)
    if wish.replace:  # nothing is lost: the old one goes to the trash
        db.execute("UPDATE library SET state = 'trash' WHERE state = 'listed' AND name = ?", (slug,))
    free = free_name(db, slug)
    if free == slug or wish.numbered:
        return free
    raise InputError(
        f"The library already has another adapter called {slug}.",
        f"Choose another name, such as {free}, or replace it.",
    )


def _settle(index: Index, db: sqlite3.Connection, name: str, copy: Path, moved: list[Path]) -> Place:
    """Move a copy to its place under a file name nobody has."""
    folder, number = index.home.adapters, 1
    while True:
        target = folder / (f"{name}{ENDING}" if number == 1 else f"{name}-{number}{ENDING}")
        taken = db.execute("SELECT 1 FROM library WHERE folder = '' AND file = ?", (target.name,)).fetchone()
        if not taken and not target.exists():
            break
        number += 1
    moved.append(target)
    copy.rename(target)
    state = target.stat()
    return Place("", target.name, state.st_size, state.st_mtime_ns)
