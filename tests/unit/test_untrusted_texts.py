"""What a stranger's file says of itself is text: it draws no element on the page, names no path, runs nothing."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import struct
import zlib
from concurrent.futures import Future
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import lora, peft
from hostile_files import SOME, save
from intarsia.app.library_entry import Entry
from intarsia.app.settings import Home
from intarsia.app.studio import Studio
from intarsia.app.ui.library_cards import card, trash_card
from intarsia.app.ui.library_edit import edit_html
from intarsia.app.ui.library_report import report_html
from intarsia.pipelines.identify import inspect
from PIL import EpsImagePlugin, Image

EVIL = "\"'><script>alert(1)</script><evil onx=1 src=x onerror='alert(1)'>&amp;${x}</p>"
KEYS = (
    "modelspec.title", "modelspec.author", "modelspec.description", "modelspec.license", "modelspec.trigger_phrase",
    "modelspec.usage_hint", "modelspec.tags", "modelspec.architecture", "intarsia.base", "intarsia.role",
    "intarsia.trigger", "intarsia.base_hash", "ss_sd_model_name", "ss_output_name", "ss_training_comment",
    "ss_base_model_version", "ss_network_module", EVIL,
)  # fmt: skip


class Elements(HTMLParser):
    """The elements and attributes a browser would make of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def assert_tame(html: str) -> None:
    found = Elements()
    found.feed(html)
    assert not found.tags & {"script", "evil"}
    assert not [name for name in found.attributes if name.startswith("on")]
    assert "alert(1)" in html, "the text itself is shown"


def imported(home: Home, path: Path, texts: dict[str, str]) -> Entry:
    arrays = lora(SOME, peft) | {f"unet.{EVIL}.lora_{end}.weight": np.ones((2, 2), np.float32) for end in "AB"}
    with Studio(home) as studio:
        return studio.import_adapter(save(path, arrays, texts))


def test_no_text_of_a_file_becomes_an_element_of_the_page(home: Home, tmp_path: Path) -> None:
    texts = dict.fromkeys(KEYS, EVIL) | {"ss_tag_frequency": f'{{"a":{{{json.dumps(EVIL)}:3}}}}'}
    entry = imported(home, tmp_path / "<script>evil.safetensors", texts)
    assert entry.trigger and any(EVIL in warning for warning in entry.warnings)
    measured: Future[Any] = Future()
    for html in (card(entry, home.thumbnails), report_html(entry, inspect(entry.path), measured)):
        assert_tame(html)


def test_no_field_of_an_entry_becomes_an_element_of_the_page(home: Home, tmp_path: Path) -> None:
    """Whatever the library holds, by whichever way it came in."""
    entry = imported(home, tmp_path / "a.safetensors", {})
    evil: dict[str, Any] = {}
    for field in dataclasses.fields(Entry):
        value = getattr(entry, field.name)
        if isinstance(value, str):
            evil[field.name] = EVIL
        elif isinstance(value, tuple):
            evil[field.name] = (EVIL,)
    bad = dataclasses.replace(entry, **evil, path=tmp_path / f"{EVIL.replace('/', '')}.safetensors")
    for html in (card(bad, home.thumbnails), trash_card(bad, home.thumbnails), edit_html(bad, inspect(entry.path))):
        assert_tame(html)


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that says it is of a size, whatever is in it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def encoded(kind: str, **options: Any) -> bytes:  # noqa: ANN401
    raw = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 30, 30)).save(raw, kind, **options)
    return raw.getvalue()


def animated() -> bytes:
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 200)]
    raw = io.BytesIO()
    frames[0].save(raw, "GIF", save_all=True, append_images=frames[1:])
    return raw.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n(x) print\n%%EOF\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
PICTURES: dict[str, tuple[bytes, bool]] = {
    "a sound PNG": (encoded("PNG"), True),
    "a sound JPEG": (encoded("JPEG"), True),
    "one pixel": (png(1, 1, b"\0\x80"), True),
    "a still GIF": (encoded("GIF"), True),
    "an animation": (animated(), False),
    "40,000 x 40,000 pixels in a few bytes": (png(40_000, 40_000, bytes(40_001)), False),
    "5,000 x 5,000 pixels of one colour": (png(5_000, 5_000, bytes(5_001 * 5_000)), False),
    "no pixels at all": (png(0, 0), False),
    "a PNG cut off": (encoded("PNG")[:60], False),
    "a JPEG cut off": (encoded("JPEG")[:300], False),
    "an SVG": (SVG, False),
    "an EPS": (EPS, False),
    "nothing": (b"", False),
    "a text": (b"hello", False),
}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("kind", ["png", "svg+xml"])
def test_pictures_in_headers_are_made_anew_or_left_out(
    name: str, kind: str, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object, **__: object) -> None:
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    raw, good = PICTURES[name]
    text = f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"
    with Studio(home) as studio:
        entry = studio.import_adapter(save(tmp_path / "a.safetensors", lora(SOME, peft), {"modelspec.thumbnail": text}))
    if not good or kind != "png":
        assert entry.thumbnail is None
        return
    assert entry.thumbnail is not None and entry.thumbnail.is_relative_to(home.root)
    with Image.open(entry.thumbnail) as picture:
        assert picture.format == "WEBP" and max(picture.size) <= 512
