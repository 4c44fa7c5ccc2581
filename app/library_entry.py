"""What the library tells and how it is asked: entries, queries and pages, changes, outcomes of imports and scans."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from ..pipelines.errors import InputError, IntarsiaError

if TYPE_CHECKING:
    from ..pipelines.adapter_types import Role

Sort = Literal["newest", "name", "size"]
SORTS: tuple[Sort, ...] = get_args(Sort)
MAX_NAME = 80
MAX_TAG = 40  # characters, as the limits below
MAX_TAGS = 50  # of one adapter
MAX_LINE = 300  # trigger words, licence
MAX_NOTES = 10_000


@dataclass(frozen=True)
class Entry:
    """One adapter of the library, or a file that was named by its path.

    Args:
        name: Unique among what is listed, no dots or colons in it.
        path: The file; `missing` tells whether it is still there.
        modules: Layers in the file; `matched` of them are known in the family.
        group: Shared by the halves of one B-LoRA, else "".
        halves: Halves it can be split into.
        created: When it came into the library, in seconds since 1970.
        thumbnail: A picture, or None.
        tags: A person's own, in alphabetical order.
        licence: As the file or a person says; `title`, `author` and `description` come from the file alone.
        source: Where it came from, in words.
        trashed: It lies in the trash.
        folder: The foreign folder its file lies in, "" for the studio's own.
        alpha: Smallest and largest.
        ranks: Rank and how many layers have it.
        weight: The weight its author or owner suggests, or None.
        confidence: How sure the family is: "certain", "likely" or "guess".
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
    tags: tuple[str, ...] = ()
    notes: str = ""
    licence: str = ""
    title: str = ""
    author: str = ""
    description: str = ""
    source: str = ""
    favourite: bool = False
    trashed: bool = False
    folder: str = ""
    alpha: tuple[float, float] = (0.0, 0.0)
    dtypes: tuple[str, ...] = ()
    ranks: tuple[tuple[int, int], ...] = ()
    weight: float | None = None
    confidence: str = "certain"

    @property
    def missing(self) -> bool:
        """Whether the file is gone; looks at the disk."""
        return not self.path.is_file()


@dataclass(frozen=True)
class Query:
    """Which entries, in which order, and which part of them.

    Args:
        text: Words; each must begin a word of the name, trigger words, tags, notes or base model.
        family: Only this one; "" for all, as with `algorithm`, `role` and `tag`.
        favourite: Only favourites.
        trashed: What lies in the trash instead of what is listed.
        folder: Only this foreign folder, "" for the studio's own, None for all.
        sort: Newest or largest first, or by name.
        limit: Most entries of the page, None for all.
    """

    text: str = ""
    family: str = ""
    algorithm: str = ""
    role: str = ""
    tag: str = ""
    favourite: bool = False
    trashed: bool = False
    folder: str | None = None
    sort: Sort = "newest"
    offset: int = 0
    limit: int | None = 60

    def __post_init__(self) -> None:
        if self.sort not in SORTS:
            raise InputError(f"The library cannot be sorted by {self.sort}.", f"Sort by {', '.join(SORTS)}.")
        if self.offset < 0 or (self.limit is not None and self.limit < 1):
            raise InputError("A page of the library begins at 0 or later and holds 1 entry or more.", "")


@dataclass(frozen=True)
class Page:
    """Part of what a query found.

    Args:
        total: Entries found, on this page and others.
        families: Family to number of entries, under the query's other filters; so are `algorithms` and `tags`.
    """

    entries: tuple[Entry, ...]
    total: int
    families: Mapping[str, int]
    algorithms: Mapping[str, int]
    tags: Mapping[str, int]


@dataclass(frozen=True)
class Change:
    """What a person changes of a card; None and () leave things as they are."""

    name: str | None = None
    favourite: bool | None = None
    notes: str | None = None
    licence: str | None = None
    trigger: str | None = None
    tag: tuple[str, ...] = ()
    untag: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _bounded("The trigger words are", self.trigger, MAX_LINE)
        _bounded("The licence is", self.licence, MAX_LINE)
        _bounded("The note is", self.notes, MAX_NOTES)
        object.__setattr__(self, "tag", tuple(make_tag(text) for text in self.tag))
        object.__setattr__(self, "untag", tuple(self.untag))


@dataclass(frozen=True)
class Outcome:
    """What became of one file of an import.

    Args:
        state: "known" if the library had it already, "restored" if it lay in the trash or its file was gone.
        entry: None if it was refused; `error` then says why.
    """

    path: Path
    state: Literal["added", "known", "restored", "refused"]
    entry: Entry | None = None
    error: IntarsiaError | None = None


@dataclass(frozen=True)
class Refused:
    """A file in a watched folder that is not listed, and why."""

    path: Path
    message: str
    hint: str


@dataclass(frozen=True)
class Folder:
    """A foreign folder whose files are listed in place."""

    path: Path
    entries: int
    refused: int

    @property
    def missing(self) -> bool:
        """Whether it cannot be reached now, as on a drive that is not there."""
        return not self.path.is_dir()


@dataclass(frozen=True)
class Scan:
    """What a look into the watched folders found; numbers of files."""

    files: int
    new: int = 0
    changed: int = 0
    moved: int = 0
    missing: int = 0
    refused: int = 0


def _bounded(what: str, text: str | None, limit: int) -> None:
    if text is not None and len(text) > limit:
        raise InputError(f"{what} {len(text):,} characters long; at most {limit:,} are possible.", "Shorten it.")


def make_tag(text: str) -> str:
    """Tidy a tag: one line without spaces around it.

    Raises:
        InputError: Nothing is left of it, or it is too long.
    """
    tag = "".join(letter for letter in " ".join(text.split()) if letter.isprintable())
    if not tag or len(tag) > MAX_TAG:
        raise InputError(f"A tag has 1 to {MAX_TAG} characters; {text[:20]!r} has {len(tag)}.", "Choose another.")
    return tag


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


def slug_of(path: Path) -> str:
    """Name an adapter by its file, whatever that is called."""
    return re.sub(r"[^\w]+", "-", path.stem)[:MAX_NAME].strip("-_") or "adapter"
