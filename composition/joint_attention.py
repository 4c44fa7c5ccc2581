"""Joint attention of transformers (FLUX, SD3): a bias between text and image, and what chosen layers saw.

All here is in the order text, image, whatever the model's own: FLUX joins them so, SD3 the other way round, and where
the tokens of both attend to all, their order changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from diffusers.models import embeddings
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Processor, heads, keys_values, layers, processors, queries

Bias = Callable[[str], Tensor | None]
rotated: Callable[..., Tensor] = cast(Any, embeddings).apply_rotary_emb  # its annotations are too narrow


@dataclass
class Seen:
    """What chosen layers saw in their last run, by the path of the layer.

    Args:
        on: Whether it is kept at the moment.
        queries: Of the image tokens, `(batch, heads, image, width)`, after norm and rotation, as those below.
        keys: Of the text tokens, `(batch, heads, text, width)`.
        outputs: What the image tokens got, heads joined and before the projection: `(batch, image, channels)`.
    """

    on: bool = True
    queries: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    keys: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    outputs: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def keep(self, path: str, text: int, q: Tensor, k: Tensor, attended: Tensor) -> None:
        self.queries[path], self.keys[path] = q[:, :, text:], k[:, :, :text]
        self.outputs[path] = attended[:, text:]


class Joint:
    """Attention over text and image tokens, plain in what it gives unless there is a bias.

    Args:
        path: Of its layer.
        bias: Added to the scores; see `joined`.
        seen: Keeps what the layer sees, if it is a chosen one.
    """

    def __init__(self, path: str, bias: Bias, seen: Seen | None = None) -> None:
        self._path, self._bias, self._seen = path, bias, seen

    def __call__(
        self,
        attn: Any,  # noqa: ANN401 - diffusers' Attention, or FLUX's own
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        text = encoder_hidden_states
        q, (k, v) = queries(attn, hidden_states), keys_values(attn, hidden_states)
        if text is not None:
            of_text = _text_parts(attn, text)
            q, k, v = (torch.cat([first, then], 2) for first, then in zip(of_text, (q, k, v), strict=True))
        if image_rotary_emb is not None:
            q = rotated(q, image_rotary_emb, sequence_dim=2)
            k = rotated(k, image_rotary_emb, sequence_dim=2)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=_fitting(self._bias(self._path), q))
        attended = attended.transpose(1, 2).flatten(2)  # (batch, tokens, channels)
        if text is None:
            return attended if attn.pre_only else _projected(attn, attended)
        count = text.shape[1]
        if self._seen is not None and self._seen.on:
            self._seen.keep(self._path, count, q, k, attended)
        answer = attended[:, :count]
        if attn.context_pre_only is not True:  # else the last layer, whose text goes nowhere
            answer = attn.to_add_out(answer)
        return _projected(attn, attended[:, count:]), answer


def _text_parts(attn: Any, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
    """Queries, keys and values of the text tokens, each `(batch, heads, text, width)`."""
    q, k = heads(attn, attn.add_q_proj(text)), heads(attn, attn.add_k_proj(text))
    q = q if attn.norm_added_q is None else attn.norm_added_q(q)
    k = k if attn.norm_added_k is None else attn.norm_added_k(k)
    return q, k, heads(attn, attn.add_v_proj(text))


def _fitting(bias: Tensor | None, q: Tensor) -> Tensor | None:
    """The part of a bias for the tokens at hand: all of them, or the image's alone (a layer without text)."""
    return None if bias is None else bias[..., -q.shape[2] :, -q.shape[2] :].to(q)


def _projected(attn: Any, attended: Tensor) -> Tensor:  # noqa: ANN401
    return attn.to_out[1](attn.to_out[0](attended))


def nothing(path: str) -> None:
    """No bias, for any layer."""


def joint_layers(denoiser: nn.Module) -> Mapping[str, Any]:
    """The layers of a transformer that read text tokens apart from image tokens, by path and in their order.

    FLUX's single blocks, and the second attention that some of SD3's blocks have, are not among them.
    """
    return {path: layer for path, layer in layers(denoiser).items() if layer.added_kv_proj_dim is not None}


@contextmanager
def joined(denoiser: nn.Module, bias: Bias = nothing, keep: Collection[str] = ()) -> Generator[Seen]:
    """Let a bias act between the tokens of a transformer, and keep what some layers see.

    Args:
        denoiser: A transformer of FLUX or SD3.
        bias: Asked at each layer, given its path: `(batch or 1, heads or 1, tokens, tokens)` with rows for who asks and
            columns for who answers, text tokens before image tokens; -inf forbids. None leaves the layer as it is.
        keep: Paths of `joint_layers`.
    """
    seen = Seen()
    chosen: dict[str, Processor] = {
        path: Joint(path, bias, seen if path in keep else None) for path in layers(denoiser)
    }
    with processors(denoiser, chosen):
        yield seen
