"""Prompts and the limits of the encoders that read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .families import Family

T5_LIMITS = {"sd3": 256, "flux1": 512}  # tokens, as the plain pipelines set them; CLIP's limit is its tokenizer's own


def words_left_out(family: Family, components: Mapping[str, Any], text: str) -> int:
    """Count the words at a prompt's end that no encoder reads.

    Args:
        family: Of the model.
        components: Of the model.
        text: The prompt.
    """
    counts = [
        _beyond(components[name], text, T5_LIMITS.get(family.name) if name == family.tokenizers[-1] else None)
        for name in family.tokenizers
        if components.get(name) is not None
    ]
    return min(counts, default=0)


def _beyond(tokenizer: Any, text: str, limit: int | None) -> int:  # noqa: ANN401
    limit = limit or int(tokenizer.model_max_length)
    offsets: list[tuple[int, int]] = tokenizer(text, return_offsets_mapping=True, truncation=False)["offset_mapping"]
    if len(offsets) <= limit:
        return 0
    end = offsets[limit - 2][1]  # the last place holds the end token
    return len(text[end:].split())
