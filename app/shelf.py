"""The library of adapter files: checked, identified, kept under the studio's home or in place, found again."""

from __future__ import annotations

import re
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from ..pipelines.adapter_types import Role
from ..pipelines.atomic import replacing
from ..pipelines.errors import AdapterError, InputError, printable
from ..pipelines.headers import read_header, write_subset
from ..pipelines.identify import Report, half_tensors
from . import library_folders as folders
from .library_checks import Checked, adapter_files, check, describe, examine, inspect_as, remember
from .library_entry import (
    MAX_TAGS,
    Change,
    Entry,
    Folder,
    Outcome,
    Page,
    Query,
    Refused,
    Scan,
    make_slug,
    slug_of,
)
from .library_import import Wish, bring_in, relisted
from .library_index import Card, Index
from .library_pictures import write_png
from .library_query import page
from .library_sidecars import beside, write_card
from .settings import Home

__all__ = ["Change", "Entry", "Page", "Query", "Shelf", "make_slug"]


class Shelf:
    """The library. Safe to use from several processes: every call is one short transaction.

    Args:
        home: Where database and files are.
    """

    def __init__(self, home: Home) -> None:
        self._home = home
        self._index = Index(home)

    # In

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
            replace: Take the place of an entry of that name, which goes to the trash.
            numbered: If the name is taken, put a number behind it.
            group: Marks entries that belong together, such as B-LoRA halves.
            thumbnail: A picture to show; without it the file's own, if it has one.

        Raises:
            AdapterError: The file cannot be used here.
            InputError: The name is taken or cannot be a name.
            MemoryLimitError: The disk is full; nothing is left half-written.
        """
        return self._bring(Wish(path, name, replace, numbered, group, thumbnail))

    def add_all(self, paths: Iterable[Path], family: str = "") -> Iterator[Outcome]:
        """Bring in many files and what folders hold, each on its own; tells what became of each as it goes.

        Args:
            paths: Files and folders.
            family: What a person says they are for, as with `decide`; "" for what the files tell.

        Raises:
            MemoryLimitError: The disk is full; what was told before is listed.
        """
        return bring_in(self._index, (Wish(path, numbered=True, family=family) for path in adapter_files(paths)))

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
        roles: tuple[Role, ...] = ("content", "style")
        for role in roles:
            texts = {**header.metadata, "intarsia.role": role}
            part = self._home.adapters / f".{entry.name}-{role}.safetensors"
            try:
                with replacing(part) as temporary:
                    write_subset(header, half_tensors(header, role), texts, temporary)
                wish = Wish(part, f"{entry.name}-{role}", numbered=True, group=entry.name)
                made.append(self._bring(replace(wish, source=f"cut from {entry.name}")))
            finally:
                part.unlink(missing_ok=True)
        return made[0], made[1]

    def _bring(self, wish: Wish) -> Entry:
        outcome = next(bring_in(self._index, [wish]))
        if outcome.entry is None:
            raise outcome.error or AdapterError(f"{wish.path.name} could not be listed.")
        return outcome.entry

    # Looking

    def page(self, query: Query) -> Page:
        """Search, filter and sort; gives a part of what was found, and counts."""
        return page(self._index, query)

    def entries(self) -> list[Entry]:
        """Everything that is listed, oldest first; `missing` ones too, so that a person learns of a lost file."""
        with self._index.reading() as db:
            return [card.entry for card in self._index.cards(db, "WHERE state = 'listed' ORDER BY created, id")]

    def group(self, name: str) -> list[Entry]:
        """Give the entries of a group, such as the halves that were cut from an entry."""
        with self._index.reading() as db:
            cards = self._index.cards(db, "WHERE state = 'listed' AND \"group\" = ? ORDER BY created, id", name)
        return [card.entry for card in cards]

    def find(self, name_or_path: str | Path) -> Entry:
        """Give the entry of a name (adapters that come with Intarsia have one too), or describe the file at a path.

        Raises:
            AdapterError: There is no such entry or file (with names that are near), or its file is gone or unusable.
        """
        text = str(name_or_path)
        with self._index.reading() as db:
            cards = self._index.cards(db, "WHERE state = 'listed' AND name = ?", printable(text))
        if cards:
            entry = cards[0].entry
            if entry.missing:
                raise AdapterError(
                    f"The file of {entry.name} is gone from {entry.path.parent}.", "Import it again, or remove it."
                )
            return entry
        bundled = Path(str(files("intarsia.assets"))) / "adapters" / f"{text}.safetensors"
        if re.fullmatch(r"[\w-]+", text) and bundled.is_file():  # enters the library when it is first asked for
            return self._bring(Wish(bundled, source="comes with Intarsia"))
        path = Path(text).expanduser()
        if path.is_file():
            report = examine(self._index, path)
            report.require_usable()
            return describe(Checked(path, report, beside(path), None), slug_of(path), "")
        raise self._unknown(text)

    def inspect(self, name_or_path: str | Path, family: str = "") -> Report:
        """Say everything about an entry's file, or a file that is not in the library; unusable ones too.

        Args:
            name_or_path: Which.
            family: Hold it against this one, as if a person had decided so.

        Raises:
            AdapterError: There is no such entry or file, or it is no sound safetensors file.
        """
        path = Path(name_or_path).expanduser()
        report = examine(self._index, path if path.is_file() else self.find(name_or_path).path)
        return inspect_as(report, family) if family else report

    def decide(self, name_or_path: str | Path, family: str) -> Report:
        """Remember which family a file is for; it counts now and whenever the same tensors come again.

        Raises:
            AdapterError: The family contradicts the file's shapes, or the file cannot be used.
            InputError: There is no such family.
        """
        report = self.inspect(name_or_path, family)
        remember(self._index, report, family)
        with self._index.reading() as db:
            cards = self._index.cards(db, "WHERE sha256 = ?", report.sha256)
        for card in cards:
            if not card.entry.missing:
                folders.renew(self._index, card, check(self._index, card.entry.path))
        return report

    # A person's changes

    def edit(self, name: str, change: Change) -> Entry:
        """Change a card, all of it or nothing.

        Raises:
            AdapterError: There is no entry of that name.
            InputError: The new name is taken, or there are too many tags.
        """
        with self._index.writing() as db:
            card = self._listed(db, name)
            new = make_slug(change.name) if change.name is not None else card.entry.name
            others = "SELECT 1 FROM library WHERE state = 'listed' AND name = ? AND id <> ?"
            if db.execute(others, (new, card.id)).fetchone():
                raise InputError(f"The library already has another adapter called {new}.", "Choose another name.")
            texts = {"notes": change.notes, "licence": change.licence, "trigger": change.trigger}
            given = {field: text.strip() for field, text in texts.items() if text is not None}
            favourite = card.entry.favourite if change.favourite is None else change.favourite
            entry = replace(card.entry, name=new, favourite=favourite, **given)
            self._index.put(db, replace(card, entry=entry))
            db.execute('UPDATE library SET "group" = ? WHERE "group" = ?', (new, card.entry.name))
            entry = self._index.tag(db, card.id, change.tag, change.untag)
            if len(entry.tags) > MAX_TAGS:
                raise InputError(f"{new} would have more than {MAX_TAGS} tags.", "Remove some first.")
            return entry

    def favourite(self, name: str, on: bool = True) -> Entry:
        return self.edit(name, Change(favourite=on))

    def tag(self, name: str, tags: Iterable[str]) -> Entry:
        return self.edit(name, Change(tag=tuple(tags)))

    def untag(self, name: str, tags: Iterable[str]) -> Entry:
        return self.edit(name, Change(untag=tuple(tags)))

    def note(self, name: str, text: str) -> Entry:
        return self.edit(name, Change(notes=text))

    def rename(self, name: str, new: str) -> Entry:
        """Call an entry something else; its file stays where and what it is."""
        return self.edit(name, Change(name=new))

    # Out

    def remove(self, name: str) -> None:
        """Move an entry to the trash. Its file stays until the trash is emptied, a file in a foreign folder always.

        Raises:
            AdapterError: There is no entry of that name.
        """
        with self._index.writing() as db:
            db.execute("UPDATE library SET state = 'trash' WHERE id = ?", (self._listed(db, name).id,))

    def restore(self, name: str) -> Entry:
        """Take an entry out of the trash, the last one of that name; it gets a number if its name was taken meanwhile.

        Raises:
            AdapterError: There is none in the trash.
        """
        with self._index.writing() as db:
            cards = self._index.cards(db, "WHERE state = 'trash' AND name = ? ORDER BY id DESC", name)
            if not cards:
                raise AdapterError(f"There is no adapter called {name} in the trash.", "Look with --trash.")
            return relisted(self._index, db, cards[0])

    def empty_trash(self) -> int:
        """Delete what lies in the trash for good; files in foreign folders stay, and are not listed again.

        Returns:
            How many entries went.
        """
        with self._index.reading() as db:
            cards = self._index.cards(db, "WHERE state = 'trash'")
        return sum(self._delete(card) for card in cards)

    def _delete(self, card: Card) -> bool:
        with self._index.writing() as db:
            if not self._index.cards(db, "WHERE state = 'trash' AND id = ?", card.id):
                return False  # somebody took it out just now
            if card.place.folder:
                folders.leave_out(db, card)
            elif folders.holds(card):
                card.entry.path.unlink(missing_ok=True)  # before its card: else a scan would list it again
            self._index.delete(db, card.id)
            picture = card.entry.thumbnail
            if picture and not self._index.cards(db, "WHERE sha256 = ? LIMIT 1", card.entry.sha256):
                picture.unlink(missing_ok=True)
        return True

    def export(self, names: Iterable[str], folder: Path) -> list[Path]:
        """Write entries as files for other studios: the adapter, a NAME.json about it, and its picture.

        Raises:
            AdapterError: There is no such entry, or its file is gone.
            InputError: The folder is not there, or a file of that name is; nothing was written.
        """
        entries = [self.find(name) for name in dict.fromkeys(names)]
        if not folder.is_dir():
            raise InputError(f"There is no folder {folder}.", "Make it first.")
        endings = (".safetensors", ".json", ".preview.png")
        for entry in entries:
            for ending in endings[: 3 if entry.thumbnail else 2]:
                if (target := folder / f"{entry.name}{ending}").exists():
                    raise InputError(f"{target} is there already; nothing was written.", "Choose another folder.")
        for entry in entries:
            if entry.thumbnail and entry.thumbnail.is_file():
                write_png(entry.thumbnail, folder / f"{entry.name}.preview.png")
            write_card(entry, folder / f"{entry.name}.json")
            with replacing(folder / f"{entry.name}.safetensors") as temporary:
                shutil.copyfile(entry.path, temporary)
        return [folder / f"{entry.name}.safetensors" for entry in entries]

    # Folders

    def scan(self, progress: Callable[[int, int], None] | None = None) -> Scan:
        """Look into the studio's own and all foreign folders, and bring the list up to date.

        Args:
            progress: Told the number of files read and to be read.
        """
        return folders.scan(self._index, progress)

    def refused(self) -> list[Refused]:
        """List the files in watched folders that cannot be used, and why."""
        return folders.refused(self._index)

    def folders(self) -> list[Folder]:
        """List the foreign folders."""
        return folders.known(self._index)

    def add_folder(self, path: Path) -> list[Path]:
        """Watch a folder and list its files in place; of another studio's own folder, those that hold adapters.

        Returns:
            The folders that are watched from now on; `scan` lists their files.

        Raises:
            InputError: It is no folder, or lies in or around one that is watched.
        """
        return folders.add(self._index, path)

    def remove_folder(self, path: Path) -> None:
        """Stop watching a folder; its cards come back with it.

        Raises:
            InputError: It is not watched.
        """
        folders.remove(self._index, path)

    # Inside

    def _listed(self, db: sqlite3.Connection, name: str) -> Card:
        cards = self._index.cards(db, "WHERE state = 'listed' AND name = ?", name)
        if not cards:
            raise self._unknown(name)
        return cards[0]

    def _unknown(self, text: str) -> AdapterError:
        if Path(text).suffix or len(Path(text).parts) > 1:
            return AdapterError(f"There is no adapter file {text}.", "Check the path.")
        with self._index.reading() as db:
            names = [row[0] for row in db.execute("SELECT name FROM library WHERE state = 'listed' ORDER BY id")]
            trashed = db.execute("SELECT 1 FROM library WHERE state = 'trash' AND name = ?", (text,)).fetchone()
        near = get_close_matches(text, names, cutoff=0.4) or names[:5]
        hint = f"Did you mean {', '.join(near)}?" if near else "The library is empty: import a file first."
        if trashed:
            hint = f"It lies in the trash: restore it with intarsia adapters restore {text}."
        return AdapterError(f"There is no adapter called {text} in the library.", hint)
