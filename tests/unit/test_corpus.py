"""The corpus: a small one is built from made-up icon packages; the pack that ships is looked up and measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from intarsia.pipelines.errors import Cancelled, InputError
from intarsia.pipelines.events import CancelToken, Event, Notice, Progress
from intarsia.training import corpus, icons, pack, procedural, splits
from intarsia.training.corpus import Captioned
from intarsia.training.pictures import Pictures
from PIL import Image, ImageDraw

SETS = (
    icons.IconSet("noto", "first", "1.0.0", "MIT", "Ada"),
    icons.IconSet("streamline-emojis", "second", "2.0.0", "CC-BY-4.0", "Grace", numbered=True),
    icons.IconSet("streamline-freehand-color", "third", "3.0.0", "CC-BY-4.0", "Edsger", named=True),
)
BODY = '<path d="M2 2h12v12H2z" fill="{}"/>'


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus folder whose packages are there already: two contents, three sets, one numbered and one named."""
    modules = tmp_path / "packages/node_modules"
    label = [
        {"label": "red apple", "hexcode": "1F34E", "tags": ["fruit"], "group": 4},
        {"label": "tiger", "hexcode": "1F405", "tags": ["cat"], "group": 3},
        {"label": "flag", "hexcode": "1F3C1", "tags": [], "group": 9},
    ]
    write(modules / "emojibase-data/en/data.json", label)
    write(modules / "emojibase-data/en/shortcodes/plain.json", {"1F34E": "apple"})
    names = {"noto": ("red-apple", "tiger"), "streamline-emojis": ("apple-2", "apple-1", "tiger-2")}
    for item in SETS:
        drawn = names.get(item.style, ("app-window", "tiger-paw-1"))
        drawings = {name: {"body": BODY.format("red" if name == "apple-1" else "blue")} for name in drawn}
        write(modules / item.package / "icons.json", {"icons": drawings})
        write(modules / item.package / "chars.json", {})
    for item in (*SETS, icons.NAMES):
        write(modules / item.package / "package.json", {"version": item.version})
    monkeypatch.setattr(corpus, "SETS", SETS[:1])
    monkeypatch.setattr(corpus, "HELD_OUT_SETS", SETS[1:])
    monkeypatch.setattr(corpus, "fetch", partial(icons.fetch, sets=(*SETS, icons.NAMES)))
    return tmp_path


def test_a_corpus_lists_training_first_and_marks_what_is_held_out(packages: Path) -> None:
    pytest.importorskip("resvg_py")
    events: list[Event] = list(corpus.build(packages, workers=1))
    made = Pictures.open_corpus(packages)
    assert [(row.content, row.style, row.split) for row in made.rows] == [
        ("red apple", "noto", "train"),
        ("tiger", "noto", "held-out"),
        ("red apple", "streamline-emojis", "held-out-style"),
        ("freehand: app window", "streamline-freehand-color", "held-out-style"),
        ("freehand: tiger paw 1", "streamline-freehand-color", "held-out-style"),
        ("red apple", "stained-glass", "held-out-style"),
        ("tiger", "stained-glass", "held-out-style"),
    ]
    assert [made.image(row, 64).size for row in made.rows] == [(64, 64)] * 7
    (apple,) = made.of("red apple", "streamline-emojis")
    red, green, _ = np.asarray(made.image(apple))[64, 64]
    assert (red, green) == (255, 0)  # of the numbered variants the first is taken
    progress = [event for event in events if isinstance(event, Progress)]
    assert (progress[-1].step, progress[-1].total) == (7, 7)
    assert isinstance(events[-1], Notice)
    licences = (packages / "LICENCES.txt").read_text("utf-8")
    for item in (*SETS, icons.NAMES):
        assert f"{item.package} {item.version}" in licences and item.author in licences


def test_a_corpus_that_was_cut_goes_on_and_keeps_what_was_made(packages: Path) -> None:
    pytest.importorskip("resvg_py")
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        list(corpus.build(packages, 1, token))
    assert not (packages / "captions.jsonl").exists()
    kept = packages / "noto/1F34E.webp"
    kept.parent.mkdir(exist_ok=True)
    Image.new("RGBA", (256, 256), "lime").save(kept, lossless=True)
    list(corpus.build(packages, 1))
    with Image.open(kept) as picture:
        assert picture.convert("RGB").getpixel((9, 9)) == (0, 255, 0)
    assert len(Pictures.open_corpus(packages).rows) == 7
    assert not list(packages.rglob("*.part"))


