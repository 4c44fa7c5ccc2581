"""Content halves of some pictures with style halves of others, on one grid: what B-LoRA on a model really does.

Each picture is learned by itself with `blora`; then every content half meets every style half, same seed. The first
row and column show the pictures that were learned.

Run: python -m benchmarks.blora_grid --contents tiger.png mug.png --styles ink.png mono.png --out grid.png
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from intarsia.app.settings import Home
from intarsia.app.studio import Studio
from intarsia.pipelines.events import Artifact, Event, Failed
from intarsia.pipelines.requests import AdapterUse, GenerateRequest, TrainingPicture, TrainRequest
from PIL import Image

from .report import say


def finished(events: Sequence[Event]) -> list[Artifact]:
    """The results of a job; ends the benchmark if it failed."""
    for event in events:
        if isinstance(event, Failed):
            raise SystemExit(f"{event.message} {event.hint}")
    return [event for event in events if isinstance(event, Artifact)]


def learn(studio: Studio, picture: Path, model: str, steps: int, rate: float | None) -> str:
    """Train both halves on one picture; gives its placeholder."""
    say(f"learning {picture.stem}")
    pictures = (TrainingPicture(path=str(picture)),)
    options = {"steps": steps, "learning_rate": rate, "sample_every": 0, "checkpoint_every": 0}
    request = TrainRequest(recipe="blora", model=model, name=picture.stem, pictures=pictures, seed=1, options=options)
    finished(list(studio.run(request)))
    return studio.shelf.find(f"{picture.stem}-content").trigger


def draw(studio: Studio, request: GenerateRequest) -> Image.Image:
    """Make one picture."""
    made = [item for item in finished(list(studio.run(request))) if item.kind == "picture"]
    with Image.open(made[0].path) as image:
        return image.convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contents", type=Path, nargs="+", required=True)
    parser.add_argument("--styles", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, help="the recipe's own if not given")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=3)
    given = parser.parse_args()
    rate: float | None = given.learning_rate
    with tempfile.TemporaryDirectory() as folder, Studio(Home(Path(folder))) as studio:
        names = {path: learn(studio, path, given.model, given.steps, rate) for path in {*given.contents, *given.styles}}
        rows: list[list[Image.Image]] = []
        for content in given.contents:
            row: list[Image.Image] = []
            for style in given.styles:
                halves = (AdapterUse(adapter=f"{content.stem}-content"), AdapterUse(adapter=f"{style.stem}-style"))
                prompt = f"A {names[content]} in {names[style]} style"
                request = GenerateRequest(
                    prompt=prompt, model=given.model, seed=given.seed, guidance=given.guidance, adapters=halves
                )
                row.append(draw(studio, request))
            rows.append(row)
    arrange(given.contents, given.styles, rows).save(given.out)


def arrange(contents: Sequence[Path], styles: Sequence[Path], rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Put the pictures on one sheet: styles across the top, contents down the left side."""
    side, gap = rows[0][0].width, 12
    sheet = Image.new("RGB", ((side + gap) * (len(styles) + 1), (side + gap) * (len(contents) + 1)), "#e8e4de")

    def put(image: Image.Image, column: int, row: int) -> None:
        sheet.paste(image, (column * (side + gap) + gap // 2, row * (side + gap) + gap // 2))

    for index, path in enumerate(styles, start=1):
        put(shrunk(path, side), index, 0)
    for index, (path, row) in enumerate(zip(contents, rows, strict=True), start=1):
        put(shrunk(path, side), 0, index)
        for column, image in enumerate(row, start=1):
            put(image, column, index)
    return sheet


def shrunk(path: Path, side: int) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    main()
