"""The effect of an adapter by spatial frequency, held against waves whose frequency is known, and a real tiny model."""

from __future__ import annotations

import json
from math import pi
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import attention, lora, peft, write
from fakes import Tiny
from intarsia.app.settings import Home
from intarsia.app.studio import Studio
from intarsia.pipelines.adapter_file import read_adapter
from intarsia.pipelines.attach import Attachment
from intarsia.pipelines.effect import CUT, NYQUIST, compare, low_share, measure_effect, power_by_band
from intarsia.pipelines.errors import AdapterError, Cancelled
from intarsia.pipelines.events import Artifact, CancelToken, Done, Event, Failed, Progress
from intarsia.pipelines.models import Model, Resident
from intarsia.pipelines.requests import AdapterUse, EffectRequest
from intarsia.pipelines.sources import unet_shapes
from PIL import Image

BANDS = 10


def wave(cycles: tuple[int, int], height: int = 48, width: int = 64) -> torch.Tensor:
    """A wave with so many cycles down and across, `(1, 3, height, width)`; its power is a half."""
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    return torch.cos(2 * pi * (cycles[0] * y + cycles[1] * x) + 0.3).expand(1, 3, height, width)


@pytest.mark.parametrize("cycles", [(0, 2), (3, 0), (5, 7), (17, 3), (0, 31), (20, 24)])
def test_a_wave_lands_in_the_band_of_its_frequency(cycles: tuple[int, int]) -> None:
    radius = ((cycles[0] / 48) ** 2 + (cycles[1] / 64) ** 2) ** 0.5
    power = power_by_band(wave(cycles), BANDS)
    expected = min(int(radius / NYQUIST * BANDS), BANDS - 1)
    assert float(power[expected]) == pytest.approx(0.5, rel=1e-5)
    assert float(power.sum()) == pytest.approx(0.5, rel=1e-5)
    assert low_share(wave(cycles)) == pytest.approx(1.0 if radius < CUT else 0.0, abs=1e-6)


def test_a_constant_lies_in_the_lowest_band() -> None:
    power = power_by_band(torch.full((2, 3, 32, 32), 0.25), BANDS)
    assert float(power[0]) == pytest.approx(0.0625)
    assert float(power[1:].sum()) == pytest.approx(0.0, abs=1e-15)
    assert low_share(torch.zeros(1, 3, 8, 8)) == 0.0


def test_the_bands_of_anything_add_up_to_its_mean_square() -> None:
    draw = torch.Generator().manual_seed(1)
    for shape in ((1, 1, 7, 9), (2, 3, 32, 48), (3, 3, 64, 64)):
        pictures = torch.rand(shape, generator=draw)
        for bands in (1, 2, 16):
            total = float(power_by_band(pictures, bands).sum())
            assert total == pytest.approx(float(pictures.double().square().mean()), rel=1e-9)


def test_white_noise_has_power_by_the_area_of_each_band() -> None:
    noise = torch.randn(40, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    rows = torch.fft.fftfreq(64).double()
    radius = (rows[:, None] ** 2 + rows[None] ** 2).sqrt()
    index = (radius / NYQUIST * BANDS).long().clamp(max=BANDS - 1)
    area = torch.bincount(index.flatten(), minlength=BANDS) / 64**2
    assert torch.allclose(power_by_band(noise, BANDS), area.double(), rtol=0.1)


def test_only_what_differs_counts_as_the_effect() -> None:
    base = wave((0, 2)) * 0.1 + 0.5
    found = compare(base, base + 0.2 * wave((16, 20)), BANDS)
    assert found.low == pytest.approx(0.0, abs=1e-6) and found.base_low == pytest.approx(1.0, abs=1e-6)
    assert sum(found.change) == pytest.approx(0.02, rel=1e-4)
    assert sum(found.base) == pytest.approx(0.005, rel=1e-4)  # the mean of 0.5 is left out
    assert len(found.edges) == BANDS + 1 and (found.edges[0], found.edges[-1]) == (0.0, 0.5)
    mixed = compare(base, base + 0.2 * wave((16, 20)) + 0.1 * wave((1, 0)), BANDS)
    assert mixed.low == pytest.approx(0.2, rel=1e-4)


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Model:
    return Resident().get(str(tiny("sdxl")), "cpu", offload=None)


def adapter(model: Model, folder: Path, scale: float) -> Path:
    shapes = {p.removesuffix(".weight"): s for p, s in attention(unet_shapes(model.source)).items()}
    return write(folder / f"by-{scale:g}.safetensors", lora(shapes, peft, rank=2, scale=scale))


def events(model: Model, path: Path, folder: Path, token: CancelToken | None = None, **asked: object) -> list[Event]:
    use = AdapterUse(adapter="a")
    request = EffectRequest.parse({"adapter": use, "count": 2, "steps": 2, "seed": 5, **asked})
    attachment = Attachment("a", read_adapter(path, unet_shapes(model.source)))
    return list(measure_effect(request, model, attachment, folder, token or CancelToken()))


def test_an_adapter_that_does_nothing_has_no_effect_and_another_has(model: Model, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in model.denoiser.state_dict().items()}
    found: dict[float, dict[str, Any]] = {}
    for scale in (0.0, 3.0):
        told = events(model, adapter(model, tmp_path, scale), tmp_path, bands=8)
        (made,) = [event for event in told if isinstance(event, Artifact)]
        found[scale] = json.loads(Path(made.path).read_text())
        assert [event.step for event in told if isinstance(event, Progress)] == [1, 2, 3, 4]
    assert found[0.0]["change"] == [0.0] * 8
    assert sum(found[3.0]["change"]) > 0
    assert found[0.0]["base"] == found[3.0]["base"]
    without, with_it, seed = found[3.0]["pairs"][1]
    assert seed == 6
    assert Image.open(without).tobytes() != Image.open(with_it).tobytes()
    after = model.denoiser.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(module._forward_hooks for module in model.denoiser.modules())  # pyright: ignore[reportPrivateUsage]


def test_it_stops_between_steps(model: Model, tmp_path: Path) -> None:
    asked = iter([False] * 3)
    token = CancelToken(lambda: next(asked, True))
    with pytest.raises(Cancelled):
        events(model, adapter(model, tmp_path, 1.0), tmp_path, token)
    assert not (tmp_path / "effect.json").exists()


def test_a_job_measures_the_effect_and_says_what_it_used(tiny: Tiny, model: Model, home: Home, tmp_path: Path) -> None:
    with Studio(home) as studio:
        entry = studio.import_adapter(adapter(model, tmp_path, 1.0), "moss")
        request = EffectRequest(adapter=AdapterUse(adapter="moss"), model=str(tiny("sdxl")), count=1, steps=1)
        *_, last = studio.run(request)
        assert isinstance(last, Done)
        (job,) = studio.jobs(kind="effect")
        assert isinstance(job.request, EffectRequest) and job.request.adapter.sha256 == entry.sha256
        assert (job.folder / "effect.json").is_file()
        with pytest.raises(AdapterError, match="no adapter"):
            studio.submit(EffectRequest(adapter=AdapterUse(adapter="gone"), model="mini"))
        *_, failed = studio.run(request.model_copy(update={"model": "mini"}))  # other widths
        assert isinstance(failed, Failed) and "moss" in failed.message