def test_a_machine_without_npm_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    command = [sys.executable, "-m", "intarsia.app", "corpus", "build", "--out", str(tmp_path / "corpus")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: npm was not found.\n  Install Node.js" in done.stderr
    assert "Traceback" not in done.stderr


def drawing(size: int = 256) -> Image.Image:
    """A blue disc with a yellow square in it, on a transparent ground."""
    picture = Image.new("RGBA", (size, size))
    pen = ImageDraw.Draw(picture)
    pen.ellipse((30, 30, 225, 225), fill=(40, 80, 220))
    pen.rectangle((100, 100, 160, 160), fill=(240, 210, 40))
    return picture


def test_stained_glass_is_the_same_each_time_and_leaves_the_ground_clear() -> None:
    one, same, other = (procedural.stained_glass(drawing(), code) for code in ("1F34E", "1F34E", "1F405"))
    assert one.tobytes() == same.tobytes() != other.tobytes()
    pixels = np.asarray(one).astype(int)
    assert pixels[:20, :, 3].max() == 0 and pixels[128, 128, 3] == 255
    assert np.abs(pixels[28:33, 128, :3] - procedural.LEAD).sum(-1).min() < 12  # lead along the upper edge


def test_stained_glass_keeps_colours_in_their_places_between_lead() -> None:
    pixels = np.asarray(procedural.stained_glass(drawing(), "1F34E")).astype(float)
    square, disc = pixels[106:155, 106:155, :3], pixels[45:95, 106:155, :3]
    for area, colour in ((square, (240, 210, 40)), (disc, (40, 80, 220))):
        glass = area[area.max(-1) > 100]
        assert 0.4 < len(glass) / area[..., 0].size < 0.95  # the rest is lead
        assert np.abs(np.median(glass, 0) - colour).max() < 30
    panes = {tuple(colour) for colour in disc[disc.max(-1) > 150].astype(int)}
    assert len(panes) > 8  # no two of one melt


@pytest.fixture(scope="module")
def shipped() -> Pictures:
    return Pictures.open_corpus(None)


def test_the_pack_that_ships_holds_every_held_out_content_and_examples_of_every_held_out_style(
    shipped: Pictures,
) -> None:
    hidden, styles = splits.held_out_contents(), splits.held_out_styles()
    for style in ("noto", "twemoji", "fluent-flat", "stained-glass"):
        assert {row.code for row in shipped.of(style=style)} >= set(hidden), style
    for item in icons.SETS:
        drawn = {row.code for row in shipped.of(style=item.style)}
        assert drawn <= set(hidden) and len(drawn) >= 30, item.style
    examples = Counter(row.style for row in shipped.rows if row.code not in hidden)
    assert examples == dict.fromkeys(styles, pack.EXAMPLES)
    assert all((row.split == "held-out-style") == (row.style in styles) for row in shipped.rows)
    assert not [row for row in shipped.rows if row.split == "train"]


def test_the_pack_is_small_readable_and_says_whose_it_is(shipped: Pictures) -> None:
    files = [path for path in shipped.folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3 * 2**20
    listed = {shipped.folder / row.file for row in shipped.rows}
    assert {path for path in files if path.suffix == ".webp"} == listed
    for row in shipped.rows[::40]:
        image = shipped.image(row)
        assert image.mode == "RGB" and image.size == (128, 128)
        assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 1
    licences = (shipped.folder / "LICENCES.txt").read_text("utf-8")
    for item in (*icons.SETS, *icons.HELD_OUT_SETS):
        for part in (f"{item.style}/", f"{item.package} {item.version}", item.licence, item.author):
            assert part in licences


def test_pictures_are_found_by_content_style_and_split(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(tmp_path / "a/1.png")
    rows = [
        Captioned("a/1.png", "cat", "a", ("pet",), "animals", "1", "train"),
        Captioned("b/1.png", "cat", "b", (), "animals", "1", "held-out-style"),
        Captioned("a/2.png", "dog", "a", (), "animals", "2", "held-out"),
    ]
    corpus.write_list(tmp_path, rows)
    found = Pictures.open_corpus(tmp_path)
    assert list(found.rows) == rows and found.rows[0].tags == ("pet",)
    assert found.of("cat") == rows[:2]
    assert found.of("cat", "b") == rows[1:2] and found.of("cat", "b", "train") == []
    assert found.of(style="a", split="held-out") == rows[2:]
    assert found.of("cow", "a") == []
    assert found.image(rows[0], 16).getpixel((8, 8)) == (255, 127, 127)  # half transparent, on white
    with pytest.raises(InputError, match="cannot be read"):
        found.image(rows[1])


def test_a_folder_without_a_list_and_a_broken_line_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no corpus") as caught:
        Pictures.open_corpus(tmp_path)
    assert "intarsia corpus build" in caught.value.hint
    (tmp_path / "captions.jsonl").write_text('{"file": "a.png"}\n')
    with pytest.raises(InputError, match="Line 1 of"):
        Pictures.open_corpus(tmp_path)
