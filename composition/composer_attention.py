"""LoRA-Composer's attention: in its place a concept's own text is read through its own adapter; places are isolated."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..pipelines.attach import Branches
from ..pipelines.site import Gain
from .attention import Attending, Processor, is_cross, keys_values, layers, outcome, probabilities, queries
from .composition import Concept
from .gradients import Glance
from .masks import grid_of, places

OWN = (".attn1.", ".ff.")  # layers where a concept's adapter acts in its place, if all its layers are wanted


@dataclass(frozen=True)
class Plot:
    """A concept and its text.

    Args:
        concept: With a place.
        text: Its own prompt as its own adapter reads it: without and with it, `(1 or 2, tokens, width)`.
        words: Positions of the concept's words in it.
    """

    concept: Concept
    text: Tensor
    words: tuple[int, ...]


@dataclass(frozen=True)
class Parts:
    """Which parts of the method work: region attention, isolation, and deltas in self-attention and feed-forward."""

    regions: bool = True
    isolation: bool = True
    deltas: bool = False


class Estate:
    """The places of a picture, and how each layer works in them.

    Args:
        hung: The adapters; from now on they act by place.
        plots: The concepts that have one.
        styles: Adapters that act everywhere.
        canvas: (height, width) of the latents.
        glance: Where maps are kept while it is on.
        parts: What works.
    """

    def __init__(
        self,
        hung: Branches,
        plots: Sequence[Plot],
        styles: Sequence[str],
        canvas: tuple[int, int],
        glance: Glance,
        parts: Parts,
    ) -> None:
        self.plots, self.glance, self.parts = tuple(plots), glance, parts
        self._hung, self._styles, self._canvas = hung, tuple(styles), canvas
        self._inside = ""  # the concept whose keys, values or outcome are being made
        self._cells: dict[int, Tensor] = {}
        self._bias: dict[int, Tensor] = {}
        self._read: dict[tuple[str, str, frozenset[str]], tuple[Tensor, Tensor]] = {}
        hung.spread(self._gains)

    def processors(self, denoiser: nn.Module) -> dict[str, Processor]:
        """What the attention layers work by, by path."""
        return {
            path: Attending((self._reading if is_cross(path) else self._looking)(path)) for path in layers(denoiser)
        }

    def _reading(self, path: str) -> Callable[[Any, Tensor, Tensor | None], Tensor]:
        """Cross-attention by place."""

        def read(attn: Any, hidden: Tensor, text: Tensor | None) -> Tensor:  # noqa: ANN401
            assert text is not None
            q = queries(attn, hidden)
            whole = outcome(attn, F.scaled_dot_product_attention(q, *keys_values(attn, text)))
            self.note(attn, path, q)
            self.glance.check()
            return self.replaced(attn, path, q, whole)

        return read

    def _looking(self, path: str) -> Callable[[Any, Tensor, Tensor | None], Tensor]:
        """Self-attention in which places do not see each other."""

        def look(attn: Any, hidden: Tensor, text: Tensor | None) -> Tensor:  # noqa: ANN401
            q, (k, v) = queries(attn, hidden), keys_values(attn, hidden)
            bias = self.bias(q)
            if not self.glance.on or q.shape[2] != self.glance.tokens:
                return outcome(attn, F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
            shares = probabilities(q, k, bias)
            self.glance.own[path] = shares.mean(1)
            return outcome(attn, shares.to(v) @ v)

        return look

    def cells(self, tokens: int) -> Tensor:
        """Which cells of a layer each place covers by half or more, one at least: `(concepts, tokens)`."""
        if tokens not in self._cells:
            concepts = [plot.concept for plot in self.plots]
            covers = places(concepts, grid_of(tokens, self._canvas)).flatten(1)
            most = covers.amax(1, keepdim=True)
            device = self.plots[0].text.device
            self._cells[tokens] = (covers >= most.clamp(max=0.5)).to(device) & (most > 0).to(device)
        return self._cells[tokens]

    def masks(self) -> Mapping[str, Tensor]:
        """The places on the grid of the latents, by name."""
        if not self.plots:
            return {}
        cells = self.cells(self._canvas[0] * self._canvas[1]).float().unflatten(1, self._canvas)
        return {plot.concept.name: mask for plot, mask in zip(self.plots, cells, strict=True)}

    def bias(self, like: Tensor) -> Tensor | None:
        """Keeps a place's queries from the keys of other places; shared cells and the background may be seen.

        Args:
            like: Queries, `(batch, heads, tokens, width)`.

        Returns:
            `(tokens, tokens)`, 0 or minus infinity.
        """
        if not self.plots or not self.parts.isolation:
            return None
        tokens = like.shape[2]
        if tokens not in self._bias:
            cells = self.cells(tokens).T.float()  # (tokens, concepts)
            placed = cells.amax(1) > 0
            apart = placed[:, None] & placed[None] & (cells @ cells.T == 0)
            self._bias[tokens] = torch.zeros(tokens, tokens, device=like.device).masked_fill(apart, float("-inf"))
        return self._bias[tokens].to(like.dtype)

    def replaced(self, attn: Any, path: str, q: Tensor, whole: Tensor) -> Tensor:  # noqa: ANN401
        """Put what each concept reads in the place of what the prompt of the whole gives; shared cells are averaged.

        Args:
            attn: The layer.
            path: Its own.
            q: Queries of the base, `(batch, heads, tokens, width)`.
            whole: `(batch, tokens, channels)`.
        """
        if not self.plots or not self.parts.regions:
            return whole
        cells = self.cells(q.shape[2])
        found = torch.zeros_like(whole)
        for plot, mine in zip(self.plots, cells, strict=True):
            at = mine.nonzero()[:, 0]
            k, v = (part[-len(q) :] for part in self.keys_values(attn, path, plot))
            attended = F.scaled_dot_product_attention(q[:, :, at], k, v)
            with self._within(plot):
                found = found.index_add(1, at, outcome(attn, attended))
        count = cells.sum(0)[:, None]  # (tokens, 1)
        return torch.where(count > 0, found / count.clamp(min=1), whole)

    def note(self, attn: Any, path: str, q: Tensor) -> None:  # noqa: ANN401
        """Keep every concept's map of a layer of the wanted grid: `(concepts, tokens, words)`; inside its place and
        outside, for the losses look at the one and the new start at the other."""
        if not self.glance.on or q.shape[2] != self.glance.tokens:
            return
        keys = [self.keys_values(attn, path, plot)[0][-1:] for plot in self.plots]
        self.glance.cross[path] = torch.stack([probabilities(q[-1:], k).mean(1)[0] for k in keys])

    def keys_values(self, attn: Any, path: str, plot: Plot) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """Keys and values of a concept's text, made once for a picture (once more when adapters come or go)."""
        key = path, plot.concept.name, self._hung.active
        if key not in self._read:
            with torch.no_grad(), self._within(plot):
                self._read[key] = keys_values(attn, plot.text)
        return self._read[key]

    @contextmanager
    def _within(self, plot: Plot) -> Generator[None]:
        self._inside = plot.concept.name
        try:
            yield
        finally:
            self._inside = ""

    def _gains(self, path: str, output: Tensor) -> Mapping[str, Gain]:
        acting: dict[str, Gain] = dict.fromkeys(self._styles, 1.0)
        if self._inside:
            acting[self._inside] = 1.0
        elif self.plots and self.parts.deltas and any(part in path for part in OWN):
            cells = self.cells(output.shape[1]).to(output)
            parts = (cells / cells.sum(0).clamp(min=1))[..., None]  # (concepts, tokens, 1)
            acting |= {plot.concept.name: part for plot, part in zip(self.plots, parts, strict=True)}
        return acting
