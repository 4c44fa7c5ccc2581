"""The library of adapter files: checked, identified, copied under the studio's home, listed in its database."""

from __future__ import annotations

import base64
import binascii
import json
import re
import shutil
import sqlite3
import time
from collections.abc import Generator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..pipelines.adapter_types import Role
from ..pipelines.atomic import replacing
from ..pipelines.errors import AdapterError, InputError, MemoryLimitError
from ..pipelines.headers import hashes, read_header, write_subset
from ..pipelines.identify import Report, half_tensors, inspect
from .settings import Home

SCHEMA = """CREATE TABLE IF NOT EXISTS adapters (
    name TEXT PRIMARY KEY COLLATE NOCASE, sha256 TEXT NOT NULL, file TEXT NOT NULL, created REAL NOT NULL,
    card TEXT NOT NULL)"""
MAX_NAME = 80
THUMBNAIL = re.compile(r"data:image/(?:png|jpeg|webp);base64,([A-Za-z0-9+/=\s]+)")
MAX_THUMBNAIL = 2**21  # characters of base64
THUMBNAIL_SIDE = 512  # pixels


@dataclass(frozen=True)
class Entry:
    """One adapter of the library, or a file that was named by its path.

    Args:
        name: Unique in the library, no dots or colons in it.
        path: The file; `missing` tells whether it is still there.
        modules: Layers in the file; `matched` of them are known in the family.
        group: Shared by the halves of one B-LoRA, else "".
        halves: Halves it can be split into.
        created: Seconds since 1970.
        thumbnail: A picture, or None.
    """

    name: str
    path: Path
    family: str
    algorithm: str
    rank: int
    role: Role
    trigger: str
    sha256: str
    base: str
    modules: int
    matched: int
    size: int
    created: float
    group: str = ""
    halves: tuple[Role, ...] = ()
    triggers: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    thumbnail: Path | None = None

    @property
    def missing(self) -> bool:
        return not self.path.is_file()


