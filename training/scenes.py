"""Draw captioned pictures from transparent ones: backgrounds, placement, mirroring, scenes of two or three objects.

What is drawn is decided by a seeded generator on the CPU (`Plan`), how is computed in batches on any device (`Bank`):
the same seed gives the same pictures and captions everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..pipelines.errors import InputError
from .corpus import Captioned

COLOURS = {
    "red": (214, 45, 48), "orange": (245, 140, 40), "yellow": (250, 210, 60), "green": (70, 160, 80),
    "teal": (40, 150, 150), "blue": (55, 110, 210), "light blue": (160, 205, 240), "purple": (130, 80, 180),
    "pink": (245, 165, 195), "brown": (130, 90, 60), "grey": (150, 150, 150), "light grey": (220, 220, 220),
    "black": (24, 24, 28), "beige": (240, 228, 205),
}  # fmt: skip


@dataclass(frozen=True)
class Placed:
    """One picture of the bank at a place: centre and size as fractions of the canvas."""

    index: int
    x: float = 0.5
    y: float = 0.5
    size: float = 1.0
    mirror: bool = False

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom as fractions of the canvas; parts may lie outside it."""
        half = self.size / 2
        return self.x - half, self.y - half, self.x + half, self.y + half


@dataclass(frozen=True)
class Plan:
    """One picture to draw: objects back to front, background from top to bottom colour (0..1), and its caption.

    In a scene, `spans` says which characters of the caption name each object.
    """

    objects: tuple[Placed, ...]
    top: tuple[float, ...]
    bottom: tuple[float, ...]
    caption: str
    spans: tuple[tuple[int, int], ...] = ()


def read_folder(folder: Path) -> list[Captioned]:
    """List the captioned pictures of a folder: `captions.jsonl`, or pictures with a `.txt` of the same name.

    Raises:
        InputError: The folder holds no captioned picture.
    """
    listed = folder / "captions.jsonl"
    if listed.exists():
        rows = [Captioned(**json.loads(line)) for line in listed.read_text().splitlines()]
    else:
        pictures = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")]
        texts = {p: p.with_suffix(".txt").read_text().strip() for p in pictures if p.with_suffix(".txt").exists()}
        rows = [Captioned(str(p.relative_to(folder)), t, "", (), "", p.stem, "train") for p, t in texts.items()]
    if not rows:
        raise InputError(f"{folder} holds no captioned pictures.", "Put a .txt beside each picture.")
    return rows


