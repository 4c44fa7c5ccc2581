"""The package: what the wheel holds, what is pinned, and that the commands are there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("app", "assets", "composition", "kernels", "pipelines", "training")
LEFT_OUT = ("assets/screenshots/", "assets/sheets/")  # pictures of the README
ASKED = {
    "torch": "2.13.0",
    "diffusers": "0.42.1",
    "transformers": "5.23.0",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "safetensors": "0.8.0",
    "gradio": "6.31.0",
}
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that nothing of an earlier build gets in."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    for name in FOLDERS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name)
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-P", "-c", BUILD, str(folder)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_wheel_holds_every_module_and_asset_and_nothing_else(wheel: Path) -> None:
    on_disk = {
        f"intarsia/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    wanted = {name for name in on_disk if not name.startswith(tuple(f"intarsia/{part}" for part in LEFT_OUT))}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held - wanted == set()
    assert wanted - held == set()


def test_wheel_carries_licence_and_notice(wheel: Path) -> None:
    names = [name.rpartition("/")[2] for name in zipfile.ZipFile(wheel).namelist() if "/licenses/" in name]
    assert sorted(names) == ["LICENSE", "NOTICE"]


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == [], "a pin is NAME==VERSION only"
    return {same(name): version for name, _, version in (line.partition("==") for line in lines)}


def same(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_is_pinned(project: dict[str, Any]) -> None:
    about = project["project"]
    wishes = [*about["dependencies"], *(wish for extra in about["optional-dependencies"].values() for wish in extra)]
    names = {same(re.split(r"[^\w.-]", wish)[0]) for wish in wishes}
    assert names - set(pins()) == set()


def test_the_asked_versions_are_the_pinned_ones() -> None:
    assert {name: pins()[name] for name in ASKED} == ASKED


@pytest.mark.parametrize("target", ["studio", "test", "check", "mini", "benchmarks", "readme", "wheel", "clean"])
def test_make_knows_its_commands(target: str) -> None:
    make = shutil.which("make")
    assert make is not None, "make is not installed"
    quiet = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    command = [make, "-n", target]
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert target in subprocess.run([make, "-s", "help"], cwd=ROOT, env=quiet, capture_output=True, text=True).stdout


def test_set_up_that_is_done_costs_nothing_again(tmp_path: Path) -> None:
    """With the stamps of these contents in place, make runs neither venv nor pip; with other contents it does."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    quiet = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}

    def would_run(target: str) -> str:
        command = ["make", "-n", target]
        return subprocess.run(command, cwd=tmp_path, env=quiet, capture_output=True, text=True, check=True).stdout

    first = would_run("studio")
    assert "venv --clear" in first
    assert first.index("install --quiet torch==2.13.0") < first.index("--editable .")
    stamps: set[str] = set(re.findall(r"touch (\.venv/\.\S+)", first))
    assert len(stamps) == 2, "one stamp for torch, one for the rest"
    (tmp_path / ".venv").mkdir()
    for stamp in stamps:
        (tmp_path / stamp).touch()
    assert "pip" not in would_run("studio")
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\nnumpy==2.4.6\n")
    assert "--editable ." in would_run("studio")


def test_the_command_is_installed() -> None:
    from importlib.metadata import entry_points

    (command,) = entry_points(group="console_scripts", name="intarsia")
    assert command.value == "intarsia.app.cli:main"
