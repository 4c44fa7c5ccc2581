"""A sheet of the composition bench: one scene per number of contents, drawn by every method, boxes and marks on it.

python -m benchmarks.composition_sheet OUT_OF_THE_BENCH --out assets/sheets/composition.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from intarsia.app.evaluation.composed import ARMS
from PIL import Image, ImageDraw

SIDE, GAP, HEAD = 150, 6, 16
ACROSS = 8  # pictures in a line


def rows(out: Path) -> list[dict[str, Any]]:
    """The first scene and seed of every number of contents, by number and in the order of the arms."""
    lines = [json.loads(line) for line in (out / "records.jsonl").read_text("utf-8").splitlines()]
    pictures = [line for line in lines if line.get("kind") == "picture"]
    first: dict[tuple[int, str], dict[str, Any]] = {}
    for row in sorted(pictures, key=lambda row: (row["scene"], row["seed"])):
        first.setdefault((row["count"], row["arm"]), row)
    return [first[key] for key in sorted(first, key=lambda key: (key[0], list(ARMS).index(key[1])))]


def sheet(out: Path) -> Image.Image:
    """Lay the pictures out, each under the name of its method."""
    found = rows(out)
    counts = sorted({row["count"] for row in found})
    lines = [[row for row in found if row["count"] == count] for count in counts]
    parts = [line[start : start + ACROSS] for line in lines for start in range(0, len(line), ACROSS)]
    high = SIDE + HEAD + GAP
    canvas = Image.new("RGB", (ACROSS * (SIDE + GAP) + GAP, len(parts) * high + GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for index, part in enumerate(parts):
        for column, row in enumerate(part):
            x, y = GAP + column * (SIDE + GAP), GAP + index * high
            pen.text((x, y), row["arm"], fill="black")
            with Image.open(out / "pictures" / f"{row['key']}-boxes.png") as picture:
                canvas.paste(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y + HEAD))
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="that `intarsia evaluate composition --out` wrote")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    sheet(given.folder).save(given.out, optimize=True)


if __name__ == "__main__":
    main()