class Planner:
    """Draws plans for a list of captioned pictures.

    Args:
        rows: The bank's pictures, in its order.
        scenes: Share of drawn pictures that hold two or three objects.
        plain_share: Share of all pictures that are to be shown as they are, on white.
    """

    def __init__(self, rows: Sequence[Captioned], scenes: float = 0.2, plain_share: float = 0.3) -> None:
        self.rows = rows
        self.scenes = scenes
        self.plain_share = plain_share
        # Combined sequences ("woman firefighter: dark hair") are a third of the names; they must not drown the rest.
        weights = np.array([0.35 if "200D" in row.code else 1.0 for row in rows])
        self.chance = weights / weights.sum()
        self.by_style: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            if "200D" not in row.code:
                self.by_style.setdefault(row.style, []).append(index)

    def draw(self, count: int, rng: np.random.Generator) -> list[Plan]:
        """Draw `count` plans."""
        chosen = rng.choice(len(self.rows), size=count, p=self.chance)
        return [self._scene(int(i), rng) if rng.random() < self.scenes else self._single(int(i), rng) for i in chosen]

    def plain(self, indices: Sequence[int], rng: np.random.Generator) -> list[Plan]:
        """Each picture as it is, on white."""
        white = (1.0, 1.0, 1.0)
        return [Plan((Placed(i),), white, white, self._caption(i, "", rng)) for i in indices]

    def _single(self, index: int, rng: np.random.Generator) -> Plan:
        top, bottom, words = _background(rng)
        mirror = bool(rng.random() < 0.15)
        if rng.random() < 0.6:
            placed, where = Placed(index, mirror=mirror), ""
        else:
            size = float(rng.uniform(0.45, 0.95))
            room = (1 - size) / 2
            x, y = (float(0.5 + rng.uniform(-room, room)) for _ in range(2))
            placed, where = Placed(index, x, y, size, mirror), _place(x, y, size)
            where = where if rng.random() < 0.5 else ""
        return Plan((placed,), top, bottom, self._caption(index, where + words, rng))

    def _scene(self, index: int, rng: np.random.Generator) -> Plan:
        style = self.rows[index].style
        pool = self.by_style.get(style) or [index]
        count = 2 if rng.random() < 0.9 else 3
        members = [index, *(int(pool[i]) for i in rng.integers(len(pool), size=count - 1))]
        top, bottom, background = _background(rng)
        names = [named(self.rows[i].content) for i in members]
        size = 0.5 if count == 2 else 0.36
        vertical = count == 2 and rng.random() < 0.3
        placed: list[Placed] = []
        for number, member in enumerate(members):
            along = (number + 0.5) / count + float(rng.uniform(-0.03, 0.03))
            across = 0.5 + float(rng.uniform(-0.12, 0.12))
            s = size * float(rng.uniform(0.85, 1.0))
            placed.append(Placed(member, across, along, s) if vertical else Placed(member, along, across, s))
        if count == 3:
            order, words = (0, 1, 2), "{}, {} and {}"
        else:
            relation = ("above" if vertical else "left of", "below" if vertical else "right of")
            form = rng.random()
            order = (1, 0) if 0.4 <= form < 0.7 else (0, 1)
            word = relation[0] if form < 0.4 else relation[1] if form < 0.7 else "and" if form < 0.85 else "next to"
            words = f"{{}} {word} {{}}"
        text, spans = _written(words, [names[i] for i in order])
        where = tuple(spans[order.index(i)] for i in range(count))
        return Plan(tuple(placed), top, bottom, f"{text}{background}{_styled(style)}", where)

    def _caption(self, index: int, where: str, rng: np.random.Generator) -> str:
        row, form = self.rows[index], rng.random()
        style = _styled(row.style)
        if form < 0.55:
            return f"{named(row.content)}{where}{style}"
        if form < 0.65:
            return f"{row.content}{where}{style}"
        if form < 0.75 and row.tags:
            tags = rng.choice(row.tags, size=min(3, len(row.tags)), replace=False)
            return f"{', '.join(tags)}{where}{style}"
        if form < 0.87:
            return f"{named(row.content)}{where}"
        if form < 0.95 and row.style:
            return f"{row.style} style{where}"
        return f"{row.content}{style}" if form < 0.97 else ""


