"""Watched folders: the studio's own and foreign ones, whose files are listed in place, and the scan that follows them.

A scan reads names, sizes and times, and inspects what is new or changed. A file that moved is known by its hash and
keeps its card; a refused one is remembered, and inspected again when it changes.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..pipelines.errors import AdapterError, InputError, IntarsiaError, MemoryLimitError
from ..pipelines.headers import hashes, read_header
from .library_checks import ENDING, Checked, check, describe, renewed
from .library_entry import Folder, Refused, Scan, slug_of
from .library_import import BATCH, relisted
from .library_index import Card, Index, Place, free_name
from .library_sidecars import ENDINGS

INSIDE = ("Lora", "loras", "LyCORIS")  # where A1111, its relatives and ComfyUI keep adapters, in their "models"
LEFT_OUT = "It was removed from the library."
Key = tuple[str, str]


def add(index: Index, path: Path) -> list[Path]:
    """Watch a folder; see `Shelf.add_folder`."""
    root = path.expanduser().absolute()
    if not root.is_dir():
        raise InputError(f"There is no folder {root}.", "Check the path.")
    models = root if root.name == "models" else root / "models"
    found = [models / name for name in INSIDE if (models / name).is_dir()]
    wanted: dict[tuple[int, int], Path] = {}
    for folder in found or [root]:  # a disk may not tell Lora from lora
        state = folder.stat()
        wanted.setdefault((state.st_dev, state.st_ino), folder.resolve())
    with index.writing() as db:
        watched = [index.home.adapters.resolve(), *(folder.path for folder in _folders(db))]
        for folder in wanted.values():
            for other in watched:
                if folder.is_relative_to(other) or other.is_relative_to(folder):
                    raise InputError(f"{folder} lies in or around {other}, which is watched already.", "")
        for folder in wanted.values():
            db.execute("INSERT INTO library_folders VALUES (?)", (str(folder),))
            for card in index.cards(db, "WHERE state = 'away' AND folder = ?", str(folder)):
                relisted(index, db, card)
    return list(wanted.values())


def remove(index: Index, path: Path) -> None:
    """Stop watching a folder; see `Shelf.remove_folder`."""
    folder = str(path.expanduser().resolve())
    with index.writing() as db:
        if not db.execute("DELETE FROM library_folders WHERE path = ?", (folder,)).rowcount:
            raise InputError(f"{folder} is not watched.", "See intarsia adapters folder list.")
        db.execute("UPDATE library SET state = 'away' WHERE folder = ? AND state = 'listed'", (folder,))
        db.execute("DELETE FROM library_others WHERE folder = ?", (folder,))


def known(index: Index) -> list[Folder]:
    """List the foreign folders."""
    with index.reading() as db:
        return _folders(db)


def _folders(db: sqlite3.Connection) -> list[Folder]:
    rows = db.execute(
        "SELECT path, (SELECT count(*) FROM library WHERE folder = path AND state = 'listed'),"
        " (SELECT count(*) FROM library_others WHERE folder = path AND refusal <> '') FROM library_folders ORDER BY 1"
    )
    return [Folder(Path(path), entries, bad) for path, entries, bad in rows]


def refused(index: Index) -> list[Refused]:
    """List the files that cannot be used."""
    with index.reading() as db:
        rows = db.execute("SELECT * FROM library_others WHERE refusal <> '' ORDER BY folder, file").fetchall()
    return [Refused(index.path(_place(row)), row["refusal"], row["hint"]) for row in rows]


def leave_out(db: sqlite3.Connection, card: Card) -> None:
    """Remember that a person does not want a file in a foreign folder to be listed."""
    _put_other(db, card.place, card.entry.sha256, LEFT_OUT, "Import it to have it in the library again.")


def holds(card: Card) -> bool:
    """Whether the file at a card's place is still the one the card stands for."""
    path = card.entry.path
    try:
        state = path.stat()
        same = (state.st_size, state.st_mtime_ns) == (card.place.size, card.place.mtime)
        return same or hashes(read_header(path))[0] == card.entry.sha256
    except (OSError, AdapterError):
        return False


