"""A folder of captioned pictures opened for looking things up: the ground truth the benches compare with.

Without a folder, the small pack that ships with the package (`assets/bench`) is opened: the held-out contents in every
style they are drawn in, and examples of the held-out styles.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from ..pipelines.errors import InputError
from .corpus import LIST, Captioned

_BUILD = "Build the corpus with: intarsia corpus build"


@dataclass(frozen=True)
class Pictures:
    """Captioned pictures and the folder they lie in."""

    rows: tuple[Captioned, ...]
    folder: Path

    @cached_property
    def _by_name(self) -> dict[tuple[str, str], list[Captioned]]:
        found: dict[tuple[str, str], list[Captioned]] = {}
        for row in self.rows:  # most questions are "this content in this style"
            found.setdefault((row.content, row.style), []).append(row)
        return found

    @classmethod
    def open_corpus(cls, folder: Path | None) -> Pictures:
        """Open a built corpus.

        Args:
            folder: Where it lies; the pack that ships with the package if None.

        Raises:
            InputError: There is no corpus, or a line of its list cannot be read.
        """
        place = Path(str(files("intarsia.assets").joinpath("bench"))) if folder is None else folder
        listed = place / LIST
        if not listed.is_file():
            raise InputError(f"{place} holds no corpus: there is no {LIST}.", _BUILD)
        rows: list[Captioned] = []
        for number, line in enumerate(listed.read_text("utf-8").splitlines(), 1):
            try:
                values: dict[str, Any] = json.loads(line)
                values["tags"] = tuple(values["tags"])
                rows.append(Captioned(**values))
            except (ValueError, TypeError, KeyError):
                raise InputError(f"Line {number} of {listed} is no captioned picture.", _BUILD) from None
        return cls(tuple(rows), place)

    def of(self, content: str | None = None, style: str | None = None, split: str | None = None) -> list[Captioned]:
        """List the rows with this content's name, in this style, of this split; None asks for any."""
        if content is not None and style is not None:
            chosen = self._by_name.get((content, style), [])
        else:
            chosen = [row for row in self.rows if content in (None, row.content) and style in (None, row.style)]
        return [row for row in chosen if split in (None, row.split)]

    def image(self, row: Captioned, size: int = 128) -> Image.Image:
        """Give a picture on white as RGB, `size` pixels wide and high.

        Raises:
            InputError: The picture is missing or broken.
        """
        clear = self.clear(row, None)
        flat = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
        return flat if flat.size == (size, size) else flat.resize((size, size), Image.Resampling.LANCZOS)

    def clear(self, row: Captioned, size: int | None = 128) -> Image.Image:
        """Give a picture with its transparency, as RGBA; at its own size if None.

        Raises:
            InputError: The picture is missing or broken.
        """
        try:
            with Image.open(self.folder / row.file) as picture:
                whole = picture.convert("RGBA")
        except OSError:
            raise InputError(f"{row.file} cannot be read in {self.folder}.", _BUILD) from None
        return whole if size in (None, whole.width) else whole.resize((size, size), Image.Resampling.LANCZOS)
