"""Find a page of the library: search, filters, order and counts, all in SQL."""

from __future__ import annotations

import re
import sqlite3
from pathlib import PurePath
from typing import Any

from .library_entry import Page, Query, Sort
from .library_index import Index

ORDER: dict[Sort, str] = {
    "newest": "created DESC, id DESC",
    "name": "name, id",
    "size": "size DESC, id",
}
EQUAL = ("family", "algorithm", "role")
MAX_WORDS = 20
MAX_FACETS = 200  # tags shown with their numbers


def page(index: Index, query: Query) -> Page:
    """Give the entries of a query's page, how many there are in all, and how many of which kind."""
    with index.reading() as db:
        where, values = _where(query)
        rest = f"ORDER BY {ORDER[query.sort]} LIMIT ? OFFSET ?"
        limit = -1 if query.limit is None else query.limit
        cards = index.cards(db, f"WHERE {where} {rest}", *values, limit, query.offset)
        return Page(
            entries=tuple(card.entry for card in cards),
            total=db.execute(f"SELECT count(*) FROM library WHERE {where}", values).fetchone()[0],
            families=_facet(db, query, "family"),
            algorithms=_facet(db, query, "algorithm"),
            tags=_facet(db, query, "tag"),
        )


def _facet(db: sqlite3.Connection, query: Query, column: str) -> dict[str, int]:
    """Count by one column under the query's filters but its own, so that a person sees what else there is."""
    where, values = _where(query, but=column)
    join = "JOIN library_tags ON adapter = id" if column == "tag" else ""
    rows = db.execute(
        f"SELECT {column}, count(*) FROM library {join} WHERE {where}"
        f" GROUP BY {column} ORDER BY 2 DESC, 1 LIMIT {MAX_FACETS}",
        values,
    )
    return {name: number for name, number in rows}


def _where(query: Query, but: str = "") -> tuple[str, list[Any]]:
    """Write a query as a condition and its values."""
    parts: list[str] = ["state = ?"]
    values: list[Any] = ["trash" if query.trashed else "listed"]
    wanted: dict[str, object] = {name: getattr(query, name) for name in EQUAL if getattr(query, name) and name != but}
    if query.favourite:
        wanted["favourite"] = 1
    if query.folder is not None:
        wanted["folder"] = query.folder and str(PurePath(query.folder))
    for name, value in wanted.items():
        parts.append(f"{name} = ?")
        values.append(value)
    if query.tag and but != "tag":
        parts.append("id IN (SELECT adapter FROM library_tags WHERE tag = ?)")
        values.append(query.tag)
    if query.text.strip():
        # no letter in it: nothing is found, rather than everything
        words = re.findall(r"\w+", query.text)[:MAX_WORDS] or [""]
        parts.append("id IN (SELECT rowid FROM library_words WHERE library_words MATCH ?)")
        values.append(" ".join(f'"{word}"*' for word in words))
    return " AND ".join(parts), values
