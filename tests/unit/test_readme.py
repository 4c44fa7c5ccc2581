"""The README tells the truth: its commands run, its pictures exist, its table and its list of files are current."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text("utf-8")
BLOCK = re.compile(r"(?:<!-- checked: (?P<how>\w+) -->\n)?```(?P<language>\w*)\n(?P<body>.*?)```", re.DOTALL)
FEW_STEPS = 2
Tiny = Callable[..., Path]  # the fixture in conftest.py


def commands(how: str) -> list[list[str]]:
    """Commands of the blocks that are checked this way, as words, comments left out."""
    lines = [line for block in BLOCK.finditer(TEXT) if block["how"] == how for line in block["body"].splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_every_block_of_commands_is_checked() -> None:
    unmarked = [block["body"] for block in BLOCK.finditer(TEXT) if block["language"] != "text" and not block["how"]]
    assert unmarked == []
    assert {block["how"] for block in BLOCK.finditer(TEXT) if block["how"]} == {"run", "dry", "layout"}
    assert len([words for words in commands("run") if not measures(words)]) == 18, "the command line at a glance"


@pytest.mark.parametrize("words", commands("dry"), ids=lambda words: " ".join(words)[:40])
def test_set_up_commands_exist(words: list[str]) -> None:
    assert words[0] == "make"
    quiet = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def draw(path: Path, colour: str) -> None:
    image = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(image).ellipse((16, 16, 80, 80), fill=colour)
    image.save(path)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README's person has: a picture, a folder of pictures, a layout."""
    folder = tmp_path_factory.mktemp("desk")
    draw(folder / "cat.png", "orange")
    (folder / "photos").mkdir()
    for number, colour in enumerate(("red", "blue")):
        draw(folder / "photos" / f"{number}.png", colour)
        (folder / "photos" / f"{number}.txt").write_text(f"a {colour} ball")
    (layout,) = (block["body"] for block in BLOCK.finditer(TEXT) if block["how"] == "layout")
    (folder / "two.yaml").write_text(layout)
    return folder


def measures(words: list[str]) -> bool:
    """Whether a command is about measuring: those take minutes as they stand."""
    return words[1:2] in (["evaluate"], ["corpus"])


SMALL = {  # the least each bench can measure
    "judge": ["--pairs", "10"],
    "base": ["--held-in", "2", "--held-out", "2", "--scenes", "2"],
    "separation": ["--pairs", "1", "--seeds", "1", "--training-steps", "2"],
    "composition": [
        "--contents",
        "2",
        "--scenes",
        "1",
        "--seeds",
        "1",
        "--train-steps",
        "2",
        "--steps",
        "2",
        "--arms",
        "truth,merge,region",
    ],
}


def shortened(words: list[str], model: Path | None) -> list[str]:
    """The same command with few steps, and with the stand-in where Mini is not there."""
    if words[1:2] == ["corpus"]:
        return [*words, "--help"]  # the icon sets are a download of hundreds of megabytes
    if words[1:2] == ["evaluate"]:
        return [*words, *SMALL[words[2]]]
    words = [*words, "--steps", "2"] if words[1:2] == ["compose"] else words
    words = [str(FEW_STEPS) if before == "--steps" else word for before, word in zip(["", *words], words, strict=False)]
    if words == ["intarsia"]:
        return [*words, "--help"]  # opening the page has tests of its own
    if model:
        words = [str(model) if word == "mini" else word for word in words]
        if words[1] in ("generate", "train", "compose") and "--model" not in words:
            words += ["--model", str(model)]
    return words


def somebody_elses_adapter(desk: Path) -> None:
    """Write `style.safetensors`: one of the library's files with other values, so that it is not the same adapter."""
    source = next((desk / "home" / "adapters").rglob("cat-style.safetensors"))
    with safe_open(source, framework="numpy") as file:
        tensors: dict[str, Any] = {name: file.get_tensor(name) * 2 for name in file.keys()}  # noqa: SIM118 - no mapping
        save_file(tensors, desk / "style.safetensors", file.metadata())


@pytest.mark.timeout(900)  # fourteen processes, most of which load torch
def test_command_lines_run(desk: Path, tiny: Tiny) -> None:
    """In their order, in one home, as a person would type them; what they promise to write is there afterwards."""
    mini = ROOT / "assets" / "mini" / "model_index.json"
    model = None if mini.is_file() else tiny("sdxl")
    environment = {**os.environ, "INTARSIA_HOME": str(desk / "home"), "HF_HUB_OFFLINE": "1"}
    for words in commands("run"):
        assert words[0] == "intarsia"
        if "style.safetensors" in words and not (desk / "style.safetensors").exists():
            somebody_elses_adapter(desk)
        command = [sys.executable, "-P", "-m", "intarsia.app", *shortened(words, model)[1:]]
        done = subprocess.run(command, cwd=desk, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"
        made_file = desk / words[words.index("--out") + 1] if "--out" in words else None
        if made_file and made_file.suffix == ".safetensors":
            with safe_open(made_file, "np") as file:
                assert any("lora_down" in name for name in file.keys())  # noqa: SIM118 - it is no mapping
        elif made_file and words[1] == "compose":
            assert len(list(made_file.glob("*.png"))) == 4 and (made_file / "comparison.json").is_file()
        elif made_file:
            with Image.open(made_file) as picture:
                picture.verify()
        if words[1:3] == ["train", "blora"]:
            made = {path.stem for path in (desk / "home" / "adapters").rglob("*.safetensors")}
            assert made == {"cat-content", "cat-style"}


def test_trigger_in_the_readme_is_the_one_the_training_makes() -> None:
    from intarsia.training.recipes.blora import RECIPE

    trigger = RECIPE.trigger("cat", RECIPE.options())
    assert f'"A {trigger}" --adapter cat-content' in TEXT


def test_pictures_and_links_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert [name for name in targets if "://" not in name and not (ROOT / name).is_file()] == []


def test_table_and_list_of_files_are_current() -> None:
    command = [sys.executable, "-m", "benchmarks.readme", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_python_file_has_its_line() -> None:
    listed = set(re.findall(r"^(\S+\.py) +\S", TEXT, re.MULTILINE))
    folders = ("app", "pipelines", "composition", "training", "kernels", "assets", "benchmarks", "tests")
    on_disk = {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if path.read_text("utf-8").strip()
    }
    assert listed == on_disk
