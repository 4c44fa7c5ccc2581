"""The library's tables in the studio's database: schema, taking over the older table, cards in and out.

A card is a row of `library`; it stands for the content of a file (its SHA-256) and knows where that lies. Files that
were seen and are not listed (refused ones, second copies) are rows of `library_others`.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Generator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..pipelines.errors import MemoryLimitError
from .library_entry import Entry
from .settings import Home

# "away": its folder is not watched any more; the card waits for its return.
State = Literal["listed", "trash", "away"]
SCHEMA = """
CREATE TABLE IF NOT EXISTS library (
    id INTEGER PRIMARY KEY, state TEXT NOT NULL, name TEXT NOT NULL COLLATE NOCASE,
    folder TEXT NOT NULL, file TEXT NOT NULL, size INTEGER NOT NULL, mtime INTEGER NOT NULL, beside INTEGER NOT NULL,
    sha256 TEXT NOT NULL, family TEXT NOT NULL, algorithm TEXT NOT NULL, rank INTEGER NOT NULL, role TEXT NOT NULL,
    base TEXT NOT NULL, trigger TEXT NOT NULL, "group" TEXT NOT NULL, title TEXT NOT NULL, author TEXT NOT NULL,
    licence TEXT NOT NULL, notes TEXT NOT NULL, source TEXT NOT NULL, favourite INTEGER NOT NULL,
    confidence TEXT NOT NULL, modules INTEGER NOT NULL, matched INTEGER NOT NULL, created REAL NOT NULL,
    thumbnail TEXT, facts TEXT NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS library_by_name ON library (name) WHERE state = 'listed';
CREATE INDEX IF NOT EXISTS library_by_place ON library (folder, file);
CREATE INDEX IF NOT EXISTS library_by_hash ON library (sha256);
CREATE INDEX IF NOT EXISTS library_by_group ON library ("group");
CREATE INDEX IF NOT EXISTS library_by_age ON library (state, created);
CREATE INDEX IF NOT EXISTS library_by_size ON library (state, size);
CREATE INDEX IF NOT EXISTS library_by_family ON library (state, family, algorithm);
CREATE TABLE IF NOT EXISTS library_tags (
    adapter INTEGER NOT NULL, tag TEXT NOT NULL COLLATE NOCASE, PRIMARY KEY (adapter, tag)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS library_by_tag ON library_tags (tag);
CREATE TABLE IF NOT EXISTS library_others (
    folder TEXT NOT NULL, file TEXT NOT NULL, size INTEGER NOT NULL, mtime INTEGER NOT NULL, sha256 TEXT NOT NULL,
    refusal TEXT NOT NULL, hint TEXT NOT NULL, PRIMARY KEY (folder, file)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS library_folders (path TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS library_decisions (tensor_sha256 TEXT PRIMARY KEY, family TEXT NOT NULL) WITHOUT ROWID;
CREATE VIRTUAL TABLE IF NOT EXISTS library_words USING fts5 (
    name, words, tags, notes, base, tokenize = "unicode61 remove_diacritics 2", prefix = "1 2 3");
"""
PLAIN = (
    *("name", "sha256", "family", "algorithm", "rank", "role", "base", "trigger", "group", "title", "author"),
    *("licence", "notes", "source", "confidence", "modules", "matched", "size", "created", "folder"),
)  # fields that are columns
FACTS = ("halves", "triggers", "warnings", "dtypes", "ranks", "alpha", "description", "weight")  # shown, never searched
COLUMNS = (*PLAIN, "id", "state", "file", "mtime", "beside", "favourite", "thumbnail", "facts")
SELECT = "SELECT *, (SELECT json_group_array(tag) FROM library_tags WHERE adapter = library.id) AS tags FROM library "
QUOTED = [f'"{name}"' for name in COLUMNS]
PUT = (
    f"INSERT INTO library ({', '.join(QUOTED)}) VALUES ({', '.join(f':{name}' for name in COLUMNS)})"
    f" ON CONFLICT (id) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in QUOTED)}"
)


@dataclass(frozen=True)
class Place:
    """Where a file lies, and how it looked when it was last read.

    Args:
        folder: "" for the studio's own adapters, else an absolute path.
        file: Inside the folder, with `/`.
        size: Bytes.
        mtime: Nanoseconds, as is `beside`: of the newest picture or text that belongs to it, 0 if there is none.
    """

    folder: str
    file: str
    size: int
    mtime: int
    beside: int = 0

    @property
    def key(self) -> tuple[str, str]:
        return self.folder, self.file


@dataclass(frozen=True)
class Card:
    """A row: an entry, where it lies, and whether it is shown. One that is not in the table yet has the id 0."""

    id: int
    entry: Entry
    place: Place
    state: State = "listed"


class Index:
    """Opens the database: every block is one short transaction on a connection of its own.

    Args:
        home: Where the database is.
    """

    def __init__(self, home: Home) -> None:
        self.home = home

    @contextmanager
    def reading(self) -> Generator[sqlite3.Connection]:
        """One state of the library, whatever others write meanwhile."""
        with self._open("BEGIN") as db:
            yield db

    @contextmanager
    def writing(self) -> Generator[sqlite3.Connection]:
        """One transaction, kept when the block ends well.

        Raises:
            MemoryLimitError: The disk is full; nothing was changed.
        """
        try:
            with self._open("BEGIN IMMEDIATE") as db:
                yield db
        except sqlite3.OperationalError as error:  # SQLite has its own word for a full disk
            if "full" not in str(error):
                raise
            raise MemoryLimitError("The disk is full: the library could not be changed.", "Free some space.") from None

    @contextmanager
    def _open(self, begin: str) -> Generator[sqlite3.Connection]:
        self.home.root.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self.home.database, timeout=20, isolation_level=None)) as db:
            db.row_factory = sqlite3.Row
            with suppress(sqlite3.OperationalError):  # another process is switching it right now
                db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")  # with WAL: no disk flush per card, never a broken file
            self._prepare(db)
            with db:  # rolls back on the way out of an error
                db.execute(begin)
                yield db

    def path(self, place: Place) -> Path:
        return (Path(place.folder) if place.folder else self.home.root / "adapters") / place.file

    # Cards

    def cards(self, db: sqlite3.Connection, where: str, *values: object) -> list[Card]:
        """Read the cards of a condition."""
        return [self._card(row) for row in db.execute(f"{SELECT} {where}", values)]

    def put(self, db: sqlite3.Connection, card: Card) -> Entry:
        """Write a card; the tags of a new one too, else they change by `tag` alone."""
        entry, place = card.entry, card.place
        values: dict[str, Any] = {name: getattr(entry, name) for name in PLAIN} | {
            "id": card.id or None,
            "state": card.state,
        }
        values |= {"folder": place.folder, "file": place.file, "size": place.size}
        values |= {"mtime": place.mtime, "beside": place.beside, "favourite": int(entry.favourite)}
        values["thumbnail"] = entry.thumbnail.relative_to(self.home.root).as_posix() if entry.thumbnail else None
        values["facts"] = json.dumps({name: getattr(entry, name) for name in FACTS})
        made = db.execute(PUT, values).lastrowid
        return self._reworded(db, card.id) if card.id else self.tag(db, made or 0, entry.tags)

    def tag(self, db: sqlite3.Connection, row: int, add: tuple[str, ...], remove: tuple[str, ...] = ()) -> Entry:
        """Add and remove tags."""
        db.executemany("DELETE FROM library_tags WHERE adapter = ? AND tag = ?", [(row, tag) for tag in remove])
        db.executemany("INSERT OR IGNORE INTO library_tags VALUES (?, ?)", [(row, tag) for tag in add])
        return self._reworded(db, row)

    def _reworded(self, db: sqlite3.Connection, row: int) -> Entry:
        """Bring what is searched up to date with a card."""
        entry = self.cards(db, "WHERE id = ?", row)[0].entry
        # "DetailTweakerXL" is found by "tweaker" too
        spoken = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Za-z])(?=\d)", " ", entry.name)
        texts = (
            f"{entry.name} {spoken} {entry.title}",
            " ".join((entry.trigger, *entry.triggers)),
            " ".join(entry.tags),
            f"{entry.notes} {entry.description}",
            f"{entry.base} {entry.author}",
        )
        db.execute("DELETE FROM library_words WHERE rowid = ?", (row,))
        columns = "(rowid, name, words, tags, notes, base)"
        db.execute(f"INSERT INTO library_words {columns} VALUES (?, ?, ?, ?, ?, ?)", (row, *texts))
        return entry

    def delete(self, db: sqlite3.Connection, row: int) -> None:
        db.execute("DELETE FROM library WHERE id = ?", (row,))
        db.execute("DELETE FROM library_tags WHERE adapter = ?", (row,))
        db.execute("DELETE FROM library_words WHERE rowid = ?", (row,))

    def _card(self, row: sqlite3.Row) -> Card:
        place = Place(row["folder"], row["file"], row["size"], row["mtime"], row["beside"])
        values: dict[str, Any] = {name: row[name] for name in PLAIN} | json.loads(row["facts"])
        for name in ("halves", "triggers", "warnings", "dtypes", "alpha"):
            values[name] = tuple(values[name])
        values["ranks"] = tuple((rank, number) for rank, number in values["ranks"])
        entry = Entry(
            **values,
            path=self.path(place),
            thumbnail=self.home.root / row["thumbnail"] if row["thumbnail"] else None,
            tags=tuple(sorted(json.loads(row["tags"]), key=str.lower)),
            favourite=bool(row["favourite"]),
            trashed=row["state"] == "trash",
        )
        return Card(row["id"], entry, place, row["state"])

    # Making the tables

    def _prepare(self, db: sqlite3.Connection) -> None:
        """Make the tables where they are not there yet."""
        if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'library_words'").fetchone():
            return
        with db:
            db.execute("BEGIN IMMEDIATE")
            for statement in SCHEMA.split(";"):
                db.execute(statement)
            self._take_over(db)

    def _take_over(self, db: sqlite3.Connection) -> None:
        """Move the cards of the older table, a JSON text each, into the new one; a scan fills in what they lacked."""
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'adapters'").fetchone():
            return
        for (text,) in db.execute("SELECT card FROM adapters ORDER BY created, name").fetchall():
            values: dict[str, Any] = json.loads(text)
            place = Place("", values.pop("path"), values["size"], 0)
            picture = values.pop("thumbnail", None)
            thumbnail = self.home.root / "adapters" / picture if picture else None
            self.put(db, Card(0, Entry(**values, path=self.path(place), thumbnail=thumbnail), place))
        db.execute("DROP TABLE adapters")


def free_name(db: sqlite3.Connection, slug: str) -> str:
    """Give the name itself, or with the first number that makes it free."""
    rows = db.execute(
        "SELECT name FROM library WHERE state = 'listed' AND (name = ?1 OR name LIKE ?1 || '-%')", (slug,)
    )
    taken = {row[0].lower() for row in rows}
    numbered = (f"{slug}-{number}" for number in range(2, len(taken) + 3))
    return next(name for name in (slug, *numbered) if name.lower() not in taken)
