"""Thumbnails of the library: small re-encoded copies of pictures that strangers or training made."""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path

from ..pipelines.atomic import replacing
from ..pipelines.errors import InputError
from .settings import Home

EMBEDDED = re.compile(r"data:image/(?:png|jpeg|webp);base64,([A-Za-z0-9+/=\s]+)")
MAX_EMBEDDED = 2**21  # characters of base64
MAX_FILE = 2**25  # bytes of a picture beside an adapter
MAX_PIXELS = 4096 * 4096
SIDE = 512  # pixels


def store(home: Home, sha256: str, given: Path | None, *found: Path | str | None) -> Path | None:
    """Keep a small copy of a picture, named by the adapter's hash.

    Args:
        home: Where to.
        sha256: Of the adapter.
        given: A picture a person or a training gave; a broken one is an error.
        found: Pictures that came with the file, the best first: a file beside it, or the header's text. Broken ones
            are passed over: they are no reason to refuse a sound adapter.

    Raises:
        InputError: The given picture cannot be read.
        MemoryLimitError: The disk is full.
    """
    if given is not None:
        return _write(home, sha256, given)
    for one in found:
        source = embedded(one) if isinstance(one, str) else one
        if source is None or (isinstance(source, Path) and source.stat().st_size > MAX_FILE):
            continue
        try:
            return _write(home, sha256, source)
        except InputError:
            continue
    return None


def _write(home: Home, sha256: str, source: Path | bytes) -> Path:
    from ..pipelines.picture import open_picture

    picture = open_picture(source, MAX_PIXELS)
    picture.thumbnail((SIDE, SIDE))
    target = home.thumbnails / f"{sha256[:32]}.webp"
    with replacing(target) as temporary:
        picture.save(temporary, format="WEBP", quality=90)
    return target


def write_png(thumbnail: Path, target: Path) -> None:
    """Write a thumbnail as the PNG that other studios show beside an adapter."""
    from ..pipelines.picture import open_picture

    with replacing(target) as temporary:
        open_picture(thumbnail).save(temporary, format="PNG")


def embedded(text: str) -> bytes | None:
    """Decode a picture that stands in a header as a data address."""
    found = EMBEDDED.fullmatch(text) if 0 < len(text) <= MAX_EMBEDDED else None
    if found is None:
        return None
    try:
        return base64.b64decode(found[1], validate=False)
    except binascii.Error:
        return None
