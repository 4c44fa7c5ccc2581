"""What an adapter file's metadata says for people: trigger words, and texts cleaned of what is not printable."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

CAPTIONS = "ss_tag_frequency"
MAX_CAPTIONS = 2**22  # characters of the table of captions


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """Give the trigger phrase, and up to eight frequent words of the training captions."""
    said = text_of(metadata, "intarsia.trigger", "modelspec.trigger_phrase")
    counts: Counter[str] = Counter()
    table = metadata.get(CAPTIONS, "{}")
    try:
        folders = json.loads(table) if len(table) <= MAX_CAPTIONS else {}
    except (ValueError, RecursionError):
        folders = {}
    for tags in cast(dict[str, Any], folders).values() if isinstance(folders, dict) else ():
        for tag, count in cast(dict[str, Any], tags).items() if isinstance(tags, dict) else ():
            if type(count) is int and tag.strip():
                counts[_clean(tag.strip(), 100)] += count
    frequent = tuple(tag for tag, _ in counts.most_common(8))
    return said or (frequent[0] if frequent else ""), frequent


def text_of(metadata: Mapping[str, str], *keys: str) -> str:
    """The first of some metadata texts that says something ("None" is a common way of saying nothing)."""
    for key in keys:
        value = _clean(metadata.get(key, "").strip(), 300)
        if value and value != "None":
            return value
    return ""


def _clean(text: str, limit: int) -> str:
    return "".join(letter for letter in text[:limit] if letter.isprintable())
