"""Take the JSON of a safetensors header apart entry by entry, so that a hostile one costs no more than its own size.

A general parser builds whatever it is given: 16 MB of `[[],[],...` become half a gigabyte of lists before anything can
be checked. Here every name is checked when it is read, and the first one too many ends it.
"""

from __future__ import annotations

import json
import re
from typing import Any, cast

from .errors import AdapterError

MAX_TENSORS = 20_000
MAX_NAME = 512  # characters
MAX_TEXTS = 10_000  # entries of the metadata
SPACE = re.compile(r"[ \t\n\r]*")
ENTRY = re.compile(r"\{[^{}]{0,4096}\}")  # of a tensor: three short fields
BROKEN = re.compile(r"[\ud800-\udfff]")  # halves of a letter, which no text can hold
STRING = json.JSONDecoder()


class HeaderTable:
    """What a header holds.

    Args:
        name: Of the file, for errors.
        text: The header.

    Attributes:
        tensors: Tensor name to its fields, of which nothing is checked but that they are a table.
        metadata: The texts.

    Raises:
        AdapterError: It is no header, names something twice, or breaks a limit.
    """

    def __init__(self, name: str, text: str) -> None:
        self.tensors: dict[str, dict[str, Any]] = {}
        self.metadata: dict[str, str] = {}
        self._file, self._text, self._at = name, text, 0
        try:
            self._read()
        except (ValueError, RecursionError):
            raise AdapterError(f"{name} has a header that cannot be read.", "Download it again.") from None

    def _read(self) -> None:
        seen_metadata = False
        self._expect("{")
        while not self._ends("}", first=not self.tensors and not seen_metadata):
            key = self._string()
            self._expect(":")
            if key == "__metadata__":
                if seen_metadata:
                    raise self._twice()
                seen_metadata = True
                self._texts()
            else:
                self._tensor(key)
        if self._at != len(self._text):
            raise ValueError

    def _tensor(self, key: str) -> None:
        if not 0 < len(key) <= MAX_NAME:
            raise AdapterError(
                f"{self._file} holds a tensor name of {len(key):,} characters; 1 to {MAX_NAME} are read.",
                "Get it from another source.",
            )
        if not key.isprintable():
            raise AdapterError(
                f"{self._file} holds a tensor name with characters that cannot be shown.", "Get it from another source."
            )
        if key in self.tensors:
            raise self._twice()
        if len(self.tensors) == MAX_TENSORS:
            raise AdapterError(
                f"{self._file} lists more than {MAX_TENSORS:,} tensors, which no adapter or model here has.",
                "It is damaged or made to do harm: get it from another source.",
            )
        found = ENTRY.match(self._text, self._at)
        if found is None:
            raise AdapterError(f"{self._file} describes the tensor {shorten(key)} wrongly.", "Download it again.")
        self._at = found.end()
        self.tensors[key] = json.loads(found[0], object_pairs_hook=_unique)

    def _texts(self) -> None:
        """Read the metadata: texts by name, or nothing."""
        if self._text.startswith("null", self._at):
            self._at += 4
            return
        wrong = AdapterError(f"{self._file} has metadata that is not plain text.", "Get it from another source.")
        if not self._text.startswith("{", self._at):
            raise wrong
        self._expect("{")
        while not self._ends("}", first=not self.metadata):
            key = self._string()
            self._expect(":")
            if not self._text.startswith('"', self._at) or len(self.metadata) == MAX_TEXTS:
                raise wrong
            value = self._string()
            if BROKEN.search(key) or BROKEN.search(value):
                raise wrong
            if key in self.metadata:
                raise AdapterError(f"{self._file} has metadata with an entry twice.", "Get it from another source.")
            self.metadata[key] = value

    def _string(self) -> str:
        if not self._text.startswith('"', self._at):
            raise ValueError
        value, self._at = STRING.raw_decode(self._text, self._at)
        self._skip()
        return cast(str, value)

    def _ends(self, mark: str, first: bool) -> bool:
        """Whether the table ends here; else go to its next entry."""
        self._skip()
        if self._text.startswith(mark, self._at):
            self._at += 1
            self._skip()
            return True
        if not first:
            self._expect(",")
        return False

    def _expect(self, mark: str) -> None:
        if not self._text.startswith(mark, self._at):
            raise ValueError
        self._at += 1
        self._skip()

    def _skip(self) -> None:
        space = SPACE.match(self._text, self._at)
        self._at = space.end() if space else self._at

    def _twice(self) -> AdapterError:
        return AdapterError(f"{self._file} names the same tensor twice in its header.", "Get it from another source.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError
    return found


def shorten(text: str, limit: int = 80) -> str:
    """Leave out the middle of a long name."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]}...{text[-half:]}"
