"""Texts and pictures beside adapter files, as other studios keep them: read as a stranger's words, written on export.

NAME.json is what a person wrote about NAME.safetensors in A1111, NAME.civitai.info what its author wrote where it was
downloaded; NAME.preview.png (or .png, .jpg, .webp) is its picture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..pipelines.atomic import replacing
from .library_entry import MAX_LINE, MAX_NOTES, MAX_TAG, MAX_TAGS, Entry

PICTURES = tuple(f"{middle}.{kind}" for middle in (".preview", "") for kind in ("png", "jpg", "jpeg", "webp"))
TEXTS = (".json", ".civitai.info")
ENDINGS = (*PICTURES, *TEXTS)
MAX_FILE = 2**20  # bytes of JSON
MAX_WORDS = 20
MAX_WEIGHT = 10.0
SD_VERSIONS = {"sd15": "SD1", "sdxl": "SDXL"}


@dataclass(frozen=True)
class Sidecar:
    """What stands beside a file; empty where nothing does."""

    picture: Path | None = None
    title: str = ""
    trigger: str = ""
    triggers: tuple[str, ...] = ()
    base: str = ""
    description: str = ""
    notes: str = ""
    licence: str = ""
    tags: tuple[str, ...] = ()
    weight: float | None = None


def beside(path: Path) -> Sidecar:
    """Read what stands beside an adapter file."""
    stem = path.with_suffix("")
    own, author = (_table(Path(f"{stem}{ending}")) for ending in TEXTS)
    ours = _inner(own, "intarsia")
    words = _texts(author.get("trainedWords"), MAX_WORDS, MAX_LINE)
    weight = own.get("preferred weight")
    usable = isinstance(weight, int | float) and 0 < abs(weight) <= MAX_WEIGHT  # not true of NaN and 400 digits either
    return Sidecar(
        picture=next((found for ending in PICTURES if (found := Path(f"{stem}{ending}")).is_file()), None),
        title=text(_inner(author, "model").get("name") or author.get("name"), MAX_LINE),
        trigger=text(own.get("activation text"), MAX_LINE) or (words[0] if words else ""),
        triggers=words,
        base=text(author.get("baseModel"), MAX_LINE),
        description=text(own.get("description") or author.get("description"), MAX_NOTES),
        notes=text(own.get("notes"), MAX_NOTES),
        licence=text(ours.get("licence"), MAX_LINE),
        tags=_texts(ours.get("tags"), MAX_TAGS, MAX_TAG),
        weight=float(cast(float, weight)) if usable else None,
    )


def text(value: object, limit: int) -> str:
    """Clean a stranger's text: what is printable, line by line, up to a limit of characters."""
    if not isinstance(value, str):
        return ""
    return "".join(letter for letter in value.strip()[:limit] if letter.isprintable() or letter == "\n").strip()


def _texts(value: object, number: int, limit: int) -> tuple[str, ...]:
    found = cast(list[object], value) if isinstance(value, list) else []
    lines = (" ".join(text(one, limit).split()) for one in found[:number])
    return tuple(dict.fromkeys(line for line in lines if line))


def _inner(table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = table.get(key)
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def _table(path: Path) -> Mapping[str, Any]:
    """Read a JSON object; anything else that lies there says nothing about the adapter."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_FILE:
            return {}
        found: object = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return cast(dict[str, Any], found) if isinstance(found, dict) else {}


def write_card(entry: Entry, target: Path) -> None:
    """Write what the library knows of an entry where A1111 looks for it; Intarsia reads it back too."""
    ours = ("name", "sha256", "family", "algorithm", "rank", "role", "base", "title", "author", "licence", "tags")
    card: dict[str, Any] = {
        "description": entry.description,
        "sd version": SD_VERSIONS.get(entry.family, "Unknown"),
        "activation text": entry.trigger,
        "preferred weight": entry.weight or 0,
        "notes": entry.notes,
        "intarsia": {name: getattr(entry, name) for name in ours},
    }
    with replacing(target) as temporary:
        temporary.write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", "utf-8")
