"""Find the adapters that a prompt asks for, by the model's own reading of their words.

The idea is that of AutoLoRA (arXiv:2508.02107), whose retriever reads the adapters' weights with an encoder that is
trained on a hundred adapters and more. A library of tens has nothing to train that on, and an untrained encoding says
nothing of words: here the adapters' texts are read, which is ours. Rows are normalised one by one (the release divides
by one norm of them all), so that no adapter is found for its size. Mini's states tell words apart better as means
over the tokens than pooled, and phrase by phrase better than as a whole: phrases are asked too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..pipelines.events import CancelToken
from ..pipelines.models import Model

BREAKS = re.compile(r"[,;]|\band\b", re.IGNORECASE)


@dataclass(frozen=True)
class Candidate:
    """An adapter that may be found, and what is known of it in words."""

    name: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """An adapter, and how near the nearest of its texts is to a phrase: a cosine, from -1 to 1."""

    name: str
    nearness: float
    text: str


def phrases(prompt: str) -> tuple[str, ...]:
    """A prompt as a whole, and what stands between its commas and its "and"s."""
    parts = [part.strip() for part in BREAKS.split(prompt)]
    return tuple(dict.fromkeys([prompt.strip(), *(part for part in parts if part)]))


def embedded(model: Model, texts: Sequence[str], token: CancelToken) -> Tensor:
    """Read texts with the model's encoders: the mean of the hidden states over the tokens.

    Returns:
        `(texts, width)`, float32, on the CPU.

    Raises:
        Cancelled: A stop was asked for.
    """
    rows: list[Tensor] = []
    for text in texts:
        token.check()
        with torch.no_grad():
            found = model.engine.encode(text, "", 1.0).embeddings
        rows.append(found["prompt_embeds"][0].float().mean(0).cpu())
    return torch.stack(rows)


def nearness(queries: Tensor, rows: Tensor) -> Tensor:
    """Cosine of each row `(rows, width)` with the nearest of some queries `(queries, width)`; 0 for zeros."""
    return (F.normalize(rows, dim=-1) @ F.normalize(queries, dim=-1).T).amax(1)


def ranked(queries: Tensor, rows: Tensor, owners: Sequence[Candidate], count: int) -> tuple[Found, ...]:
    """Give the nearest adapters, best first.

    Args:
        queries: `(phrases, width)`, of the prompt.
        rows: `(texts, width)`, of all texts of all candidates in their order.
        owners: The candidates.
        count: The most to give.
    """
    texts = [(owner.name, text) for owner in owners for text in owner.texts]
    best: dict[str, Found] = {}
    for (name, text), value in zip(texts, nearness(queries, rows).tolist(), strict=True):
        if name not in best or value > best[name].nearness:
            best[name] = Found(name, value, text)
    return tuple(sorted(best.values(), key=lambda found: -found.nearness)[:count])


def retrieve(
    model: Model, prompt: str, candidates: Sequence[Candidate], count: int, token: CancelToken
) -> tuple[Found, ...]:
    """Find the adapters whose words are nearest to a prompt; those without words are never found.

    Raises:
        Cancelled: A stop was asked for.
    """
    texts = [text for candidate in candidates for text in candidate.texts]
    if not texts:
        return ()
    asked = phrases(prompt)
    rows = embedded(model, [*asked, *texts], token)
    return ranked(rows[: len(asked)], rows[len(asked) :], candidates, count)
