"""Build the corpus Mini learns from: the same contents drawn in ten consistent styles, rendered with transparency.

The icon packages are fetched by npm at build time (never at the user's run time), each glyph is matched to its
Unicode name, rendered at twice the size and shrunk. The result is a folder like any other folder of captioned
pictures: `STYLE/CODEPOINTS.webp` (RGBA) and one line per picture in `captions.jsonl`.

Run: python -m intarsia.training.corpus --out runs/corpus
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..pipelines.errors import InputError

SIZE = 256
GROUPS = {0: "faces", 1: "people", 3: "animals", 4: "food", 5: "travel", 6: "activities", 7: "objects"}
NAMES = ("emojibase-data", "17.0.0", "MIT")


@dataclass(frozen=True)
class IconSet:
    """One drawing style: the npm package it comes from and the licence of its art."""

    style: str
    package: str
    version: str
    licence: str


SETS = (
    IconSet("noto", "@iconify-json/noto", "1.2.9", "Apache-2.0"),
    IconSet("noto-v1", "@iconify-json/noto-v1", "1.2.5", "Apache-2.0"),
    IconSet("twemoji", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0"),
    IconSet("fluent-emoji", "@iconify-json/fluent-emoji", "1.2.7", "MIT"),
    IconSet("fluent-flat", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT"),
    IconSet("fluent-hc", "@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT"),
    IconSet("fluent-3d", "@lobehub/fluent-emoji-3d", "1.1.0", "MIT"),
    IconSet("emojione", "@iconify-json/emojione", "1.2.3", "CC-BY-4.0"),
    IconSet("emojione-mono", "@iconify-json/emojione-monotone", "1.2.1", "CC-BY-4.0"),
    IconSet("fxemoji", "@iconify-json/fxemoji", "1.2.2", "Apache-2.0"),
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
class Captioned:
    """One line of `captions.jsonl`."""

    file: str
    content: str
    style: str
    tags: tuple[str, ...]
    group: str
    code: str
    split: str


def fetch(folder: Path) -> Path:
    """Install the icon packages with npm; returns the `node_modules` folder."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [f"{item.package}@{item.version}" for item in SETS] + [f"{NAMES[0]}@{NAMES[1]}"]
    command = ["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--ignore-scripts", *wanted]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise InputError("npm was not found.", "Install Node.js: the icon packages come from npm.") from None
    except subprocess.CalledProcessError as error:
        raise InputError(f"npm could not fetch the icons: {error.stderr.strip()[-300:]}", "") from None
    return folder / "node_modules"


def slug(text: str) -> str:
    """Lower-case ASCII words joined by dashes, as icon sets name their glyphs."""
    plain = unicodedata.normalize("NFKD", text.replace("&", "and").replace("’", "")).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


def contents(modules: Path) -> list[Content]:
    """Read the concrete contents (no flags, symbols or skin tones) with every slug they are known by."""
    base = modules / "emojibase-data/en"
    entries = json.loads((base / "data.json").read_text())
    shortcodes: dict[str, list[str]] = {}
    for path in sorted((base / "shortcodes").glob("*.json")):
        for code, names in json.loads(path.read_text()).items():
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


@dataclass(frozen=True)
class Glyph:
    """Where one picture comes from: SVG text, or a picture file."""

    content: Content
    style: str
    svg: str = ""
    file: str = ""
    flip: bool = False


def glyphs(modules: Path, icon_set: IconSet, wanted: list[Content]) -> Iterator[Glyph]:
    """Match the glyphs of one set to contents, by codepoints where the set lists them, else by name."""
    folder = modules / icon_set.package
    if (folder / "assets").is_dir():
        files = {_code(path.stem): path for path in sorted((folder / "assets").glob("*.webp"))}
        for content in wanted:
            if path := files.get(_code(content.code)):
                yield Glyph(content, icon_set.style, file=str(path))
        return
    icons: dict[str, Any] = json.loads((folder / "icons.json").read_text())
    listed = {_code(code): name for code, name in json.loads((folder / "chars.json").read_text()).items()}
    aliases: dict[str, Any] = icons.get("aliases", {})
    known = {**dict.fromkeys(aliases), **dict.fromkeys(icons["icons"])}
    joined = {name.replace("-", ""): name for name in known}
    for content in wanted:
        names = [listed.get(_code(content.code)), *content.slugs]
        name = next((name for name in names if name and name in known), None)
        name = name or next((joined[s.replace("-", "")] for s in content.slugs if s.replace("-", "") in joined), None)
        if name is not None:
            alias = aliases.get(name, {})
            yield Glyph(content, icon_set.style, svg=_svg(icons, name), flip=bool(alias.get("hFlip")))


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
    """Render one glyph as RGBA of `size` pixels, centred on a transparent square."""
    if glyph.file:
        picture = Image.open(glyph.file).convert("RGBA")
    else:
        import resvg_py

        data = resvg_py.svg_to_bytes(svg_string=glyph.svg, width=2 * size, skip_system_fonts=True)
        picture = Image.open(io.BytesIO(bytes(data))).convert("RGBA")
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (size, size))
    square.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if glyph.flip else square


def _save(job: tuple[Glyph, Path]) -> None:
    glyph, path = job
    draw(glyph).save(path, lossless=True, quality=20, method=1)


def held_out() -> frozenset[str]:
    """Codepoints of the contents no training ever sees (assets/splits/held_out_contents.txt)."""
    from importlib.resources import files

    lines = files("intarsia.assets").joinpath("splits/held_out_contents.txt").read_text().splitlines()
    return frozenset(line.split()[0] for line in lines if line and not line.startswith("#"))


def build(out: Path, workers: int = 2) -> int:
    """Fetch, match, render and write the corpus; returns the number of pictures."""
    modules = fetch(out / "packages")
    wanted, hidden = contents(modules), held_out()
    jobs: list[tuple[Glyph, Path]] = []
    rows: list[Captioned] = []
    for icon_set in SETS:
        (out / icon_set.style).mkdir(parents=True, exist_ok=True)
        for glyph in glyphs(modules, icon_set, wanted):
            item, name = glyph.content, f"{icon_set.style}/{glyph.content.code}.webp"
            split = "held-out" if item.code in hidden else "train"
            rows.append(Captioned(name, item.label, icon_set.style, item.tags, item.group, item.code, split))
            if not (out / name).exists():
                jobs.append((glyph, out / name))
    with ProcessPoolExecutor(workers) as pool:
        for _ in pool.map(_save, jobs, chunksize=16):
            pass
    text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    (out / "captions.jsonl").write_text(text)
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the corpus Mini learns from.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    build(given.out, given.workers)


if __name__ == "__main__":
    main()
