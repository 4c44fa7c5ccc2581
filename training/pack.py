"""Choose the small pack of pictures that ships with the package, so that benches run without building the corpus.

It holds every held-out content in every style it is drawn in, held-out styles included, and examples of the held-out
styles. Nothing in it is drawn in a style and shows a content that are both trained on.

Run: python -m intarsia.training.pack --data runs/corpus --out assets/bench
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..pipelines.errors import InputError
from .corpus import Captioned, held_out, write_licences, write_list
from .pictures import Pictures
from .splits import held_out_styles

SIZE = 128
EXAMPLES = 32  # per held-out style
STEP = 5  # of 255: black, white and full cover stay exact
LIMIT = 3 * 2**20  # bytes
# Figures that are somebody's brand are drawn in the set; they have no place among our examples.
_BRANDS = re.compile(r"famous|character|video-game|pokemon|mario|logo|app-|apple|google|facebook|bitcoin|crypto")


def choose(rows: tuple[Captioned, ...]) -> list[Captioned]:
    """Choose the pack's rows, in the order of the corpus; the same rows always give the same choice."""
    hidden = held_out()
    chosen = {row.file for row in rows if row.code in hidden}
    for style in sorted(held_out_styles()):
        examples = [row for row in rows if row.style == style and row.code not in hidden and _plain(row)]
        chosen |= {row.file for row in sorted(examples, key=_draw)[:EXAMPLES]}
    return [row for row in rows if row.file in chosen]


def _plain(row: Captioned) -> bool:
    """Whether a row makes a clear example: no combined sequence (families, professions), no brand."""
    return "200D" not in row.code and not _BRANDS.search(row.code)


def _draw(row: Captioned) -> str:
    return hashlib.sha256(f"intarsia example {row.code}".encode()).hexdigest()


def shrink(picture: Image.Image) -> Image.Image:
    """Shrink a corpus picture to the pack's size and round its values to whole steps (48 dB from the exact ones).

    Rounded edges are what make the pack a third smaller; the mean of blocks, unlike a sharper filter, leaves no
    halos, which would cost as much again.
    """
    premultiplied = picture.convert("RGBA").convert("RGBa").reduce(picture.width // SIZE)
    values = np.asarray(premultiplied.convert("RGBA")).astype(np.int16)
    return Image.fromarray(((values + STEP // 2) // STEP * STEP).astype(np.uint8), "RGBA")


def write_pack(corpus: Pictures, out: Path) -> Iterator[str]:
    """Write the pack anew; yields each file's name.

    Raises:
        InputError: It came out larger than it may be.
    """
    rows = [replace(row, file=f"{row.style}/{row.code}.webp") for row in choose(corpus.rows)]
    for style in {row.style for row in rows}:
        shutil.rmtree(out / style, ignore_errors=True)
        (out / style).mkdir(parents=True)
    size = 0
    for row in rows:
        with Image.open(corpus.folder / row.file) as picture:
            small = shrink(picture)
        small.save(out / row.file, format="WEBP", lossless=True, quality=75, method=4)
        size += (out / row.file).stat().st_size
        yield row.file
    write_list(out, rows)
    write_licences(out)
    if size > LIMIT:
        raise InputError(f"The pack takes {size / 2**20:.1f} MB.", f"It may take {LIMIT / 2**20:.0f}; choose less.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the pack of pictures that ships with the package.")
    parser.add_argument("--data", type=Path, required=True, help="folder made by `intarsia corpus build`")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    for _ in write_pack(Pictures.open_corpus(given.data), given.out):
        pass


if __name__ == "__main__":
    main()
