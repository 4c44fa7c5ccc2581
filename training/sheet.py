"""Draw a contact sheet of a model: contents across, styles down, one seed per row, labelled; or scenes with captions.

Run: python -m intarsia.training.sheet --model assets/mini --out sheet.png
     python -m intarsia.training.sheet --model assets/mini --scenes --out scenes.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers as _diffusers
import torch
from PIL import Image, ImageDraw

from .icons import SETS

diffusers: Any = _diffusers  # its lazy names are invisible to type checkers

CONTENTS = ("a red apple", "a dog face", "a rocket", "a penguin", "a red heart", "a star")
STYLES = tuple(icon_set.style for icon_set in SETS)
SCENE_STYLES = ("twemoji", "fluent-flat")
PAIRS = (
    ("a red apple", "left of", "a banana"), ("a star", "above", "a house"), ("a frog", "right of", "a cactus"),
    ("a skull", "left of", "a rose"), ("a panda", "below", "an umbrella"), ("a fox", "left of", "a mushroom"),
    ("a red heart", "above", "a grinning face"), ("a penguin", "right of", "a sailboat"),
    ("a hamburger", "left of", "a pizza"), ("a rocket", "above", "a robot"),
)  # fmt: skip


def _small(picture: Image.Image, side: int) -> Image.Image:
    return picture if picture.width <= side else picture.resize((side, side), Image.Resampling.LANCZOS)


def grid(pictures: Sequence[Image.Image], across: Sequence[str], down: Sequence[str]) -> Image.Image:
    """Put pictures, row by row, on a labelled sheet; all of the size of the first."""
    width, height = pictures[0].size
    left, top = 110, 22
    sheet = Image.new("RGB", (left + width * len(across), top + height * len(down)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, text in enumerate(across):
        pen.text((left + column * width + 6, 5), text, fill="black")
    for row, text in enumerate(down):
        pen.text((6, top + row * height + height // 2 - 6), text, fill="black")
    for index, picture in enumerate(pictures):
        row, column = divmod(index, len(across))
        sheet.paste(picture, (left + column * width, top + row * height))
    return sheet


def captioned(pictures: Sequence[Image.Image], captions: Sequence[str], across: int = 5) -> Image.Image:
    """Put pictures on a sheet, each over its caption."""
    width, height, below = *pictures[0].size, 44
    sheet = Image.new("RGB", (width * across, (height + below) * -(-len(pictures) // across)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        row, column = divmod(index, across)
        at = column * width, row * (height + below)
        sheet.paste(picture, at)
        what, _, style = caption.rpartition(", ")
        first, relation, second = what.partition(next(word for _, word, _ in PAIRS if f" {word} " in what))
        pen.text((at[0] + 3, at[1] + height), f"{first}\n{relation}{second}\n{style}", fill="black")
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a contact sheet of a model.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--contents", nargs="+", default=CONTENTS)
    parser.add_argument("--styles", nargs="+", default=STYLES)
    parser.add_argument("--scenes", action="store_true", help="twenty scenes of two instead of contents by styles")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--tile", type=int, default=128, help="largest side of a picture on the sheet, in pixels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(given.model, torch_dtype=torch.float32).to(
        given.device
    )
    pipeline.set_progress_bar_config(disable=True)

    def drawn(prompts: Sequence[str], seed: int) -> list[Image.Image]:
        generators = [torch.Generator().manual_seed(seed) for _ in prompts]
        settings = {"num_inference_steps": given.steps, "guidance_scale": given.guidance}
        made: list[Image.Image] = pipeline(list(prompts), generator=generators, **settings).images
        return [_small(picture, given.tile) for picture in made]

    if given.scenes:
        prompts = [f"{' '.join(pair)}, {style} style" for style in SCENE_STYLES for pair in PAIRS]
        captioned(drawn(prompts, given.seed), prompts).save(given.out)
        return
    pictures: list[Image.Image] = []
    for row, style in enumerate(given.styles):
        prompts = [f"{content}, {style} style" if style != "-" else content for content in given.contents]
        pictures += drawn(prompts, given.seed + row)
    grid(pictures, given.contents, given.styles).save(given.out)


if __name__ == "__main__":
    main()
