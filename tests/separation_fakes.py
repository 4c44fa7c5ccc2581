"""A small corpus with held-out contents and styles, its pictures and its judge, for the separation bench."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from intarsia.pipelines.judge import Embedded
from intarsia.training.corpus import Captioned
from PIL import Image, ImageDraw
from torch.nn import functional as F

KNOWN, HELD = ("flat", "mono", "noto"), ("glass", "ink", "sketch")  # nothing held out is drawn as a sketch
GROUPS = {"tiger": "animals", "goat": "animals", "burrito": "food", "peanuts": "food", "clamp": "objects"}
CONTENTS = tuple(GROUPS)


def corpus() -> tuple[Captioned, ...]:
    rows = [
        Captioned(f"{style}/{content}.webp", content, style, (), GROUPS[content], content.upper(), split)
        for styles, split in ((KNOWN, "held-out"), (HELD[:2], "held-out-style"))
        for style in styles
        for content in CONTENTS
    ]
    rows += [Captioned("flat/cat.webp", "cat", "flat", (), "animals", "CAT", "train")]
    rows += [Captioned("sketch/cat.webp", "cat", "sketch", (), "animals", "CAT", "held-out-style")]
    return tuple(row for row in rows if (row.content, row.style) != ("clamp", "ink"))


class FakePictures:
    """Draws each content as a shape of its own, each style in a colour of its own."""

    rows = corpus()

    def image(self, row: Captioned, size: int = 128) -> Image.Image:
        number = int(hashlib.sha256(row.content.encode()).hexdigest(), 16)
        colour = tuple(hashlib.sha256(row.style.encode()).digest()[:3])
        picture = Image.new("RGB", (size, size), "white")
        corner = number % (size // 2)
        ImageDraw.Draw(picture).ellipse([corner, 4, corner + size // 3, 8 + number % (size - 8)], fill=colour)
        return picture


def random_rows(pictures: Sequence[Image.Image], width: int, seed: int) -> torch.Tensor:
    """Unit rows that follow from the pixels."""
    ink = torch.tensor([list(p.convert("RGB").resize((6, 6)).tobytes()) for p in pictures]) / -255 + 1.001
    return F.normalize(ink @ torch.randn(108, width, generator=torch.Generator().manual_seed(seed)), dim=1)


class FakeJudge:
    """Embeds by a random projection; the prototypes are those of the real pictures."""

    def __init__(self, rows: Sequence[Captioned] = FakePictures.rows) -> None:
        self.contents, self.styles = (*CONTENTS, "cat"), (*KNOWN, *HELD)
        seen = [(row, self.embed([FakePictures().image(row)])) for row in rows]
        self.content_prototypes = torch.stack(
            [torch.cat([e.content for row, e in seen if row.content == label]).mean(0) for label in self.contents]
        )
        self.style_prototypes = torch.stack(
            [torch.cat([e.style for row, e in seen if row.style == label]).mean(0) for label in self.styles]
        )

    def embed(self, pictures: Sequence[Image.Image], boxes: object = None) -> Embedded:
        return Embedded(random_rows(pictures, 16, 1), random_rows(pictures, 8, 2))

    def content_scores(self, seen: Embedded) -> torch.Tensor:
        return seen.content @ self.content_prototypes.T

    def style_scores(self, seen: Embedded) -> torch.Tensor:
        return seen.style @ self.style_prototypes.T
