"""Pictures as the judge may meet them: anywhere, at any size, on any ground, unsharp, with neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pipelines.judge import SIZE
from .scenes import COLOURS


class Views:
    """Pictures as the judge may meet them.

    Args:
        pixels: `(pictures, 4, size, size)` uint8, straight alpha.
    """

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def whole(self, chosen: Tensor, rng: torch.Generator) -> Tensor:
        """Half as large to whole, on any ground, some of them unsharp: `(batch, 3, size, size)` in -1..1."""
        count, side = len(chosen), self.pixels.shape[-1]
        size = torch.where(torch.rand(count, generator=rng) < 0.3, 1.0, torch.rand(count, generator=rng) * 0.5 + 0.5)
        x, y = ((torch.rand(count, generator=rng) - 0.5) * (1 - size) for _ in range(2))
        paint = self._moved(chosen, size, x, y, side, rng)
        picture = self._grounds(count, side, rng) * (1 - paint[:, 3:]) + paint[:, :3]
        unsharp = torch.rand(count, generator=rng) < 0.3
        low = int(torch.randint(40, 96, (1,), generator=rng))
        picture[unsharp] = _unsharp(picture[unsharp], low)
        picture = picture + 0.02 * (torch.rand(count, 3, 1, 1, generator=rng) * 2 - 1)
        picture = picture + 0.02 * torch.rand(count, 1, 1, 1, generator=rng) * torch.randn(picture.shape, generator=rng)
        return (picture.clamp(0, 1) * 2 - 1).contiguous(memory_format=torch.channels_last)

    def changed(self, chosen: Tensor, rng: torch.Generator) -> Tensor:
        """Anywhere, on any ground, with neighbours, blurred, noisy, off in colour: `(batch, 3, 64, 64)` in -1..1."""
        count = len(chosen)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.rand(*(shape or (count,)), generator=rng) * (high - low) + low

        canvas = self._grounds(count, SIZE, rng)
        beside = torch.rand(count, generator=rng) < 0.25  # a neighbour looks into the box from one side
        other = self._moved(torch.randint(len(self.pixels), (count,), generator=rng), *_outside(count, rng), SIZE, rng)
        other = other * beside[:, None, None, None]
        canvas = canvas * (1 - other[:, 3:]) + other[:, :3]
        whole = torch.rand(count, generator=rng) < 0.35
        size = torch.where(whole, torch.ones(count), uniform(0.55, 1.15))
        room = 0.5 * (1 - size).abs()
        x, y = (torch.where(whole, torch.zeros(count), uniform(-1, 1) * room) for _ in range(2))
        paint = self._moved(chosen, size, x, y, SIZE, rng)
        picture = canvas * (1 - paint[:, 3:]) + paint[:, :3]
        picture = picture * uniform(0.9, 1.1)[:, None, None, None] + uniform(-0.06, 0.06, count, 3)[:, :, None, None]
        soft = torch.rand(count, generator=rng) < 0.4
        low = int(torch.randint(24, 48, (1,), generator=rng))
        picture[soft] = _unsharp(picture[soft], low)
        noise = torch.randn(picture.shape, generator=rng) * uniform(0, 0.05)[:, None, None, None]
        return ((picture + noise).clamp(0, 1) * 2 - 1).contiguous(memory_format=torch.channels_last)

    def _grounds(self, count: int, side: int, rng: torch.Generator) -> Tensor:
        palette = torch.tensor(list(COLOURS.values())) / 255
        top = palette[torch.randint(len(palette), (count,), generator=rng)]
        bottom = torch.where(torch.rand(count, 1, generator=rng) < 0.6, top, top * 0.7)
        white = torch.rand(count, 1, generator=rng) < 0.45
        top, bottom = (torch.where(white, torch.ones(3), ground)[:, :, None, None] for ground in (top, bottom))
        return (top + (bottom - top) * torch.linspace(0, 1, side)[:, None]).expand(-1, -1, -1, side)

    def _moved(self, chosen: Tensor, size: Tensor, x: Tensor, y: Tensor, side: int, rng: torch.Generator) -> Tensor:
        """Premultiplied `(batch, 4, side, side)`: scaled by `size`, moved by fractions x and y, some mirrored."""
        rgba = self.pixels[chosen].float() / 255
        rgba = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1)
        across = torch.where(torch.rand(len(chosen), generator=rng) < 0.25, -1.0, 1.0) / size
        zero = torch.zeros(len(chosen))
        rows = [torch.stack([across, zero, -2 * x * across], 1), torch.stack([zero, 1 / size, -2 * y / size], 1)]
        grid = F.affine_grid(torch.stack(rows, 1), [len(chosen), 4, side, side], align_corners=False)
        return F.grid_sample(rgba, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _unsharp(pictures: Tensor, low: int) -> Tensor:
    """Made as small as `low` pixels and large again."""
    small = F.interpolate(pictures, size=low, mode="area")
    return F.interpolate(small, size=pictures.shape[-1], mode="bilinear", align_corners=False)


def _outside(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Size and place of a neighbour: beyond one of the four sides, a little of it inside."""
    size = torch.rand(count, generator=rng) * 0.5 + 0.6
    away = 0.5 + size / 2 - torch.rand(count, generator=rng) * 0.22
    along = torch.rand(count, generator=rng) - 0.5
    side = torch.randint(4, (count,), generator=rng)
    x = torch.where(side == 0, away, torch.where(side == 1, -away, along))
    y = torch.where(side == 2, away, torch.where(side == 3, -away, along))
    return size, x, y