def renew(index: Index, card: Card, checked: Checked, place: Place | None = None) -> None:
    """Bring a card up to date with its file."""
    with index.writing() as db:
        _renew(index, db, card, place or card.place, checked)


# The scan


@dataclass
class Look:
    """What a scan knows: what was listed before, what lies there now, and what it did so far."""

    cards: dict[Key, Place]
    others: dict[Key, Place]
    there: dict[Key, Place]
    reached: set[str]
    done: dict[str, int] = field(default_factory=dict[str, int])
    settled: set[str] = field(default_factory=set[str])  # contents that this scan found, by hash
    # a file that took the place of another one; decided last, when it is clear where the other one went
    replaced: list[tuple[Place, Checked]] = field(default_factory=list[tuple[Place, Checked]])

    @property
    def fresh(self) -> list[Place]:
        """Files that are new or look different."""
        return [place for place in self.there.values() if not self.is_old(place)]

    def is_old(self, place: Place) -> bool:
        before = self.others.get(place.key) or self.cards.get(place.key)
        return before is not None and (before.size, before.mtime) == (place.size, place.mtime)

    def stays(self, card: Card) -> bool:
        """Whether the content a card stands for still lies where it was, as far as can be known."""
        if card.state == "away":
            return False
        now = self.there.get(card.place.key)
        if now is not None:
            return card.entry.sha256 in self.settled or self.is_old(now)
        return card.place.folder not in self.reached or not card.entry.missing

    def count(self, what: str) -> None:
        self.done[what] = self.done.get(what, 0) + 1


def scan(index: Index, progress: Callable[[int, int], None] | None = None) -> Scan:
    """Bring the list up to date with the folders; see `Shelf.scan`."""
    look = _look(index)
    fresh = look.fresh
    for start in range(0, len(fresh), BATCH):
        batch = [(place, _checked(index, place)) for place in fresh[start : start + BATCH]]
        with index.writing() as db:
            for place, found in batch:
                _take(index, db, look, place, found)
        if progress:
            progress(min(start + BATCH, len(fresh)), len(fresh))
    with index.writing() as db:
        for place, found in look.replaced:
            _take_over(index, db, look, place, found)
        _forget(index, db, look)
    _reread(index, look)
    return Scan(len(look.there), **look.done)


def _look(index: Index) -> Look:
    with index.reading() as db:
        folders = ["", *(str(folder.path) for folder in _folders(db))]
        cards = db.execute("SELECT folder, file, size, mtime, beside FROM library WHERE state <> 'away'").fetchall()
        others = db.execute("SELECT * FROM library_others").fetchall()
    roots = {name: Path(name) if name else index.home.adapters for name in folders}
    roots = {name: root for name, root in roots.items() if root.is_dir()}  # a drive may not be there today
    there = {place.key: place for name, root in roots.items() for place in walk(name, root)}
    listed = {place.key: place for place in (Place(*row) for row in cards)}
    return Look(listed, {place.key: place for place in map(_place, others)}, there, set(roots))


def walk(folder: str, root: Path) -> Iterator[Place]:
    """Give the adapter files in a folder and below, without opening one; hidden ones are passed over."""
    waiting, seen = [""], set[tuple[int, int]]()
    while waiting:
        inside = waiting.pop()
        try:
            with os.scandir(root / inside) as listing:
                found = {one.name: one for one in listing if not one.name.startswith(".")}
        except OSError:
            continue  # a folder one may not read holds nothing that could be used
        for name, one in found.items():
            with suppress(OSError):  # it went just now
                state = one.stat()
                if name.endswith(ENDING) and one.is_file():
                    company = (found.get(f"{name.removesuffix(ENDING)}{ending}") for ending in ENDINGS)
                    newest = max((other.stat().st_mtime_ns for other in company if other), default=0)
                    yield Place(folder, f"{inside}{name}", state.st_size, state.st_mtime_ns, newest)
                elif one.is_dir() and (state.st_dev, state.st_ino) not in seen and name != "embeddings":
                    seen.add((state.st_dev, state.st_ino))  # links may go in circles
                    waiting.append(f"{inside}{name}/")


def _checked(index: Index, place: Place) -> Checked | IntarsiaError:
    try:
        return check(index, index.path(place))
    except MemoryLimitError:
        raise
    except IntarsiaError as error:
        return error


