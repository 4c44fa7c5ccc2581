"""Build the corpus Mini learns from: the same contents drawn in ten consistent styles, rendered with transparency.

The icon packages are fetched by npm at build time (never at the user's run time), each glyph is matched to its
Unicode name and rendered (`icons`). Three more styles are held out: no training sees them, the benches measure with
them. The result is a folder like any other folder of captioned pictures: `STYLE/CODEPOINTS.webp` (RGBA) and one line
per picture in `captions.jsonl`.

Run: python -m intarsia.training.corpus --out runs/corpus
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from ..pipelines.atomic import replacing
from .icons import HELD_OUT_SETS, SETS, Content, Glyph, IconSet, contents, draw, fetch, glyphs
from .procedural import STAINED_GLASS, stained_glass

__all__ = ["HELD_OUT_SETS", "SETS", "Captioned", "Content", "Glyph", "IconSet", "build", "contents", "draw", "glyphs"]
BASE_OF_PROCEDURAL = "noto"


@dataclass(frozen=True)
class Captioned:
    """One line of `captions.jsonl`; `split` is "train", "held-out" (its content) or "held-out-style"."""

    file: str
    content: str
    style: str
    tags: tuple[str, ...]
    group: str
    code: str
    split: str


def _save(job: tuple[Glyph, Path]) -> None:
    glyph, path = job
    if glyph.style == STAINED_GLASS:
        with Image.open(glyph.file) as picture:
            made = stained_glass(picture.convert("RGBA"), glyph.content.code)
    else:
        made = draw(glyph)
    with replacing(path) as temporary:  # a cut run leaves no half picture behind that a later one would keep
        made.save(temporary, format="WEBP", lossless=True, quality=20, method=1)


def held_out() -> frozenset[str]:
    """Codepoints of the contents no training ever sees (assets/splits/held_out_contents.txt)."""
    from importlib.resources import files

    lines = files("intarsia.assets").joinpath("splits/held_out_contents.txt").read_text("utf-8").splitlines()
    return frozenset(line.split()[0] for line in lines if line and not line.startswith("#"))


def _listed(modules: Path, out: Path) -> Iterator[tuple[Glyph, Captioned]]:
    """Every glyph with its row: the ten training styles first, then the held-out ones."""
    wanted, hidden = contents(modules), held_out()
    for icon_set in SETS:
        for glyph in glyphs(modules, icon_set, wanted):
            yield glyph, _row(glyph, "held-out" if glyph.content.code in hidden else "train")
    for icon_set in HELD_OUT_SETS:
        for glyph in glyphs(modules, icon_set, wanted):
            yield glyph, _row(glyph, "held-out-style")
    base = next(item for item in SETS if item.style == BASE_OF_PROCEDURAL)
    for glyph in glyphs(modules, base, wanted):
        made = Glyph(glyph.content, STAINED_GLASS, file=str(out / BASE_OF_PROCEDURAL / f"{glyph.content.code}.webp"))
        yield made, _row(made, "held-out-style")


def _row(glyph: Glyph, split: str) -> Captioned:
    item = glyph.content
    return Captioned(
        f"{glyph.style}/{item.code}.webp", item.label, glyph.style, item.tags, item.group, item.code, split
    )


def build(out: Path, workers: int = 2) -> int:
    """Fetch, match, render and write the corpus; returns the number of pictures."""
    modules = fetch(out / "packages")
    drawn: list[tuple[Glyph, Path]] = []
    computed: list[tuple[Glyph, Path]] = []
    rows: list[Captioned] = []
    for glyph, row in _listed(modules, out):
        rows.append(row)
        path = out / row.file
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            (computed if row.style == STAINED_GLASS else drawn).append((glyph, path))
    with ProcessPoolExecutor(workers) as pool:
        for jobs in (drawn, computed):  # the second kind is computed from pictures of the first
            for _ in pool.map(_save, jobs, chunksize=16):
                pass
    with replacing(out / "captions.jsonl") as temporary:
        text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text(text, "utf-8")
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the corpus Mini learns from.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    build(given.out, given.workers)


if __name__ == "__main__":
    main()