class Shelf:
    """The library. Safe to use from several processes: every call is one short transaction.

    Args:
        home: Where database and files are.
    """

    def __init__(self, home: Home) -> None:
        self._home = home

    def add(
        self,
        path: Path,
        name: str | None = None,
        *,
        replace: bool = False,
        numbered: bool = False,
        group: str = "",
        thumbnail: Path | None = None,
    ) -> Entry:
        """Check a file, copy it into the library and list it. A file that is already there gives its entry.

        Args:
            path: A .safetensors file.
            name: What to call it; the file's own name if not given.
            replace: Take the place of an entry of that name.
            numbered: If the name is taken, put a number behind it.
            group: Marks entries that belong together, such as B-LoRA halves.
            thumbnail: A picture to show; without it the file's own, if it has one.

        Raises:
            AdapterError: The file cannot be used here.
            InputError: The name is taken or cannot be a name.
            MemoryLimitError: The disk is full; nothing is left half-written.
        """
        report = inspect(path)
        report.require_usable()
        known = self._by_hash(report.sha256)
        if known is not None and not known.missing:
            return known
        slug = make_slug(name or (known.name if known else path.stem))
        if known is None or known.name.lower() != slug.lower():
            slug = self._free(slug, replace, numbered)
        target = self._home.adapters / f"{slug}.safetensors"
        with _disk(slug), replacing(target) as temporary:
            shutil.copyfile(path, temporary)
            if hashes(read_header(temporary))[0] != report.sha256:
                raise AdapterError(f"{path.name} changed while it was copied.", "Try again.")
            entry = _entry(slug, target, report, group, self._thumbnail(slug, report, thumbnail))
            self._store(entry)  # before the file takes its place: what cannot be listed is not kept
        return entry

    def entries(self) -> list[Entry]:
        """Every entry, oldest first; `missing` ones too, so that a person learns of a lost file."""
        with self._open() as database:
            rows = database.execute("SELECT card FROM adapters ORDER BY created, name").fetchall()
        return [self._read(row[0]) for row in rows]

    def find(self, name_or_path: str | Path) -> Entry:
        """Give the entry of a name (adapters that come with Intarsia have one too), or describe the file at a path.

        Raises:
            AdapterError: There is no such entry or file (with names that are near), or its file is gone or unusable.
        """
        text = str(name_or_path)
        with self._open() as database:
            row = database.execute("SELECT card FROM adapters WHERE name = ?", (text,)).fetchone()
        if row:
            entry = self._read(row[0])
            if entry.missing:
                raise AdapterError(
                    f"The file of {entry.name} is gone from {entry.path.parent}.", "Import it again, or remove it."
                )
            return entry
        bundled = Path(str(files("intarsia.assets"))) / "adapters" / f"{text}.safetensors"
        if re.fullmatch(r"[\w-]+", text) and bundled.is_file():
            return self.add(bundled)  # one that comes along enters the library when it is first asked for
        path = Path(text).expanduser()
        if path.is_file():
            report = inspect(path)
            report.require_usable()
            return _entry(make_slug(path.stem), path, report, "", None)
        raise self._unknown(text, path)

    def remove(self, name: str) -> None:
        """Take an entry out and delete its copy; the file it was imported from stays.

        Raises:
            AdapterError: There is no entry of that name.
        """
        with self._open() as database:
            row = database.execute("SELECT card FROM adapters WHERE name = ?", (name,)).fetchone()
            if row is None:
                raise self._unknown(name, Path(name))
            database.execute("DELETE FROM adapters WHERE name = ?", (name,))
        entry = self._read(row[0])
        for path in (entry.path, entry.thumbnail):
            if path is not None:
                path.unlink(missing_ok=True)

    def inspect(self, name_or_path: str | Path) -> Report:
        """Say everything about an entry's file, or a file that is not in the library; unusable ones too.

        Raises:
            AdapterError: There is no such entry or file, or it is no sound safetensors file.
        """
        path = Path(name_or_path).expanduser()
        return inspect(path if path.is_file() else self.find(name_or_path).path)

    def split(self, name: str) -> tuple[Entry, Entry]:
        """Cut a B-LoRA file that holds both halves into two entries, NAME-content and NAME-style; NAME stays.

        Raises:
            AdapterError: The entry does not hold both halves.
        """
        entry = self.find(name)
        header = read_header(entry.path)
        if len(entry.halves) < 2:
            raise AdapterError(f"{entry.name} does not hold a content and a style half.")
        made: list[Entry] = []
        for role in ("content", "style"):
            texts = {**header.metadata, "intarsia.role": role}
            part = self._home.adapters / f".{entry.name}-{role}.safetensors"
            try:
                with _disk(entry.name), replacing(part) as temporary:
                    write_subset(header, half_tensors(header, role), texts, temporary)
                made.append(self.add(part, f"{entry.name}-{role}", numbered=True, group=entry.name))
            finally:
                part.unlink(missing_ok=True)
        return made[0], made[1]

    # Inside

    def _free(self, slug: str, replace: bool, numbered: bool) -> str:
        taken = {entry.name.lower() for entry in self.entries()}
        if slug.lower() not in taken or replace:
            return slug
        free = next(name for n in range(2, 10_000) if (name := f"{slug}-{n}").lower() not in taken)
        if numbered:
            return free
        raise InputError(
            f"The library already has another adapter called {slug}.",
            f"Choose another name, such as {free}, or replace it.",
        )

    def _by_hash(self, sha256: str) -> Entry | None:
        with self._open() as database:
            row = database.execute("SELECT card FROM adapters WHERE sha256 = ?", (sha256,)).fetchone()
        return self._read(row[0]) if row else None

    def _store(self, entry: Entry) -> None:
        values = asdict(entry)
        values["path"] = entry.path.name  # relative: a home may be moved
        values["thumbnail"] = entry.thumbnail.name if entry.thumbnail else None
        with self._open() as database:
            database.execute(
                "INSERT OR REPLACE INTO adapters VALUES (?, ?, ?, ?, ?)",
                (entry.name, entry.sha256, entry.path.name, entry.created, json.dumps(values)),
            )

    def _read(self, text: str) -> Entry:
        values: dict[str, Any] = json.loads(text)
        folder = self._home.adapters
        values["path"] = folder / values["path"]
        values["thumbnail"] = folder / values["thumbnail"] if values["thumbnail"] else None
        for name in ("halves", "triggers", "warnings"):
            values[name] = tuple(values[name])
        return Entry(**values)

    def _unknown(self, text: str, path: Path) -> AdapterError:
        if path.suffix or len(path.parts) > 1:
            return AdapterError(f"There is no adapter file {text}.", "Check the path.")
        names = [entry.name for entry in self.entries()]
        near = get_close_matches(text, names, cutoff=0.4) or names[:5]
        hint = f"Did you mean {', '.join(near)}?" if near else "The library is empty: import a file first."
        return AdapterError(f"There is no adapter called {text} in the library.", hint)

    def _thumbnail(self, slug: str, report: Report, given: Path | None) -> Path | None:
        """Store a small re-encoded copy of a given picture, or of the one a stranger put into the file."""
        from ..pipelines.picture import open_picture

        source: Path | bytes | None = given or _embedded(report.metadata.get("modelspec.thumbnail", ""))
        if source is None:
            return None
        try:
            picture = open_picture(source, 4096 * 4096)
        except InputError:
            if given is not None:
                raise
            return None  # a broken picture inside a sound adapter is no reason to refuse it
        picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        target = self._home.adapters / f"{slug}.webp"
        with _disk(slug), replacing(target) as temporary:
            picture.save(temporary, format="WEBP", quality=90)
        return target

    @contextmanager
    def _open(self) -> Generator[sqlite3.Connection]:
        """One connection and one transaction."""
        self._home.root.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self._home.database, timeout=10)) as database:
            with suppress(sqlite3.OperationalError):  # another process is switching it right now
                database.execute("PRAGMA journal_mode = WAL")
            database.execute(SCHEMA)
            with database:
                yield database


