"""Build the corpus Mini learns from: the same contents drawn in ten consistent styles, rendered with transparency.

The icon packages are fetched by npm at build time (never at the user's run time), each glyph is matched to its
Unicode name and rendered (`icons`). Three more styles are held out: no training sees them, the benches measure with
them. The result is a folder like any other folder of captioned pictures: `STYLE/CODEPOINTS.webp` (RGBA), one line
per picture in `captions.jsonl`, and whose works they are in `LICENCES.txt`.

Run: intarsia corpus build
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from PIL import Image

from ..pipelines.atomic import replacing
from ..pipelines.events import CancelToken, Event, Notice, Progress, Stage
from .icons import HELD_OUT_SETS, NAMES, SETS, Content, Glyph, IconSet, contents, draw, fetch, glyphs
from .procedural import STAINED_GLASS, stained_glass
from .splits import held_out_contents

__all__ = ["HELD_OUT_SETS", "SETS", "Captioned", "Content", "Glyph", "IconSet", "build", "contents", "draw", "glyphs"]
BASE_OF_PROCEDURAL = "noto"
LIST, LICENCES = "captions.jsonl", "LICENCES.txt"
AT_ONCE = 160  # pictures between two looks at the token


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


Job = tuple[Glyph, Path]


def _save(job: Job) -> None:
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
    return frozenset(held_out_contents())


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


def build(out: Path, workers: int = 2, token: CancelToken | None = None) -> Iterator[Event]:
    """Fetch, match, render and write the corpus; pictures that are there already stay as they are.

    Args:
        out: The corpus' folder.
        workers: How many processes render.
        token: Stops it between two pictures; run again, it goes on.

    Raises:
        InputError: npm or the renderer is missing, the packages cannot be fetched, a split was edited.
    """
    token = token or CancelToken()
    yield Stage(name="fetch", detail="the icon packages, with npm")
    modules = fetch(out / "packages")
    drawn: list[Job] = []
    computed: list[Job] = []
    rows: list[Captioned] = []
    for glyph, row in _listed(modules, out):
        rows.append(row)
        path = out / row.file
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            (computed if row.style == STAINED_GLASS else drawn).append((glyph, path))
    yield Stage(name="render", detail=f"{len(drawn) + len(computed)} of {len(rows)} pictures")
    yield from _render(drawn, computed, workers, token)
    write_list(out, rows)
    write_licences(out)
    yield Notice(text=f"{len(rows)} pictures in {out}")


def _render(drawn: list[Job], computed: list[Job], workers: int, token: CancelToken) -> Iterator[Event]:
    done, total = 0, len(drawn) + len(computed)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for jobs in (drawn, computed):  # the second kind is computed from pictures of the first
            rest = iter(jobs)
            while batch := list(islice(rest, AT_ONCE * workers)):
                token.check()
                done += len(list(pool.map(_save, batch, chunksize=4)))
                yield Progress(stage="render", step=done, total=total)


def write_list(folder: Path, rows: Iterable[Captioned]) -> None:
    """Write `captions.jsonl`, as a whole or not at all."""
    with replacing(folder / LIST) as temporary:
        text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text(text, "utf-8")


def write_licences(folder: Path) -> None:
    """Write `LICENCES.txt`: whose works the pictures are, and under which licence."""
    lines = [
        "The pictures in this folder are renderings of the following works, made by Intarsia (training/corpus.py).",
        "Changes: rendered to pictures of one size on a transparent ground; otherwise as their makers drew them.",
        "",
    ]
    for item in (*SETS, *HELD_OUT_SETS):
        lines += [f"{item.style}/", f"    {item.author}", *_source(item), ""]
    base = next(item for item in SETS if item.style == BASE_OF_PROCEDURAL)
    changed = (
        f"    Computed by Intarsia from {base.style}: cut into panes with lead between them (training/procedural.py)."
    )
    lines += [f"{STAINED_GLASS}/", f"    {base.author}", *_source(base), changed, ""]
    lines += [f"{LIST}: names and keywords", f"    Copyright (c) {NAMES.author}", *_source(NAMES), ""]
    lines += [f"{name}: {address}" for name, address in _TEXTS.items()]
    with replacing(folder / LICENCES) as temporary:
        temporary.write_text("\n".join(lines) + "\n", "utf-8")


def _source(item: IconSet) -> list[str]:
    return [f"    package {item.package} {item.version} (npm), licence {item.licence}"]


_TEXTS = {
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "MIT": "https://opensource.org/license/mit",
}
