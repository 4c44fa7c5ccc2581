"""How the detail of a picture spreads over spatial frequencies: radial profiles and their high end, pure functions.

Paper: CMLoRA, arXiv:2502.04923 (H_0.2). As in its code: grey values, the shifted Fourier transform, the mean over rings
that are one cell wide, divided by the largest; the logarithm of the amplitude for pictures, the amplitude itself for
latents. Its code counts latents from ring 80 on, which 64 x 64 latents do not have; here the cut is a share of the
largest radius, and on canvases that are not square a ring is one spatial frequency, not one index.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CUT = 0.2  # share of the largest radius from which frequencies count as high: ring 72 of a picture of 512 x 512


def radii(size: tuple[int, int]) -> Tensor:
    """Distance of every cell of a shifted spectrum from its centre, in cells of the longer side.

    Args:
        size: (height, width).

    Returns:
        `(height, width)`, float64.
    """
    side = max(size)
    rows, columns = ((torch.arange(n, dtype=torch.float64) - n // 2) * (side / n) for n in size)
    return torch.hypot(rows[:, None], columns[None])


def profile(values: Tensor, log: bool = True) -> Tensor:
    """Mean of the spectrum's amplitude, or of its logarithm, over rings; the largest is 1.

    Args:
        values: `(height, width)`; the logarithm depends on their scale, so pictures go from 0 to 255.
        log: Take the logarithm of each amplitude first.

    Returns:
        `(rings,)`, float64: ring r holds the cells whose radius lies from r to r + 1. All zero if nothing is positive.
    """
    amplitude = torch.fft.fftshift(torch.fft.fft2(values.detach().cpu().double())).abs()
    if log:
        amplitude = torch.log(amplitude + 1e-8)
    rings = radii((values.shape[0], values.shape[1])).long().flatten()
    means = torch.bincount(rings, amplitude.flatten()) / torch.bincount(rings).clamp(min=1)
    top = means.max()
    return means / top if top > 0 else torch.zeros_like(means)


def first_high(size: tuple[int, int], cut: float = CUT) -> int:
    """The first ring that counts as high: 72 for 512 x 512, 9 for 64 x 64."""
    return int(cut * float(radii(size).max()))


def high(spectrum: Tensor, size: tuple[int, int], cut: float = CUT) -> float:
    """Mean of a profile over its high rings, the score H of the paper.

    Args:
        spectrum: From `profile`.
        size: (height, width) of what it is the profile of.
        cut: Share of the largest radius.
    """
    return float(spectrum[first_high(size, cut) :].mean())


def picture_profile(pixels: Tensor) -> Tensor:
    """Profile of a picture, `(height, width, channels)` from 0 to 255: the logarithm, of the mean over the channels."""
    return profile(pixels.double().mean(-1))


def latent_score(latents: Tensor, cut: float = CUT) -> float:
    """High end of one picture's latents, `(channels, height, width)`: the amplitude, of the mean over the channels."""
    grey = latents.double().mean(0)
    return high(profile(grey, log=False), (grey.shape[0], grey.shape[1]), cut)


def ordered(scores: Sequence[float]) -> list[int]:
    """Indices from the highest score to the lowest; of equal ones the first comes first."""
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))


def bands(spectrum: Tensor, size: tuple[int, int], most: int = 64) -> tuple[list[float], list[float]]:
    """A profile for a chart: edges in shares of the largest radius, and the mean between each two of them.

    Args:
        spectrum: From `profile`.
        size: (height, width) of what it is the profile of.
        most: Rings are joined until there are no more bands than this.
    """
    largest = float(radii(size).max())
    each = -(-len(spectrum) // most)
    starts = range(0, len(spectrum), each)
    edges = [min(start / largest, 1.0) for start in (*starts, len(spectrum))]
    return edges, [float(part.mean()) for part in spectrum.split(each)]
