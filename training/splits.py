"""What is trained on and what is held out, written down in `assets/splits` and guarded.

Three lists, one entry a line, each with a hash of its entries in a comment: a list that was changed by accident is
refused, because figures measured on other splits cannot be compared.

- `held_out_contents.txt`: contents no training sees in any style;
- `held_out_styles.txt`: styles no training sees;
- `training_contents.txt`: everything else, with the keywords captions are made of.

What counts as a held-out content in a caption: its whole name where a caption names what is drawn, such as "a tiger" in
"a tiger left of a pizza, noto style". A held-out name inside a longer one ("tiger face", a training content) does not
count, nor does a bare word that is among the keywords of a training content: tiger face is tagged "tiger", and
"tiger, pet, animal" describes the training picture it stands under.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from ..pipelines.errors import InputError

if TYPE_CHECKING:
    from .corpus import Captioned

CONTENTS, STYLES, TRAINING = "held_out_contents.txt", "held_out_styles.txt", "training_contents.txt"
_BEFORE = r"(?:^|, | and | next to | left of | right of | above | below )"
_AFTER = r"(?=$|, | and | next to | left of | right of | above | below | on an? | on the )"


def entries_hash(entries: Sequence[str]) -> str:
    """The hash a split's file carries: SHA-256 of its entries, one a line."""
    return hashlib.sha256("".join(f"{entry}\n" for entry in entries).encode()).hexdigest()


def read_split(name: str, folder: Path | None = None) -> tuple[str, ...]:
    """Read the entries of a split.

    Args:
        name: Its file name.
        folder: Where it lies; the package's own `assets/splits` if None.

    Raises:
        InputError: The entries are not those the file's hash was made of, or it has no hash.
    """
    place = files("intarsia.assets").joinpath("splits") if folder is None else folder
    lines = place.joinpath(name).read_text("utf-8").splitlines()
    entries = tuple(line for line in lines if line and not line.startswith("#"))
    written = next((line.split()[-1] for line in lines if line.startswith("# sha256")), "")
    if written != entries_hash(entries):
        raise InputError(
            f"The split {name} was edited: its entries do not match the hash written in it.",
            "Restore the file; figures measured on another split cannot be compared.",
        )
    return entries


@cache
def held_out_contents() -> dict[str, str]:
    """Codepoints and name of the contents no training sees."""
    split = (entry.split(" ", 2) for entry in read_split(CONTENTS))
    return {code: name for code, _, name in split}


@cache
def held_out_styles() -> frozenset[str]:
    """The styles no training sees."""
    return frozenset(read_split(STYLES))


def check_training_rows(rows: Iterable[Captioned]) -> None:
    """Refuse what must not be trained on: by codepoints, by style, by the split written down, by the caption's words.

    Raises:
        InputError: Names the first held-out content or style found.
    """
    hidden, styles = {_plain(code): name for code, name in held_out_contents().items()}, held_out_styles()
    for row in rows:
        plain = _plain(row.code)
        if plain in hidden:
            raise _refusal(f"the held-out content “{hidden[plain]}”", row.file)
        if row.style in styles:
            raise _refusal(f"the held-out style “{row.style}”", row.file)
        if row.split != "train":
            raise _refusal(f"a picture of the split “{row.split}”", row.file)
        if name := named_in(row.content):
            raise _refusal(f"the held-out content “{name}”", row.file)


def check_captions(captions: Iterable[str], keywords: Collection[str] = ()) -> None:
    """Refuse captions that name a held-out content or style.

    Args:
        captions: What is to be trained on.
        keywords: Tags of the training contents: bare words that may stand in a caption for what they are tags of.

    Raises:
        InputError: Names the first held-out content or style found.
    """
    for caption in captions:
        if name := named_in(caption, keywords):
            raise _refusal(f"the held-out content “{name}”", f"the caption “{caption}”")
        if style := next((style for style in held_out_styles() if f"{style} style" in caption), ""):
            raise _refusal(f"the held-out style “{style}”", f"the caption “{caption}”")


def named_in(caption: str, keywords: Collection[str] = ()) -> str:
    """The held-out content that `caption` names, or "": a whole name, with or without an article (see above)."""
    for found in _pattern().finditer(caption.lower()):
        article, name = found.groups()
        if article or name not in keywords:
            return name
    return ""


@cache
def _pattern() -> re.Pattern[str]:
    names = sorted((name.lower() for name in held_out_contents().values()), key=len, reverse=True)
    return re.compile(f"{_BEFORE}(an? |the )?({'|'.join(map(re.escape, names))}){_AFTER}")


def _refusal(what: str, where: str) -> InputError:
    return InputError(f"Training would see {what}: {where}.", "Leave it out: the benches measure with it.")


def _plain(code: str) -> str:
    """Codepoints in the one spelling all sets share: upper case, without the presentation selector."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")
