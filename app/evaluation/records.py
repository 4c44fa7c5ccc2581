"""Measured rows as lines of JSON, so that a long evaluation stopped anywhere goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from ...pipelines.errors import InputError

Row = dict[str, Any]


class Records:
    """A file of rows. Its first line is the header: settings, versions, hashes of what is measured and what measures.

    A file with the same header goes on; a last line that was cut off is dropped.

    Args:
        path: The file; its folder exists.
        header: Anything JSON can hold.

    Raises:
        InputError: The file has another header, or is damaged elsewhere than at its end.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.header: Row = json.loads(json.dumps(header, allow_nan=False))
        self._rows: dict[str, Row] = {}
        whole = path.read_bytes() if path.is_file() else b""
        kept = whole[: whole.rfind(b"\n") + 1]
        lines = [self._parsed(number, line) for number, line in enumerate(kept.splitlines(), start=1)]
        if lines:
            self._compare(lines[0])
            self._rows = {row["key"]: row for row in lines[1:]}
        if len(kept) < len(whole):
            with path.open("r+b") as file:
                file.truncate(len(kept))
        self.resumed = len(self._rows)
        if not lines:
            self._write(self.header)

    def __len__(self) -> int:
        return len(self._rows)

    def has(self, key: str) -> bool:
        """Whether a row was measured."""
        return key in self._rows

    def __getitem__(self, key: str) -> Row:
        return dict(self._rows[key])

    def add(self, key: str, **values: Any) -> None:  # noqa: ANN401 - whatever JSON can hold
        """Write a row. `kind="..."` among the values makes it findable by `rows`.

        Raises:
            ValueError: There is such a row, or a value is not finite: a bench's mistake.
        """
        if key in self._rows:
            raise ValueError(f"{key} was measured already")
        text = json.dumps({"key": key, **values}, allow_nan=False)
        self._rows[key] = json.loads(text)
        self._write(self._rows[key])

    def rows(self, kind: str | None = None) -> list[Row]:
        """Give the rows (of one kind) in the order they were added."""
        return [dict(row) for row in self._rows.values() if kind is None or row.get("kind") == kind]

    def _write(self, row: Row) -> None:
        with self.path.open("a", encoding="utf-8") as file:  # opened anew: nothing is lost in a buffer
            file.write(json.dumps(row) + "\n")

    def _parsed(self, number: int, line: bytes) -> Row:
        try:
            row: object = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or (number > 1 and "key" not in row):
            raise InputError(
                f"Line {number} of {self.path} is damaged.", "Remove the file, or choose another folder with --out."
            )
        return cast(Row, row)

    def _compare(self, found: Row) -> None:
        names = [*self.header, *(name for name in found if name not in self.header)]
        other = [name for name in names if found.get(name) != self.header.get(name)]
        if other:
            first = other[0]
            raise InputError(
                f"{self.path.parent} holds an evaluation with other settings ({', '.join(other)}); "
                f"its {first} is {_short(found.get(first))}, now it is {_short(self.header.get(first))}.",
                "Choose another folder with --out, or remove that one.",
            )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
