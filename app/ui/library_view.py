"""What one browser tab sees of the library: its search, its filters, how many cards, and which panel is open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...pipelines.kind import kinds
from ..studio import Query

if TYPE_CHECKING:
    from ..library_entry import Entry, Page, Sort
    from .desk import Desk

CARDS = 48  # shown at first, and added by "Show more"
TEXTS = ("text", "family", "algorithm", "tag")
MAX_TEXT = 200  # characters of a search
FAMILY_TITLES = {"sd15": "SD 1.5", "sdxl": "SDXL", "sd3": "SD 3", "flux1": "FLUX.1", "wan": "Wan"}
ALGORITHMS = {"locon": "LoCon", "dora": "DoRA"}  # what kinds alone do not say
ORDERS = {"newest": "Newest first", "name": "By name", "size": "Largest first"}


@dataclass(frozen=True)
class View:
    """What a person looks for; the fields of `Query`, but for the page's number of cards."""

    text: str = ""
    family: str = ""
    algorithm: str = ""
    tag: str = ""
    favourite: bool = False
    trashed: bool = False
    sort: Sort = "newest"
    shown: int = CARDS

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> View:
        """Read what the page's bar says; a wrong order is refused by the query."""
        text, family, algorithm, tag = (str(told.get(name, ""))[:MAX_TEXT] for name in TEXTS)
        sort: Any = told.get("sort") or "newest"
        return cls(text, family, algorithm, tag, bool(told.get("favourite")), bool(told.get("trashed")), sort)

    @property
    def query(self) -> Query:
        """The same as a question to the library."""
        return Query(
            text=self.text,
            family=self.family,
            algorithm=self.algorithm,
            tag=self.tag,
            favourite=self.favourite,
            trashed=self.trashed,
            sort=self.sort,
            limit=self.shown,
        )

    @property
    def narrowed(self) -> bool:
        """Whether it leaves anything out."""
        return bool(self.text or self.family or self.algorithm or self.tag or self.favourite)


@dataclass(frozen=True)
class Panel:
    """What is open beside the cards: the report of an adapter, or the form that edits it."""

    name: str
    mode: Literal["report", "edit"]


def bar(desk: Desk, view: View, page: Page) -> dict[str, Any]:
    """What the search bar shows: the filters with their counts, and what was found."""
    trash = desk.studio.shelf.page(Query(trashed=True, limit=1)).total
    return {
        "view": {
            "text": view.text, "family": view.family, "algorithm": view.algorithm, "tag": view.tag,
            "favourite": view.favourite, "trashed": view.trashed, "sort": view.sort,
        },
        "family": [[name, family_title(name), count] for name, count in page.families.items()],
        "algorithm": [[name, kind_title(name), count] for name, count in page.algorithms.items()],
        "tag": [[name, name, count] for name, count in page.tags.items()],
        "sort": list(ORDERS.items()),
        "found": found(view, page.total),
        "trash": trash,
    }  # fmt: skip


def found(view: View, total: int) -> str:
    """Say how many there are."""
    noun = "adapter" if total == 1 else "adapters"
    where = " in the trash" if view.trashed else " found" if view.narrowed else ""
    return f"{total:,} {noun}{where}"


def family_title(name: str) -> str:
    """What a family is called on a chip."""
    return FAMILY_TITLES.get(name, name)


def kind_title(algorithm: str) -> str:
    """What an adapter's kinds are called."""
    titles = {**{name: kind.title for name, kind in kinds().items()}, **ALGORITHMS}
    return ", ".join(titles.get(name, name) for name in algorithm.split(", "))


def kind_of(entry: Entry) -> str:
    """What one adapter is called: a B-LoRA by its blocks, others by their kinds."""
    return "B-LoRA" if entry.halves or entry.role in ("content", "style") else kind_title(entry.algorithm)