@contextmanager
def _disk(name: str) -> Generator[None]:
    """SQLite has its own word for a full disk."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "full" not in str(error):
            raise
        raise MemoryLimitError(f"The disk is full: {name} could not be listed.", "Free some space.") from None


def _embedded(text: str) -> bytes | None:
    found = THUMBNAIL.fullmatch(text) if 0 < len(text) <= MAX_THUMBNAIL else None
    if found is None:
        return None
    try:
        return base64.b64decode(found[1], validate=False)
    except binascii.Error:
        return None


def _entry(name: str, path: Path, report: Report, group: str, thumbnail: Path | None) -> Entry:
    return Entry(
        name=name,
        path=path,
        family=report.family,
        algorithm=report.algorithm,
        rank=report.rank,
        role=report.role,
        trigger=report.trigger,
        sha256=report.sha256,
        base=report.base,
        modules=report.modules,
        matched=report.matched,
        size=report.size,
        created=time.time(),
        group=group,
        halves=report.halves,
        triggers=report.triggers,
        warnings=report.warnings,
        thumbnail=thumbnail,
    )


def make_slug(text: str) -> str:
    """Make a name that can be a file name, an adapter name and part of NAME:WEIGHT: letters, digits, `-` and `_`.

    Raises:
        InputError: Nothing is left of it, or it is too long.
    """
    slug = re.sub(r"[^\w]+", "-", text).strip("-_")
    if not slug:
        raise InputError(f"{text!r} cannot be a name.", "Use letters and digits.")
    if len(slug) > MAX_NAME:
        raise InputError(f"The name {slug[:20]}... has {len(slug)} characters; at most {MAX_NAME} are possible.", "")
    return slug
