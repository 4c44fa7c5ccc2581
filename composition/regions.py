"""Places in a UNet: adapters that act on their own tokens, prompts that are read there, places that ignore each other.

Masks are `(concepts, cells)` on the grid of a layer; what they leave over is the background.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..pipelines.attach import Branches
from ..pipelines.hooks import Step
from ..pipelines.site import Gain
from .attention import Attending, Processor, is_cross, keys_values, layers, outcome, queries
from .composition import Composition
from .masks import grid_of, places, resized, seen, soften
from .tokens import positions

if TYPE_CHECKING:
    from .freefuse import Routes

NEVER = -1e4  # added to the logit of what must not be looked at; finite in 16 bits too


@dataclass
class Shares:
    """Each concept's share of every cell, on the grid of any layer.

    Args:
        names: Of the concepts.
        masks: `(concepts, height, width)` on the canvas' own grid; their sum is nowhere above 1.
    """

    names: tuple[str, ...]
    masks: Tensor
    _known: dict[tuple[int, ...], Tensor] = field(default_factory=dict[tuple[int, ...], Tensor])

    @classmethod
    def of(cls, composition: Composition, edge: float) -> Shares:
        """From the boxes and masks of a composition, the higher before the lower, edges blurred by `edge` cells."""
        masks = places(composition.concepts, composition.grid)
        masks = soften(seen(masks, [concept.order for concept in composition.concepts]), edge)
        return cls(composition.names, masks.to(composition.model.device))

    def by_name(self) -> Mapping[str, Tensor]:
        return dict(zip(self.names, self.masks, strict=True))

    def on(self, size: tuple[int, int]) -> Tensor:
        """On a grid: `(concepts, height, width)`."""
        if size not in self._known:
            self._known[size] = resized(self.masks, size)
        return self._known[size]

    def tokens(self, count: int) -> Tensor:
        """On the grid that has so many tokens: `(concepts, tokens)`."""
        return self.on(grid_of(count, (self.masks.shape[1], self.masks.shape[2]))).flatten(1)


class Regions:
    """A hook and the processors of a UNet's attention layers.

    Args:
        hung: The adapters: the concepts', and styles, which act everywhere.
        shares: Of the concepts.
        texts: What is read by the background and in the place of each concept: `(halves, places, words, width)`.
        leaning: Added to the scores of the words there: `(places, halves, words)`.
        apart: 1 keeps tokens from looking at other places at all, 0 leaves them free.
        until: Part of the steps after which they are free.
    """

    def __init__(
        self, hung: Branches, shares: Shares, texts: Tensor, leaning: Tensor, apart: float, until: float
    ) -> None:
        self._hung, self._shares, self._texts = hung, shares, texts
        self._leaning = leaning.to(texts.device)
        self._apart, self._until = apart, until
        self._free = apart == 0
        self._read: dict[tuple[str, frozenset[str]], tuple[Tensor, Tensor]] = {}
        self._blends: dict[int, Tensor] = {}
        self._biases: dict[int, Tensor] = {}

    def before(self, step: Step) -> Tensor:
        self._free = self._apart == 0 or step.index >= self._until * step.total
        return step.latents

    def after(self, step: Step) -> Tensor:
        return step.latents

    def gains(self, path: str, output: Tensor) -> Mapping[str, Gain]:
        """How strongly each adapter acts in a layer: everywhere for styles, in its place for a concept."""
        names = self._shares.names
        found: dict[str, Gain] = dict.fromkeys(self._hung.names, 1.0)
        if path.endswith(("attn2.to_k", "attn2.to_v")):  # made of the words of all texts, one after another
            own = torch.eye(len(names) + 1, device=output.device)[1:].repeat(1, len(output) // (len(names) + 1))
            return found | {name: row[:, None, None] for name, row in zip(names, own, strict=True)}
        if output.ndim == 4:
            masks = self._shares.on((output.shape[2], output.shape[3]))
            return found | dict(zip(names, masks, strict=True))
        if output.ndim == 2:  # of the clock: no place of its own
            return found | {name: float(mask.mean()) for name, mask in zip(names, self._shares.masks, strict=True)}
        return found | dict(zip(names, self._shares.tokens(output.shape[1])[..., None], strict=True))

    def processors(self, denoiser: nn.Module) -> dict[str, Processor]:
        """One for each attention layer."""
        return {path: Attending(self._reading(path) if is_cross(path) else self._look) for path in layers(denoiser)}

    def _reading(self, path: str) -> Callable[[Any, Tensor, Tensor | None], Tensor]:
        """Cross-attention: each token reads its own prompt."""
        return lambda attn, hidden, text: outcome(attn, self.read(attn, path, queries(attn, hidden)))

    def _look(self, attn: Any, hidden: Tensor, text: Tensor | None) -> Tensor:  # noqa: ANN401
        """Self-attention: tokens of one place do not look at those of another."""
        q, (k, v) = queries(attn, hidden), keys_values(attn, hidden)
        return outcome(attn, F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(q)))

    def read(self, attn: Any, path: str, q: Tensor) -> Tensor:  # noqa: ANN401
        """Let every token read the prompt of its place: `(halves, heads, tokens, width)`."""
        halves, count = len(q), self._texts.shape[1]
        key = (path, self._hung.active)
        if key not in self._read:  # the words stay the same from step to step
            self._read[key] = keys_values(attn, self._texts.to(q).flatten(0, 1))
        k, v = (part.unflatten(0, (halves, count)) for part in self._read[key])
        if q.shape[2] not in self._blends:
            masks = self._shares.tokens(q.shape[2])
            self._blends[q.shape[2]] = torch.cat([1 - masks.sum(0, keepdim=True), masks]).clamp(min=0)
        blend = self._blends[q.shape[2]].to(q)  # (texts, tokens)
        result = torch.zeros_like(q)
        for text in range(count):
            here = blend[text].nonzero()[:, 0]
            if len(here):
                bias = self._leaning[text, -halves:, None, None].to(q)  # the same for all heads and queries
                part = F.scaled_dot_product_attention(q[:, :, here], k[:, text], v[:, text], attn_mask=bias)
                result = result.index_add(2, here, part * blend[text, here, None])
        return result

    def bias(self, q: Tensor) -> Tensor | None:
        """What keeps places apart: added to the logits of `(tokens, tokens)`."""
        if self._free:
            return None
        count = q.shape[2]
        if count not in self._biases:
            self._biases[count] = keeping_apart(self._shares.tokens(count), self._apart)
        return self._biases[count].to(q)


def keeping_apart(masks: Tensor, apart: float) -> Tensor:
    """What is added to the logits of self-attention so that places do not look at each other.

    A key counts 1 - apart * o, where o is how much of the key's place is not the query's own: sum over places i and
    j != i of m_i(query) m_j(key). The background looks at all, and all look at it.

    Args:
        masks: `(places, tokens)`.
        apart: From 0 to 1.

    Returns:
        `(tokens, tokens)`, rows for queries.
    """
    other = masks.T @ (masks.sum(0)[None] - masks)
    return torch.log((1 - apart * other).clamp(min=0)).clamp(min=NEVER)


class Apart:
    """A hook, and what is added to the logits of a transformer's joint attention.

    Args:
        shares: Of the concepts.
        routes: Which words belong to whom.
        towards: Added between a place and its own words.
        apart: 1 keeps tokens from looking at other places at all, 0 leaves them free.
        until: Part of the steps after which they are free.
    """

    def __init__(self, shares: Shares, routes: Routes, towards: float, apart: float, until: float) -> None:
        words = routes.joint_bias(towards, -NEVER)
        tokens = shares.masks[0].numel()
        kept = words.clone()
        kept[..., -tokens:, -tokens:] += keeping_apart(shares.masks.flatten(1), apart).to(kept)
        self._words, self._kept = words, kept
        self._until, self._now = until if apart else 0.0, kept

    def before(self, step: Step) -> Tensor:
        self._now = self._kept if step.index < self._until * step.total else self._words
        return step.latents

    def after(self, step: Step) -> Tensor:
        return step.latents

    def bias(self, path: str) -> Tensor:
        """Of any layer."""
        return self._now


def readings(
    composition: Composition, texts: Sequence[Sequence[Tensor]], whole: bool, towards: float
) -> tuple[Tensor, Tensor]:
    """Put what each place reads side by side, and say how it leans to its words.

    Args:
        composition: With the phrases.
        texts: For the background and each concept, one or two texts `(halves, words, width)`.
        whole: The first text of each concept is the whole prompt, in which it does not read the others' words.
        towards: Added for a concept's own words in the whole prompt.

    Returns:
        Texts `(halves, places, words, width)` and the leaning `(places, halves, words)`, which hides words by a large
        number; the half without the prompt has no words to lean to or to hide.
    """
    joined = [torch.cat(list(parts), 1) for parts in texts]
    most = max(text.shape[1] for text in joined)
    padded = [F.pad(text, (0, 0, 0, most - text.shape[1])) for text in joined]
    leaning = torch.full((len(texts), len(joined[0]), most), NEVER)
    spans = [span(composition, concept.phrase) for concept in composition.concepts]
    for place, text in enumerate(joined):
        leaning[place, :, : text.shape[1]] = 0
        if place and not whole:
            continue
        if place:
            leaning[place, -1, spans[place - 1]] = towards
        leaning[place, -1, [at for index, words in enumerate(spans) if index + 1 != place for at in words]] = NEVER
    return torch.stack(padded, 1), leaning


def span(composition: Composition, phrase: str) -> list[int]:
    """Positions of a phrase in the whole prompt; none where it does not occur."""
    if not phrase or phrase.casefold() not in composition.prompt.casefold():
        return []
    return positions(composition.model, composition.prompt, phrase)
