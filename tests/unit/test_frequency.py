"""Radial profiles against pictures whose spectrum is known, and against sums written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from intarsia.composition import frequency
from torch import Tensor


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filtered(values: Tensor, low: float, high: float) -> Tensor:
    """Keep the frequencies from `low` to below `high`, in shares of the largest radius."""
    size = (values.shape[0], values.shape[1])
    away = frequency.radii(size) / frequency.radii(size).max()
    spectrum = torch.fft.fftshift(torch.fft.fft2(values)) * ((away >= low) & (away < high))
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum)).real


@pytest.mark.parametrize(("side", "rings", "first"), [(64, 46, 9), (512, 363, 72), (256, 182, 36), (32, 23, 4)])
def test_the_cut_lies_at_a_fifth_of_the_largest_radius(side: int, rings: int, first: int) -> None:
    assert len(frequency.profile(noise(side, side))) == rings
    assert frequency.first_high((side, side)) == first


def test_latents_of_64_by_64_have_a_score_where_the_released_code_has_none() -> None:
    latents = noise(4, 64, 64)
    rings = frequency.profile(latents.mean(0), log=False)
    assert math.isnan(float(rings[80:].mean()))
    score = frequency.latent_score(latents)
    assert score == pytest.approx(float(rings[9:].mean()))
    assert 0 < score < 1


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (8, 6), (5, 9)])
@pytest.mark.parametrize("log", [False, True])
def test_a_profile_equals_the_sum_written_out(size: tuple[int, int], log: bool) -> None:
    height, width = size
    values = noise(*size).numpy()
    side = max(size)
    rings: dict[int, list[float]] = {}
    for v in range(-(height // 2), height - height // 2):
        for u in range(-(width // 2), width - width // 2):
            wave = sum(
                values[y, x] * np.exp(-2j * np.pi * (v * y / height + u * x / width))
                for y in range(height)
                for x in range(width)
            )
            radius = int(math.hypot(v * side / height, u * side / width))
            rings.setdefault(radius, []).append(math.log(abs(wave) + 1e-8) if log else abs(wave))
    expected = [float(np.mean(rings[radius])) if radius in rings else 0.0 for radius in range(max(rings) + 1)]
    top = max(expected)
    found = frequency.profile(torch.from_numpy(values), log=log)
    assert found.tolist() == pytest.approx([value / top for value in expected], abs=1e-9)


@pytest.mark.parametrize("waves", [3, 12, 30])
def test_a_wave_has_its_whole_energy_in_its_ring(waves: int) -> None:
    columns = torch.arange(64, dtype=torch.float64)
    wave = torch.cos(2 * math.pi * waves * columns / 64).expand(64, 64)
    rings = frequency.profile(wave, log=False)
    assert int(rings.argmax()) == waves
    assert float(rings.sum()) == pytest.approx(1.0, abs=1e-9)
    high = frequency.high(rings, (64, 64))
    assert high == pytest.approx(1 / len(rings[9:]) if waves >= 9 else 0.0, abs=1e-9)


def test_a_wave_has_the_same_ring_along_both_sides_of_a_long_canvas() -> None:
    rows, columns = torch.arange(64, dtype=torch.float64), torch.arange(128, dtype=torch.float64)
    down = torch.cos(2 * math.pi * 10 * rows / 64)[:, None].expand(64, 128)
    along = torch.cos(2 * math.pi * 20 * columns / 128).expand(64, 128)  # as many per cell
    rings = [int(frequency.profile(wave, log=False).argmax()) for wave in (down, along)]
    assert rings == [20, 20]


def test_white_noise_is_flat() -> None:
    rings = torch.stack([frequency.profile(noise(64, 64, seed=seed), log=False)[5:32] for seed in range(20)]).mean(0)
    assert float(rings.std() / rings.mean()) < 0.05


def test_what_a_low_pass_takes_away_is_what_the_score_counts() -> None:
    picture = noise(64, 64)
    blurred, detail = filtered(picture, 0.0, 0.15), filtered(picture, 0.25, 2.0)
    scores = [frequency.high(frequency.profile(x, log=False), (64, 64)) for x in (blurred, picture, detail)]
    assert scores[0] == pytest.approx(0, abs=1e-9)
    assert scores[0] < scores[1]
    assert frequency.profile(detail, log=False)[: frequency.first_high((64, 64))].max() < 1e-9 < scores[2]


def test_a_blurred_picture_has_less_detail_by_the_logarithm_too() -> None:
    pixels = (noise(128, 128, 3) * 40 + 128).clamp(0, 255)
    soft = torch.nn.functional.avg_pool2d(pixels.permute(2, 0, 1), 5, 1, 2).permute(1, 2, 0)
    size = (128, 128)
    sharp, blurred = (frequency.high(frequency.picture_profile(each), size) for each in (pixels, soft))
    assert blurred < sharp - 0.05


def test_the_score_of_latents_does_not_depend_on_their_scale() -> None:
    latents = noise(4, 32, 32)
    assert frequency.latent_score(latents * 14.6) == pytest.approx(frequency.latent_score(latents))


def test_an_empty_picture_has_no_detail() -> None:
    assert not frequency.profile(torch.zeros(16, 16)).any()
    assert frequency.latent_score(torch.zeros(4, 16, 16)) == 0


def test_the_highest_score_comes_first_and_equal_ones_keep_their_order() -> None:
    assert frequency.ordered([0.2, 0.5, 0.2, 0.9]) == [3, 1, 0, 2]


def test_bands_keep_the_mean_and_reach_the_largest_radius() -> None:
    rings = frequency.profile(noise(256, 256))
    edges, values = frequency.bands(rings, (256, 256))
    assert len(edges) == len(values) + 1 <= 65
    assert edges == sorted(edges) and edges[0] == 0 and edges[-1] == 1
    each = -(-len(rings) // 64)
    assert values[0] == pytest.approx(float(rings[:each].mean()))
    assert values[-1] == pytest.approx(float(rings[len(rings) - (len(rings) % each or each) :].mean()))
