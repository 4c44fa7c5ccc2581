"""Adapters that act on the tokens of an image that are theirs, and words that are read there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..pipelines.attach import Branches
from ..pipelines.site import Gain
from .attention import Attending, Processor, is_cross, keys_values, layers, outcome, queries
from .regions import Shares

TEXT = re.compile(r"\.(add_[qkv]_proj|to_add_out|ff_context\..*|context_embedder)$")
TEXT_OF_UNET = re.compile(r"\.attn2\.to_[kv]$")


class Routes:
    """Which adapter acts on which token.

    Args:
        hung: The concepts' adapters, and others, which act everywhere.
        shares: The concepts' parts of the picture.
        words: Positions of each concept's words in the text.
        text: As the denoiser reads it, `(halves, text, width)`; the concepts' words are in the last half.
        unet: Whether text and image meet in cross-attention.
    """

    def __init__(
        self, hung: Branches, shares: Shares, words: Sequence[Sequence[int]], text: Tensor, unet: bool
    ) -> None:
        self._hung, self._shares, self._text, self._unet = hung, shares, text, unet
        own = text.new_zeros(len(words), text.shape[1], dtype=torch.float32)
        for row, places in zip(own, words, strict=True):
            row[list(places)] = 1
        self._own = own  # (concepts, text)
        self._others = (own.sum(0, keepdim=True) - own).clamp(max=1) * (1 - own)
        free = torch.ones_like(own)
        halves = [free] * (len(text) - 1) + [1 - self._others]
        self._allowed = torch.stack(halves, 1)[..., None].to(text.dtype)  # (concepts, halves, text, 1)

    def gains(self, path: str, output: Tensor) -> Mapping[str, Gain]:
        """How strongly each adapter acts in a layer: its own image tokens, and all words but those of others."""
        found: dict[str, Gain] = dict.fromkeys(self._hung.names, 1.0)
        return found | dict(zip(self._shares.names, self._places(path, output), strict=True))

    def _places(self, path: str, output: Tensor) -> Sequence[Gain]:
        if output.ndim == 2:  # of the clock: no place of its own
            return [float(mask.mean()) for mask in self._shares.masks]
        if output.ndim == 4:
            return list(self._shares.on((output.shape[2], output.shape[3])).to(output.dtype))
        if (TEXT_OF_UNET if self._unet else TEXT).search(path):
            return list(self._allowed)
        words = self._text.shape[1] if "single_transformer_blocks." in path else 0
        image = self._shares.tokens(output.shape[1] - words)[:, None, :, None].to(output.dtype)
        if not words:
            return list(image)
        return list(torch.cat([self._allowed, image.expand(-1, len(output), -1, -1)], 2))

    def leaning(self, tokens: int, towards: float, against: float) -> Tensor:
        """What is added to the scores between image tokens and words.

        Args:
            tokens: Of the image.
            towards: For a concept's tokens and its own words.
            against: Less this for its tokens and the words of others.

        Returns:
            `(halves, 1, image, text)`; nothing without the prompt.
        """
        lean = self._shares.tokens(tokens).T @ (towards * self._own - against * self._others)
        parts = [torch.zeros_like(lean)] * (len(self._text) - 1) + [lean]
        return torch.stack(parts)[:, None].to(self._text.dtype)

    def joint_bias(self, towards: float, against: float) -> Tensor:
        """The same for joint attention, both ways: `(halves, 1, text + image, text + image)`."""
        lean = self.leaning(self._shares.masks[0].numel(), towards, against)
        text = self._text.shape[1]
        size = text + lean.shape[2]
        bias = lean.new_zeros(len(lean), 1, size, size)
        bias[:, :, text:, :text], bias[:, :, :text, text:] = lean, lean.mT
        return bias

    def processors(self, denoiser: nn.Module, towards: float, against: float) -> dict[str, Processor]:
        """For the cross-attention layers of a UNet."""
        known: dict[int, Tensor] = {}

        def read(attn: Any, hidden: Tensor, text: Tensor | None) -> Tensor:  # noqa: ANN401
            assert text is not None
            q, (k, v) = queries(attn, hidden), keys_values(attn, text)
            tokens = q.shape[2]
            if tokens not in known:
                known[tokens] = self.leaning(tokens, towards, against)
            return outcome(attn, F.scaled_dot_product_attention(q, k, v, attn_mask=known[tokens].to(q)))

        return {path: Attending(read) for path in layers(denoiser) if is_cross(path)}
