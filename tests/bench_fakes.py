"""A judge and pictures whose truth is seen at a glance: contents are discs of a colour, a style may outline them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from intarsia.pipelines.adapter_types import AdapterFile, LowRank
from intarsia.pipelines.judge import Embedded
from intarsia.training.corpus import SETS, Captioned
from PIL import Image, ImageColor, ImageDraw
from torch import Tensor

PALETTE = ("red", "lime", "blue", "gold", "magenta", "cyan", "purple", "orange", "green", "brown", "navy", "pink")
INKED = "fluent-3d"  # the fake style that has a black outline; the others have none
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def disc(colour: str, style: str = "noto", size: int = 96) -> Image.Image:
    """A content of the fakes: a disc on white."""
    picture = Image.new("RGB", (size, size), "white")
    edge = {"outline": "black", "width": size // 12} if style == INKED else {}
    ImageDraw.Draw(picture).ellipse((1, 1, size - 2, size - 2), fill=colour, **cast(Any, edge))
    return picture


KNOWN = torch.tensor([ImageColor.getrgb(name)[:3] for name in (*PALETTE, "white", "black")]).float()


def nearest(pictures: Sequence[Image.Image]) -> Tensor:
    """The number in `KNOWN` of the nearest colour: `(n, 16, 16)`."""
    small = [picture.convert("RGB").resize((16, 16), Image.Resampling.NEAREST).tobytes() for picture in pictures]
    pixels = torch.frombuffer(bytearray(b"".join(small)), dtype=torch.uint8).float().view(-1, 3)
    return torch.cdist(pixels, KNOWN).argmin(dim=1).view(-1, 16, 16)


def colours(pictures: Sequence[Image.Image]) -> Tensor:
    """Share of the pixels nearest to each colour of the palette, then to white, then to black: `(n, 14)`."""
    return torch.nn.functional.one_hot(nearest(pictures), len(KNOWN)).float().mean(dim=(1, 2))


def cut(pictures: Sequence[Image.Image]) -> Tensor:
    """How much something is cut off by the edge of its picture, beyond what a whole disc touches: `(n, 1)`."""
    full = (nearest(pictures) != len(PALETTE)).float()  # (n, 16, 16), 0 where white
    sides = torch.stack([full[:, 0].mean(1), full[:, -1].mean(1), full[:, :, 0].mean(1), full[:, :, -1].mean(1)])
    return (sides.amax(dim=0) - 0.5).clamp(min=0)[:, None]


class FakeJudge:
    """Tells discs by their colour and styles by the outline."""

    contents = PALETTE
    styles = ("noto", INKED)

    def __init__(self) -> None:
        self._contents = self.embed([disc(name) for name in PALETTE]).content
        self._styles = self.embed([disc("red", style) for style in self.styles]).style

    def embed(
        self, pictures: Sequence[Image.Image], boxes: Sequence[Any] | None = None, style: bool = True
    ) -> Embedded:
        crops: list[Image.Image] = []
        for picture, box in zip(pictures, boxes or [None] * len(pictures), strict=True):
            left, top, right, bottom = box or (0, 0, 1, 1)
            width, height = picture.size
            area = (round(left * width), round(top * height), round(right * width), round(bottom * height))
            crops.append(picture.crop(area))
        seen = colours(crops)
        ink = torch.stack([1 - 2 * seen[:, -1], 2 * seen[:, -1]], dim=1)
        content = torch.cat([seen[:, :-1], 10 * cut(crops)], dim=1)  # it knows whole things, not their pieces
        return Embedded(torch.nn.functional.normalize(content, dim=1), torch.nn.functional.normalize(ink, dim=1))

    def content_scores(self, seen: Embedded) -> Tensor:
        return seen.content @ self._contents.T

    def style_scores(self, seen: Embedded) -> Tensor:
        return seen.style @ self._styles.T


class FakePictures:
    """Every colour in nine styles, as held-out contents of four groups."""

    folder = Path()

    def __init__(self) -> None:
        names = [icon_set.style for icon_set in SETS][:9]
        self.rows = tuple(
            Captioned(f"{style}/{name}", name, style, (), f"group {i % 4}", f"{i:04X}", "held-out")
            for style in names
            for i, name in enumerate(PALETTE)
        )

    def of(self, content: str | None = None, style: str | None = None, split: str | None = None) -> list[Captioned]:
        wanted = {"content": content, "style": style, "split": split}
        return [row for row in self.rows if all(v is None or getattr(row, k) == v for k, v in wanted.items())]

    def image(self, row: Captioned, size: int = 128) -> Image.Image:
        return disc(row.content, row.style, size)


def adapter(content: str, seed: int) -> AdapterFile:
    rng = torch.Generator().manual_seed(seed)
    layer = LowRank(torch.randn(4, 32, generator=rng), torch.randn(32, 4, generator=rng), 4.0)
    return AdapterFile(Path(content), "sdxl", "concept", "", {LAYER: layer}, content, {})
