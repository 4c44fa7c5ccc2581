"""Attention layers of a UNet: their maps recorded, their processors replaced and put back."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Processor = Callable[..., Any]


def layers(denoiser: nn.Module) -> dict[str, Any]:
    """Every attention layer by its path, in the order of the modules; those of a UNet end in attn1 (self) or attn2."""
    return {path: module for path, module in denoiser.named_modules() if hasattr(module, "set_processor")
            and hasattr(module, "processor")}  # fmt: skip


def is_cross(path: str) -> bool:
    """Whether a UNet's layer reads the text."""
    return path.endswith("attn2")


@contextmanager
def processors(denoiser: nn.Module, chosen: Mapping[str, Processor]) -> Generator[None]:
    """Let attention layers work by other processors for the length of a `with` block; the old ones come back.

    Args:
        denoiser: Of the model.
        chosen: By path, as `layers` names them.
    """
    known = layers(denoiser)
    before = {path: known[path].processor for path in chosen}
    try:
        for path, processor in chosen.items():
            known[path].processor = processor
        yield
    finally:
        for path, processor in before.items():
            known[path].processor = processor


def heads(attn: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - diffusers' Attention
    """Split channels into heads: `(batch, tokens, channels)` to `(batch, heads, tokens, channels / heads)`."""
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def queries(attn: Any, hidden: Tensor) -> Tensor:  # noqa: ANN401
    """Queries of image tokens, `(batch, heads, tokens, width)`."""
    q = heads(attn, attn.to_q(hidden))
    return q if attn.norm_q is None else attn.norm_q(q)


def keys_values(attn: Any, text: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Keys and values of whatever is attended to, each `(batch, heads, tokens, width)`."""
    k = heads(attn, attn.to_k(text))
    return (k if attn.norm_k is None else attn.norm_k(k)), heads(attn, attn.to_v(text))


def outcome(attn: Any, attended: Tensor) -> Tensor:  # noqa: ANN401
    """Join the heads and project: `(batch, heads, tokens, width)` to `(batch, tokens, channels)`."""
    return attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))


def probabilities(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax over the keys of q k / sqrt(width), in float32: `(batch, heads, queries, keys)`."""
    scores = (q.float() @ k.float().mT) * q.shape[-1] ** -0.5
    return (scores if bias is None else scores + bias).softmax(-1)


@dataclass
class Maps:
    """Attention maps of chosen layers, averaged over heads, by the path of the layer.

    Keyed by path and not counted, so that a layer that is run twice (gradient checkpointing) is counted once.

    Args:
        tokens: Only layers with as many image tokens are recorded.
        on: Whether layers are recorded at the moment.
        cross: `(batch, tokens, words)` of each layer that reads the text.
        own: `(batch, tokens, tokens)` of each self-attention layer.
    """

    tokens: int
    on: bool = True
    cross: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    own: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def clear(self) -> None:
        self.cross.clear()
        self.own.clear()

    def mean(self, own: bool = False) -> Tensor:
        """Average over the layers."""
        found = self.own if own else self.cross
        return torch.stack(list(found.values())).mean(0)


class Attending:
    """A processor that works by a function of the layer, the image tokens and the text (None in self-attention).

    diffusers looks for arguments of these names.
    """

    def __init__(self, work: Callable[[Any, Tensor, Tensor | None], Tensor]) -> None:
        self._work = work

    def __call__(
        self,
        attn: Any,  # noqa: ANN401
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        return self._work(attn, hidden_states, encoder_hidden_states)


class Recording(Attending):
    """A UNet's attention, plain in what it gives; keeps the map of its layer in `maps` while these are on."""

    def __init__(self, maps: Maps, path: str) -> None:
        super().__init__(self._attend)
        self._maps, self._path = maps, path

    def _attend(self, attn: Any, hidden: Tensor, text: Tensor | None) -> Tensor:  # noqa: ANN401
        q = queries(attn, hidden)
        k, v = keys_values(attn, hidden if text is None else text)
        if not self._maps.on or q.shape[2] != self._maps.tokens:
            return outcome(attn, F.scaled_dot_product_attention(q, k, v))
        shares = probabilities(q, k)
        kept = self._maps.own if text is None else self._maps.cross
        kept[self._path] = shares.mean(1)
        return outcome(attn, shares.to(v) @ v)


@contextmanager
def recorded(denoiser: nn.Module, grid: tuple[int, int], own: bool = False) -> Generator[Maps]:
    """Record the cross-attention maps (and the self-attention maps if `own`) of the layers on one grid.

    Args:
        denoiser: A UNet.
        grid: (height, width) of the maps.
        own: Record self-attention too.
    """
    maps = Maps(grid[0] * grid[1])
    chosen = {path: Recording(maps, path) for path in layers(denoiser) if is_cross(path) or own}
    with processors(denoiser, chosen):
        yield maps
