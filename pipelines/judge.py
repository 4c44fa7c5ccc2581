"""The judge: says what a picture, or a box of it, shows and in which style, and how sure that is.

Two small networks, one embedding each. It is a measuring instrument: it was trained on every content and style of the
corpus, held-out ones too, so nothing may be trained or distilled from it except as a named reward. Its own errors are
in `assets/judge/README.md`; a score means no more than those allow.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from .boxes import Box
from .errors import WeightsError

if TYPE_CHECKING:
    from PIL import Image

SIZE = 64  # pixels in which content is looked at
STYLE_SIZE = 128  # pixels in which style is looked at: it lies in edges and shading
CONTENT, STYLE = 96, 32  # widths of the two embeddings
HIDDEN = 256  # between what the style network measures and its embedding
AT_ONCE = 128  # pictures per forward pass


class Residual(nn.Module):
    """Two 3x3 convolutions around which the signal may pass."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.silu(self.first_norm(self.first(x)))
        return F.silu(x + self.second_norm(self.second(inner)))


class ContentNetwork(nn.Module):
    """Pictures `(batch, 3, 64, 64)` in -1..1 to unit rows `(batch, 96)` that say what they show.

    `to_style` reads a rough style `(batch, 32)` off the lower layers. Only training uses it, as a second task.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 224)) -> None:
        super().__init__()
        stem, low, middle, high = widths
        self.stem = nn.Sequential(nn.Conv2d(3, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem), nn.SiLU())
        self.low = nn.Sequential(*_down(stem, low), Residual(low))
        self.middle = nn.Sequential(*_down(low, middle), Residual(middle))
        self.high = nn.Sequential(*_down(middle, high), Residual(high))
        self.to_content = nn.Linear(2 * high, CONTENT)
        self.to_style = nn.Linear(2 * (low + middle), STYLE)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        low = self.low(self.stem(pictures))  # (batch, low, 16, 16)
        middle = self.middle(low)  # (batch, middle, 8, 8)
        high = self.high(middle)  # (batch, high, 4, 4)
        content = torch.cat([high.mean((2, 3)), high.amax((2, 3))], dim=1)
        return F.normalize(self.to_content(content), dim=1), F.normalize(self.to_style(moments(low, middle)), dim=1)


class StyleNetwork(nn.Module):
    """Pictures `(batch, 3, height, width)` in -1..1 to unit rows `(batch, 32)` that say how they are drawn.

    Mean and spread of every channel at every depth: what is where is forgotten, how it is drawn stays.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 80, 128)) -> None:
        super().__init__()
        low, middle, high = widths
        self.low = nn.Sequential(nn.Conv2d(3, low, 5, 2, 2, bias=False), nn.BatchNorm2d(low), nn.SiLU())
        self.middle = nn.Sequential(*_down(low, middle), Residual(middle))
        self.high = nn.Sequential(*_down(middle, high), Residual(high))
        seen = 2 * sum(widths)
        self.to_style = nn.Sequential(
            nn.BatchNorm1d(seen), nn.Linear(seen, HIDDEN), nn.SiLU(), nn.Dropout(0.3), nn.Linear(HIDDEN, STYLE)
        )

    def forward(self, pictures: Tensor) -> Tensor:
        return self.embed(self.measure(pictures))

    def measure(self, pictures: Tensor) -> Tensor:
        """Mean and spread of every channel: `(batch, 2 * sum of the widths)`."""
        low = self.low(pictures)  # (batch, low, height / 2, width / 2)
        middle = self.middle(low)
        return moments(low, middle, self.high(middle))

    def embed(self, measured: Tensor) -> Tensor:
        """Unit rows `(batch, 32)` from what was measured."""
        return F.normalize(self.to_style(measured), dim=1)


def moments(*levels: Tensor) -> Tensor:
    """Mean and standard deviation over places of every channel of every level: `(batch, 2 * channels)`."""
    parts: list[Tensor] = []
    for x in levels:
        deviation = (x.float().var((2, 3), correction=0) + 1e-5).sqrt()
        parts += [x.mean((2, 3)), deviation.to(x.dtype)]
    return torch.cat(parts, dim=1)


