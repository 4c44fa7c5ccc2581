"""Drawing styles computed from the pictures of another: no training ever sees them.

Stained glass: the canvas is cut into cells round the points of a jittered grid, nearer in place and in colour to their
own point than to any other; each cell is filled with its mean colour, and lead runs between the cells and round the
silhouette. Nothing is drawn by chance alone: the seed is made from the content's codepoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from zlib import crc32

import numpy as np
from PIL import Image, ImageFilter

STAINED_GLASS = "stained-glass"
CELLS = 18  # across
LEAD = (34, 32, 40)
_NEAR = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
_COLOUR_WEIGHT = 5.0  # of the squared distance between colours (0..1) against that in cells
_ROUNDS = 3


def stained_glass(picture: Image.Image, code: str) -> Image.Image:
    """Draw `picture` (RGBA, square) as a leaded window; the same code and picture give the same window."""
    rng = np.random.default_rng(crc32(code.encode()))
    rgba = np.asarray(picture, np.float32) / 255  # (side, side, 4)
    side, alpha = rgba.shape[0], rgba[..., 3]
    paint = rgba[..., :3] * alpha[..., None]  # premultiplied: a hidden colour must not count
    cells = _cells(np.concatenate([paint, alpha[..., None]], -1), rng)
    weight = np.bincount(cells.ravel(), alpha.ravel(), CELLS * CELLS)
    mean = [
        np.bincount(cells.ravel(), paint[..., c].ravel(), CELLS * CELLS) / np.maximum(weight, 1e-6) for c in (0, 1, 2)
    ]
    glass = np.stack(mean, -1)[cells]  # (side, side, 3)
    glass *= 1 + 0.08 * rng.uniform(-1, 1, CELLS * CELLS)[cells][..., None]  # no two panes are of one melt
    lead = _lead(cells, alpha, side)
    colour = glass * (1 - lead[..., None]) + np.array(LEAD) / 255 * lead[..., None]
    body = np.asarray(Image.fromarray((alpha > 0.35).astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(5)), np.uint8)
    outline = np.asarray(Image.fromarray(body).filter(ImageFilter.GaussianBlur(0.7)), np.float32)
    made = np.concatenate([np.clip(colour, 0, 1) * 255, outline[..., None]], -1)  # (side, side, 4)
    return Image.fromarray(np.round(made).astype(np.uint8), "RGBA")


def _cells(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Label every pixel `(side, side)` with its cell; `values` are premultiplied `(side, side, 4)`."""
    side = values.shape[0]
    pitch = side / CELLS
    grid = np.stack(np.meshgrid(np.arange(CELLS), np.arange(CELLS), indexing="ij"), -1)
    points = (grid + 0.5 + rng.uniform(-0.36, 0.36, grid.shape)).reshape(-1, 2).astype(np.float32)  # in cells, y then x
    pixel = np.clip((points * pitch).astype(int), 0, side - 1)
    colours = values[pixel[:, 0], pixel[:, 1]]  # (cells, 4)
    planes = [np.ascontiguousarray(values[..., channel]) for channel in range(4)]
    around = list(_around(points, side, pitch))
    labels = np.zeros((side, side), int)
    for _ in range(_ROUNDS):
        best = np.full((side, side), np.inf, np.float32)
        for index, far in around:
            apart = (planes[0] - np.ascontiguousarray(colours[:, 0])[index]) ** 2
            for channel in (1, 2, 3):
                apart += (planes[channel] - np.ascontiguousarray(colours[:, channel])[index]) ** 2
            apart = far + np.float32(_COLOUR_WEIGHT) * apart
            np.copyto(labels, index, where=apart < best)
            np.minimum(best, apart, out=best)
        count = np.maximum(np.bincount(labels.ravel(), minlength=CELLS * CELLS), 1)[:, None]
        sums = [np.bincount(labels.ravel(), plane.ravel(), CELLS * CELLS) for plane in planes]
        colours = (np.stack(sums, -1) / count).astype(np.float32)
    return labels


def _around(points: np.ndarray, side: int, pitch: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each of the nine nearest grid squares: which cell's it is, and how far (squared) its point is, per pixel."""
    at = ((np.arange(side) + 0.5).astype(np.float32) / pitch).astype(np.float32)
    home = at.astype(int)  # the grid square a pixel lies in
    for dy, dx in _NEAR:
        y, x = (np.clip(home + step, 0, CELLS - 1) for step in (dy, dx))
        index = y[:, None] * CELLS + x
        yield index, (at[:, None] - points[index, 0]) ** 2 + (at - points[index, 1]) ** 2


def _lead(cells: np.ndarray, alpha: np.ndarray, side: int) -> np.ndarray:
    """How much of each pixel is lead, 0..1: between cells, and at the silhouette."""
    between = np.zeros((side, side), bool)
    between[:, 1:] |= cells[:, 1:] != cells[:, :-1]
    between[1:] |= cells[1:] != cells[:-1]
    lines = Image.fromarray(between.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(0.9))
    thin = np.clip(np.asarray(lines, np.float32) / 255 * 1.9, 0, 1)
    inside = Image.fromarray((alpha > 0.35).astype(np.uint8) * 255).filter(ImageFilter.MinFilter(3))
    rim = 1 - np.asarray(inside.filter(ImageFilter.GaussianBlur(0.7)), np.float32) / 255
    return np.maximum(thin, rim)