def _take(index: Index, db: sqlite3.Connection, look: Look, place: Place, found: Checked | IntarsiaError) -> None:
    """Take in one file that is new or changed."""
    db.execute("DELETE FROM library_others WHERE folder = ? AND file = ?", place.key)
    if isinstance(found, IntarsiaError):
        look.count("refused")
        _put_other(db, place, "", found.message, found.hint)
        return
    cards = index.cards(db, "WHERE sha256 = ? ORDER BY state = 'away', id", found.report.sha256)
    here = next((card for card in cards if card.place.key == place.key), None)
    gone = next((card for card in cards if not look.stays(card)), None)
    if here is None and gone is None and cards:
        _put_other(db, place, found.report.sha256, "", "")  # a second copy of what is listed
        return
    if not cards and place.key in look.cards:
        look.replaced.append((place, found))
        return
    look.settled.add(found.report.sha256)
    if here is not None:
        _renew(index, db, here, place, found)
    elif gone is not None:
        look.count("moved")
        _renew(index, db, gone, place, found)
    else:
        _insert(index, db, look, place, found)


def _take_over(index: Index, db: sqlite3.Connection, look: Look, place: Place, found: Checked) -> None:
    """A file whose content is new at a known place: the card stays with the place, unless its content moved on."""
    here = index.cards(db, "WHERE folder = ? AND file = ?", *place.key)
    if here:
        look.count("changed")
        # one in the trash is another file now, which nobody threw away
        _renew(index, db, replace(here[0], state="away") if here[0].state == "trash" else here[0], place, found)
    else:
        _insert(index, db, look, place, found)


def _insert(index: Index, db: sqlite3.Connection, look: Look, place: Place, found: Checked) -> None:
    look.count("new")
    where = f"lies in {place.folder}" if place.folder else "was put into the library's folder"
    entry = describe(found, free_name(db, slug_of(Path(place.file))), where)
    index.put(db, Card(0, entry, place))


def _renew(index: Index, db: sqlite3.Connection, card: Card, place: Place, found: Checked) -> None:
    entry = renewed(card.entry, describe(found, card.entry.name, card.entry.source))
    card = replace(card, entry=entry, place=place)
    if card.state == "away":
        relisted(index, db, card)
    else:
        index.put(db, card)


def _forget(index: Index, db: sqlite3.Connection, look: Look) -> None:
    """Drop what was seen and is gone; a card whose file is gone goes on with a second copy, if there is one."""
    for place in look.others.values():
        if place.folder in look.reached and place.key not in look.there:
            db.execute("DELETE FROM library_others WHERE folder = ? AND file = ?", place.key)
    for key, place in look.cards.items():
        if key in look.there or place.folder not in look.reached:
            continue
        for card in index.cards(db, "WHERE folder = ? AND file = ? AND state <> 'trash'", *key):
            asked = "SELECT * FROM library_others WHERE sha256 = ? AND refusal = '' LIMIT 1"
            copy = db.execute(asked, (card.entry.sha256,)).fetchone()
            look.count("moved" if copy else "missing")
            if copy:
                index.put(db, replace(card, place=_place(copy)))
                db.execute("DELETE FROM library_others WHERE folder = ? AND file = ?", _place(copy).key)


def _reread(index: Index, look: Look) -> None:
    """Read pictures and texts that were put beside files that did not change themselves."""
    for place in look.there.values():
        before = look.cards.get(place.key)
        if before is None or before.beside == place.beside or not look.is_old(place):
            continue
        with index.reading() as db:
            cards = index.cards(db, "WHERE folder = ? AND file = ?", *place.key)
        for card in cards:
            found = _checked(index, place)
            if isinstance(found, Checked):
                renew(index, card, found, place)


def _place(row: sqlite3.Row) -> Place:
    return Place(row["folder"], row["file"], row["size"], row["mtime"])


def _put_other(db: sqlite3.Connection, place: Place, sha256: str, refusal: str, hint: str) -> None:
    values = (place.folder, place.file, place.size, place.mtime, sha256, refusal, hint)
    db.execute("INSERT OR REPLACE INTO library_others VALUES (?, ?, ?, ?, ?, ?, ?)", values)