def _written(words: str, names: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """Fill names into words with `{}` for each, and say where each stands."""
    text, spans = "", list[tuple[int, int]]()
    for before, name in zip(words.split("{}"), (*names, ""), strict=True):
        text += before
        spans.append((len(text), len(text) + len(name)))
        text += name
    return text, spans[:-1]


def _styled(style: str) -> str:
    return f", {style} style" if style else ""


def named(content: str) -> str:
    """`content` with its article, where it takes one."""
    plain = content.split(":")[0]
    if plain.endswith("s") or plain[:1].isdigit() or (" of " in plain and plain.startswith("pair")):
        return content
    return f"{'an' if plain[:1].lower() in 'aeiou' else 'a'} {content}"


def _background(rng: np.random.Generator) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    kind = rng.random()
    if kind < 0.5:
        return (1.0,) * 3, (1.0,) * 3, " on a white background" if rng.random() < 0.08 else ""
    names = list(COLOURS)
    name = names[int(rng.integers(len(names)))]
    base = np.array(COLOURS[name]) / 255
    top = np.clip(base + rng.uniform(-0.04, 0.04, 3), 0, 1)
    bottom = top if kind < 0.8 else np.clip(top * rng.uniform(0.55, 0.85), 0, 1)
    article = "an" if name[0] in "aeiou" else "a"
    words = f" on {article} {name} background" if kind < 0.8 else f" on {article} {name} gradient background"
    return tuple(map(float, top)), tuple(map(float, bottom)), words if rng.random() < 0.9 else ""


def _place(x: float, y: float, size: float) -> str:
    vertical = "top" if y < 0.42 else "bottom" if y > 0.58 else ""
    horizontal = "left" if x < 0.42 else "right" if x > 0.58 else ""
    small = ", small" if size < 0.6 else ""
    place = f"{vertical} {horizontal}".strip()
    return f"{small}{', ' + place if place else ''}"


class Bank:
    """All pictures in memory as premultiplied RGBA, from which batches are drawn.

    Args:
        folder: Where the pictures lie.
        rows: Which of them, in order.
        size: Side in pixels.
        device: Where to keep and draw them.
    """

    def __init__(self, folder: Path, rows: Sequence[Captioned], size: int, device: torch.device) -> None:
        def load(row: Captioned) -> np.ndarray:
            with Image.open(folder / row.file) as picture:
                square = picture.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
            return np.asarray(square)

        self.size = size
        self.pixels = torch.empty(len(rows), 4, size, size, dtype=torch.uint8, device=device)
        with ThreadPoolExecutor(16) as pool:
            for index, array in enumerate(pool.map(load, rows)):
                self.pixels[index] = torch.from_numpy(array.copy()).permute(2, 0, 1)

    def render(self, plans: Sequence[Plan]) -> Tensor:
        """Draw plans: `(batch, 3, size, size)` in -1..1."""
        device = self.pixels.device
        top = torch.tensor([p.top for p in plans], device=device)[:, :, None, None]
        bottom = torch.tensor([p.bottom for p in plans], device=device)[:, :, None, None]
        ramp = torch.linspace(0, 1, self.size, device=device)[None, None, :, None]
        canvas = (top + (bottom - top) * ramp).expand(-1, -1, -1, self.size)  # (batch, 3, size, size)
        for layer in range(max(len(p.objects) for p in plans)):
            used = [i for i, p in enumerate(plans) if len(p.objects) > layer]
            placed = [plans[i].objects[layer] for i in used]
            paint = self._placed(placed)
            where = torch.tensor(used, device=device)
            under = canvas[where]
            canvas = canvas.index_copy(0, where, under * (1 - paint[:, 3:]) + paint[:, :3])
        return canvas * 2 - 1

    def _placed(self, placed: Sequence[Placed]) -> Tensor:
        """Each picture at its place: premultiplied `(batch, 4, size, size)` in 0..1."""
        device = self.pixels.device
        rgba = self.pixels[torch.tensor([p.index for p in placed], device=device)].float() / 255
        rgba = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1)
        moving = [i for i, p in enumerate(placed) if p.size != 1 or p.mirror]
        for small in (False, True):
            moved = [i for i in moving if (placed[i].size <= 0.6) == small]
            if not moved:
                continue
            where = torch.tensor(moved, device=device)
            source = F.avg_pool2d(rgba[where], 2) if small else rgba[where]  # sampling alone would skip pixels
            matrices = torch.tensor([_inverse(placed[i]) for i in moved], device=device)
            grid = F.affine_grid(matrices, [len(moved), *rgba.shape[1:]], align_corners=False)
            shifted = F.grid_sample(source, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
            rgba = rgba.index_copy(0, where, shifted.clamp(0, 1))
        return rgba


def _inverse(placed: Placed) -> list[list[float]]:
    """The matrix `(2, 3)` that maps canvas to picture, both in -1..1, as `affine_grid` wants it."""
    across = (-1 if placed.mirror else 1) / placed.size
    return [[across, 0, across * (1 - 2 * placed.x)], [0, 1 / placed.size, (1 - 2 * placed.y) / placed.size]]
