"""Draw a contact sheet of a model: contents across, styles down, one seed per row, labelled.

Run: python -m intarsia.training.sheet --model assets/mini --out sheet.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers as _diffusers
import torch
from PIL import Image, ImageDraw

diffusers: Any = _diffusers  # its lazy names are invisible to type checkers

CONTENTS = ("a red apple", "a dog face", "a rocket", "a grinning face", "a red heart", "a star")
STYLES = ("twemoji", "fluent-3d", "noto-v1", "emojione-mono")


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


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a contact sheet of a model.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--contents", nargs="+", default=CONTENTS)
    parser.add_argument("--styles", nargs="+", default=STYLES)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(given.model, torch_dtype=torch.float32).to(
        given.device
    )
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[Image.Image] = []
    for row, style in enumerate(given.styles):
        prompts = [f"{content}, {style} style" if style != "-" else content for content in given.contents]
        generators = [torch.Generator().manual_seed(given.seed + row) for _ in prompts]
        made = pipeline(prompts, num_inference_steps=given.steps, guidance_scale=given.guidance, generator=generators)
        pictures.extend(made.images)
    grid(pictures, given.contents, given.styles).save(given.out)


if __name__ == "__main__":
    main()
