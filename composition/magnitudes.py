"""How large the entries of two adapters' changes are, layer by layer, without ever holding a whole change (K-LoRA)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..pipelines.adapter_types import Layer, LowRank
from ..pipelines.attach import Attachment
from ..pipelines.errors import AdapterError
from ..pipelines.events import CancelToken
from ..pipelines.fitted import fitted

ATTENTION = re.compile(r"\.attn\d*\.")
ENTRIES = 2**22  # of a change that are held at once
OUTLIER = 3.0  # times the mean: a layer whose ratio is beyond does not count


@dataclass(frozen=True)
class Magnitudes:
    """What K-LoRA compares.

    Args:
        content: Sum of the k largest entries of the content's change, by the canonical path of the layer; k is the
            product of both ranks.
        style: The same of the style's change; both hold the same paths.
        ratio: gamma: what all entries of the content's change sum up to, as a multiple of the style's.
    """

    content: Mapping[str, float]
    style: Mapping[str, float]
    ratio: float


def is_attention(path: str) -> bool:
    """Whether a layer is a linear of a denoiser's attention."""
    return path.startswith(("unet.", "transformer.")) and ATTENTION.search(path) is not None


def magnitudes(
    components: Mapping[str, nn.Module], content: Attachment, style: Attachment, token: CancelToken
) -> Magnitudes:
    """Measure every attention layer that both adapters change; factors of blocks count, the weights cancel out.

    Raises:
        AdapterError: An adapter does not fit, has no ranks, or they share no attention layer.
        Cancelled: A stop was asked for.
    """
    tops: tuple[dict[str, float], dict[str, float]] = {}, {}
    ratios: list[float] = []
    for module, uses in fitted(components, (content, style)).layers:
        path = uses[0][1]
        if len(uses) < 2 or not is_attention(path):
            continue
        token.check()
        layers = [(attachment.adapter.layers[own], attachment.factor(own)) for attachment, own in uses]
        count = _rank(content, layers[0][0]) * _rank(style, layers[1][0])
        sums: list[float] = []
        for found, (layer, factor) in zip(tops, layers, strict=True):
            top, total = top_and_total(_rows(layer, module.weight), count)
            found[path] = abs(factor) * top
            sums.append(abs(factor) * total)
        if sums[1]:
            ratios.append(sums[0] / sums[1])
    if not tops[0]:
        raise AdapterError(
            f"{content.name} and {style.name} change no attention layer in common.",
            "Choose adapters that were trained on the same layers, or Merge.",
        )
    return Magnitudes(*tops, ratio_of(ratios) if ratios else 1.0)  # a style of nothing but zeros loses at any ratio


def ratio_of(ratios: Sequence[float]) -> float:
    """Mean over the layers, once those above three times the mean of all have been left out."""
    most = OUTLIER * sum(ratios) / len(ratios)
    kept = [ratio for ratio in ratios if ratio <= most]
    return sum(kept) / len(kept)


def top_and_total(rows: Iterator[Tensor], count: int) -> tuple[float, float]:
    """Sum of the `count` largest magnitudes, and of all, of a matrix that comes in groups of rows."""
    top: Tensor | None = None
    total = 0.0
    for group in rows:
        sizes = group.abs().flatten()
        total += float(sizes.double().sum())
        sizes = sizes if top is None else torch.cat([top, sizes])
        top = sizes.topk(min(count, sizes.numel())).values
    assert top is not None
    return float(top.double().sum()), total


def _rank(attachment: Attachment, layer: Layer) -> int:
    if layer.rank < 1:
        raise AdapterError(
            f"{attachment.name} has no ranks, by which K-LoRA counts.", "Extract a LoRA from it first, or use Merge."
        )
    return layer.rank


def _rows(layer: Layer, weight: Tensor) -> Iterator[Tensor]:
    """The change of a layer, some rows at a time; of low-rank factors no more than these rows exist at once."""
    with torch.no_grad():
        if not isinstance(layer, LowRank):
            change = layer.change(weight.detach()).weight
            assert change is not None  # it has ranks, so it changes the weight
            yield change
            return
        down, up = layer.down.to(weight.device, torch.float32), layer.up.to(weight.device, torch.float32)
        for part in up.flatten(1).split(max(1, ENTRIES // down[0].numel())):
            yield layer.scale * (part @ down.flatten(1))
