"""The icon packages the corpus is drawn from: fetched by npm, matched to contents, rendered with transparency."""

from __future__ import annotations

import io
import json
import re
import subprocess
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..pipelines.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

SIZE = 256
GROUPS = {0: "faces", 1: "people", 3: "animals", 4: "food", 5: "travel", 6: "activities", 7: "objects"}


@dataclass(frozen=True)
class IconSet:
    """One drawing style: the npm package it comes from, and the licence and makers of its art.

    Args:
        numbered: Its names may end in -1, -2...: variants of one content, of which the first is taken.
        named: Its names match no contents: every icon is a content of its own.
    """

    style: str
    package: str
    version: str
    licence: str
    author: str = ""
    numbered: bool = False
    named: bool = False


NAMES = IconSet("", "emojibase-data", "17.0.0", "MIT", "Miles Johnson")
_MICROSOFT = "Copyright (c) Microsoft Corporation"
_EMOJIONE = "EmojiOne (2.x art)"
_STREAMLINE = "Streamline, https://streamlinehq.com"
SETS = (
    IconSet("noto", "@iconify-json/noto", "1.2.9", "Apache-2.0", "Google Inc. and contributors"),
    IconSet("noto-v1", "@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "Google Inc. and contributors"),
    IconSet("twemoji", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", "Copyright Twitter, Inc. and other contributors"),
    IconSet("fluent-emoji", "@iconify-json/fluent-emoji", "1.2.7", "MIT", _MICROSOFT),
    IconSet("fluent-flat", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", _MICROSOFT),
    IconSet("fluent-hc", "@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT", _MICROSOFT),
    IconSet("fluent-3d", "@lobehub/fluent-emoji-3d", "1.1.0", "MIT", _MICROSOFT),
    IconSet("emojione", "@iconify-json/emojione", "1.2.3", "CC-BY-4.0", _EMOJIONE),
    IconSet("emojione-mono", "@iconify-json/emojione-monotone", "1.2.1", "CC-BY-4.0", _EMOJIONE),
    IconSet("fxemoji", "@iconify-json/fxemoji", "1.2.2", "Apache-2.0", "Mozilla"),
)
HELD_OUT_SETS = (
    IconSet("streamline-emojis", "@iconify-json/streamline-emojis", "1.2.4", "CC-BY-4.0", _STREAMLINE, numbered=True),
    IconSet(
        "streamline-freehand-color",
        *("@iconify-json/streamline-freehand-color", "1.2.2", "CC-BY-4.0", _STREAMLINE),
        named=True,
    ),
)


@dataclass(frozen=True)
class Content:
    """One thing that is depicted, such as "red apple", with the names other people gave it."""

    code: str
    label: str
    tags: tuple[str, ...]
    group: str
    slugs: tuple[str, ...]


@dataclass(frozen=True)
class Glyph:
    """Where one picture comes from: SVG text, or a picture file; `style` may be computed from the latter."""

    content: Content
    style: str
    svg: str = ""
    file: str = ""
    flip: bool = False


def fetch(folder: Path, sets: Sequence[IconSet] = (*SETS, *HELD_OUT_SETS, NAMES)) -> Path:
    """Install the icon packages with npm where they are not there yet; returns the `node_modules` folder.

    Raises:
        InputError: npm is missing, or could not fetch them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    modules = folder / "node_modules"
    missing = [item for item in sets if _installed(modules / item.package) != item.version]
    if not missing:
        return modules
    wanted = [f"{item.package}@{item.version}" for item in missing]
    command = ["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--ignore-scripts", *wanted]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise InputError("npm was not found.", "Install Node.js: the icon packages come from npm.") from None
    except subprocess.CalledProcessError as error:
        why = error.stderr.strip()[-300:]
        raise InputError(f"npm could not fetch the icons: {why}", "Check the network, then run it again.") from None
    return modules


def _installed(package: Path) -> str:
    listed = package / "package.json"
    return str(json.loads(listed.read_text("utf-8")).get("version", "")) if listed.exists() else ""


def slug(text: str) -> str:
    """Lower-case ASCII words joined by dashes, as icon sets name their glyphs."""
    plain = unicodedata.normalize("NFKD", text.replace("&", "and").replace("’", "")).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


def contents(modules: Path) -> list[Content]:
    """Read the concrete contents (no flags, symbols or skin tones) with every slug they are known by."""
    base = modules / "emojibase-data/en"
    entries = json.loads((base / "data.json").read_text("utf-8"))
    shortcodes: dict[str, list[str]] = {}
    for path in sorted((base / "shortcodes").glob("*.json")):
        for code, names in json.loads(path.read_text("utf-8")).items():
            shortcodes.setdefault(code, []).extend([names] if isinstance(names, str) else names)
    found: list[Content] = []
    for entry in entries:
        if entry.get("group") not in GROUPS:
            continue
        names = [entry["label"], *shortcodes.get(entry["hexcode"], [])]
        slugs = tuple(dict.fromkeys(slug(name) for name in names))
        tags = tuple(entry.get("tags", ()))
        found.append(Content(entry["hexcode"], entry["label"], tags, GROUPS[entry["group"]], slugs))
    return found


def _code(text: str) -> str:
    """Codepoints without the presentation selector, the one spelling all sets can be compared in."""
    return "-".join(part for part in text.upper().split("-") if part != "FE0F")


def glyphs(modules: Path, icon_set: IconSet, wanted: list[Content]) -> Iterator[Glyph]:
    """Match the glyphs of one set to contents, by codepoints where the set lists them, else by name."""
    folder = modules / icon_set.package
    if (folder / "assets").is_dir():
        files = {_code(path.stem): path for path in sorted((folder / "assets").glob("*.webp"))}
        for content in wanted:
            if path := files.get(_code(content.code)):
                yield Glyph(content, icon_set.style, file=str(path))
        return
    icons: dict[str, Any] = json.loads((folder / "icons.json").read_text("utf-8"))
    if icon_set.named:
        for name in sorted(icons["icons"]):
            yield Glyph(_own_content(icon_set, name), icon_set.style, svg=_svg(icons, name))
        return
    listed = {_code(code): name for code, name in json.loads((folder / "chars.json").read_text("utf-8")).items()}
    aliases: dict[str, Any] = icons.get("aliases", {})
    known = {name: name for name in (*aliases, *icons["icons"])}
    if icon_set.numbered:
        known = {**{name.removesuffix("-1"): name for name in known if name.endswith("-1")}, **known}
    joined = {name.replace("-", ""): name for name in known}
    for content in wanted:
        names = [listed.get(_code(content.code)), *content.slugs]
        name = next((name for name in names if name and name in known), None)
        name = name or next((joined[s.replace("-", "")] for s in content.slugs if s.replace("-", "") in joined), None)
        if name is not None:
            alias = aliases.get(known[name], {})
            yield Glyph(content, icon_set.style, svg=_svg(icons, known[name]), flip=bool(alias.get("hFlip")))


def _own_content(icon_set: IconSet, name: str) -> Content:
    """A content known by its icon alone: "freehand: camera mode photo"."""
    kind = icon_set.style.split("-")[1]
    words = re.sub(r"-\d+$", "", name).split("-")
    return Content(f"{kind}-{name}", f"{kind}: {name.replace('-', ' ')}", tuple(dict.fromkeys(words)), kind, (name,))


def _svg(icons: dict[str, Any], name: str) -> str:
    while name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    box = [icon.get(key, icons.get(key, default)) for key, default in _VIEW_BOX.items()]
    body = icon["body"].replace("currentColor", "#222")
    view = " ".join(map(str, box))
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {space} viewBox="{view}" width="{box[2]}" height="{box[3]}">{body}</svg>'


_VIEW_BOX = {"left": 0, "top": 0, "width": 16, "height": 16}


def draw(glyph: Glyph, size: int = SIZE) -> Image.Image:
    """Render one glyph as RGBA of `size` pixels, centred on a transparent square.

    Raises:
        InputError: The package that renders icons is missing.
    """
    from PIL import Image

    if glyph.file:
        picture = Image.open(glyph.file).convert("RGBA")
    else:
        try:
            import resvg_py
        except ImportError:
            raise InputError("resvg-py is not installed.", 'Run: pip install "intarsia[corpus]"') from None
        # Its edges are smooth as they are: drawn at twice the size and shrunk, pictures take three times as long and
        # differ by 40 to 44 dB on average. Only what passes through a filter comes out jagged: half as large again,
        # 45 dB from twice the size, mends that.
        wide = size * 3 // 2 if "<filter" in glyph.svg else size
        data = resvg_py.svg_to_bytes(svg_string=glyph.svg, width=wide, skip_system_fonts=True)
        picture = Image.open(io.BytesIO(bytes(data))).convert("RGBA")
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (size, size))
    square.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if glyph.flip else square