def _down(inside: int, out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inside, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.SiLU()


@dataclass(frozen=True)
class Embedded:
    """What the judge saw: unit rows `content` (n, 96) and `style` (n, 32), which is empty if it was not asked for."""

    content: Tensor
    style: Tensor

    def __len__(self) -> int:
        return len(self.content)

    def __getitem__(self, which: int | slice | Sequence[int]) -> Embedded:
        index = [which] if isinstance(which, int) else which if isinstance(which, slice) else list(which)
        return Embedded(self.content[index], self.style[index] if len(self.style) else self.style)


class Judge:
    """The networks with a prototype (mean embedding of the real pictures) for every content and style.

    Args:
        networks: For content and for style, trained.
        contents: Labels of `content_prototypes`.
        styles: Labels of `style_prototypes`.
        content_prototypes: `(contents, 96)`, unit rows.
        style_prototypes: `(styles, 32)`, unit rows.
        unseen: Contents and files of the corpus that its training left out, so that its error can be told.
    """

    def __init__(
        self,
        networks: tuple[ContentNetwork, StyleNetwork],
        contents: Sequence[str],
        styles: Sequence[str],
        content_prototypes: Tensor,
        style_prototypes: Tensor,
        unseen: Iterable[str] = (),
    ) -> None:
        self.networks = networks
        for network in networks:
            network.eval().requires_grad_(False)
        self.contents, self.styles = tuple(contents), tuple(styles)
        self.content_prototypes, self.style_prototypes = content_prototypes, style_prototypes
        self.unseen = frozenset(unseen)

    @classmethod
    def load(cls, folder: Path | None = None) -> Judge:
        """Read the judge from a folder; the one that comes with Intarsia if None.

        Raises:
            WeightsError: The folder holds no judge.
        """
        with as_file(files("intarsia.assets").joinpath("judge")) as own:
            where = folder or own
            try:
                names = json.loads((where / "labels.json").read_text("utf-8"))
                tensors = {key: value.float() for key, value in load_file(where / "judge.safetensors").items()}
            except FileNotFoundError as error:
                raise WeightsError(f"{where} holds no judge.", "Leave the folder out to use Intarsia's own.") from error
        networks = ContentNetwork(), StyleNetwork()
        for part, network in zip(("content", "style"), networks, strict=True):
            own_keys = {key.removeprefix(f"{part}."): v for key, v in tensors.items() if key.startswith(f"{part}.")}
            network.load_state_dict(own_keys, strict=False)  # a batch norm's counter is not kept
        prototypes = [F.normalize(tensors[f"prototypes.{part}"], dim=1) for part in ("content", "style")]
        unseen = (*names["unseen_contents"], *names["unseen_renderings"])
        return cls(networks, names["contents"], names["styles"], prototypes[0], prototypes[1], unseen)

    def embed(
        self, pictures: Sequence[Image.Image], boxes: Sequence[Box | None] | None = None, style: bool = True
    ) -> Embedded:
        """Look at pictures, or at one box of each.

        Args:
            pictures: Any size and mode; transparency is laid on white.
            boxes: One per picture, None for the whole.
            style: Look at the style too, which takes five times as long as the content.
        """
        chosen = list(zip(pictures, boxes or [None] * len(pictures), strict=True))
        looks: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(chosen), AT_ONCE):
            part = chosen[start : start + AT_ONCE]
            with torch.no_grad():
                content = self.networks[0](torch.stack([pixels(picture, box) for picture, box in part]))[0]
                fine = [pixels(picture, box, STYLE_SIZE) for picture, box in part] if style else []
                looks.append((content, self.networks[1](torch.stack(fine)) if style else torch.empty(0, STYLE)))
        if not looks:
            return Embedded(torch.empty(0, CONTENT), torch.empty(0, STYLE))
        return Embedded(torch.cat([content for content, _ in looks]), torch.cat([found for _, found in looks]))

    def content_scores(self, seen: Embedded) -> Tensor:
        """Cosine to the prototype of every content: `(n, contents)`."""
        return seen.content @ self.content_prototypes.T

    def style_scores(self, seen: Embedded) -> Tensor:
        """Cosine to the prototype of every style: `(n, styles)`."""
        return seen.style @ self.style_prototypes.T


def pixels(picture: Image.Image, box: Box | None = None, size: int = SIZE) -> Tensor:
    """One picture (or a box of it, in fractions) as a network sees it: `(3, size, size)` in -1..1."""
    import numpy as np
    from PIL import Image

    if picture.mode not in ("RGB", "L"):
        clear = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    width, height = picture.size
    left, top, right, bottom = box or (0, 0, 1, 1)
    part = (left * width, top * height, right * width, bottom * height)
    small = picture.convert("RGB").resize((size, size), Image.Resampling.LANCZOS, box=part)
    return torch.from_numpy(np.asarray(small).astype("float32") / 127.5 - 1).permute(2, 0, 1).contiguous()
