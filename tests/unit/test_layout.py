"""The rules of the source tree: who imports whom, what the page may never load, how long a file may be."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": set(),
    "pipelines": {"kernels"},
    "composition": {"kernels", "pipelines"},
    "training": {"kernels", "pipelines"},  # training and composition never meet
    "app": {"kernels", "pipelines", "composition", "training", "assets"},
    "assets": set(),
}
FRONT = ("app/ui/", "app/cli", "app/api")  # what people see; it may ask these parts of app, and no other
FRONT_MAY_ASK = {"studio", "present", "settings", "ui"}
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "torchvision"}
TORCH_FREE = (
    *("errors", "events", "options", "requests", "plugins", "hooks", "adapter_types", "families", "sources"),
    *("headers", "adapter_file", "dialects", "identify", "picture"),
)
WORKER_ONLY = {"app/runner.py", "app/worker.py", "app/compose_work.py"}
MAX_LINES = 400
NOT_OURS = {"build", "dist", "runs", "node_modules", "__pycache__"}


@dataclass(frozen=True)
class Import:
    """One imported module, with relative imports resolved: "pipelines.events", "torch.nn"."""

    path: str
    line: int
    module: str
    ours: bool
    types_only: bool

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.module}"


def files(suffixes: tuple[str, ...] = ("",)) -> list[Path]:
    """Every file of the project: no hidden folders but .ci, nothing built."""
    found: list[Path] = []
    for folder, names, inside in os.walk(ROOT):
        names[:] = [
            name
            for name in names
            if name not in NOT_OURS and not name.endswith(".egg-info") and (name[0] != "." or name == ".ci")
        ]
        found += [Path(folder, name) for name in inside if name.endswith(suffixes)]
    return sorted(found)


def sources(*folders: str) -> dict[str, str]:
    """Path relative to the checkout -> source, of the Python files in these folders (default: the product's)."""
    chosen = folders or tuple(MAY_IMPORT)
    paths = [path.relative_to(ROOT) for path in files((".py",))]
    return {path.as_posix(): (ROOT / path).read_text("utf-8") for path in paths if path.parts[0] in chosen}


def imports(path: str, source: str) -> Iterator[Import]:
    tree = ast.parse(source)
    guarded: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            guarded.update(inner for statement in node.body for inner in ast.walk(statement))
    package = list(Path(path).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name, alias.name.split(".")[0] == "intarsia", node in guarded)
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            parts = [*base, *((node.module or "").split(".") if node.module else [])]
            for alias in node.names:
                yield Import(path, node.lineno, ".".join([*parts, alias.name]), True, node in guarded)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield Import(path, node.lineno, node.module, node.module.split(".")[0] == "intarsia", node in guarded)


ALL = [one for path, source in sources().items() for one in imports(path, source)]


def test_imports_across_folders_are_relative() -> None:
    assert [str(one) for one in ALL if one.module.split(".")[0] == "intarsia"] == []


def test_folders_import_only_what_they_may() -> None:
    wrong: list[str] = []
    for one in ALL:
        here, there = one.path.split("/")[0], one.module.split(".")[0]
        if one.ours and there != here and there not in MAY_IMPORT[here]:
            wrong.append(str(one))
    assert wrong == []


def test_page_and_command_line_ask_only_the_studio() -> None:
    wrong: list[str] = []
    for one in ALL:
        parts = one.module.split(".")
        if one.path.startswith(FRONT) and one.ours and not one.types_only and parts[0] == "app":
            asked = parts[1] if len(parts) > 1 else ""
            wrong += [] if asked in FRONT_MAY_ASK or asked.startswith("cli") else [str(one)]
    assert wrong == []


def test_page_and_command_line_never_name_torch() -> None:
    named = [str(one) for one in ALL if one.path.startswith(FRONT) and one.module.split(".")[0] in HEAVY]
    assert named == []


def test_gradio_is_imported_in_the_page_only() -> None:
    found = [str(one) for one in ALL if one.module.split(".")[0] == "gradio" and not one.path.startswith("app/ui/")]
    assert found == []


def test_experimental_modular_pipelines_stay_behind_one_module() -> None:
    blocks = {"pipelines/modular.py", "pipelines/sd15_blocks.py"}  # the second is a part of the first
    experimental = ("diffusers.modular_pipelines", "diffusers.guiders")
    assert {one.path for one in ALL if one.module.startswith(experimental)} <= blocks
    assert {one.path for one in ALL if one.module == "pipelines.sd15_blocks"} <= blocks


def test_kernels_is_no_regular_package() -> None:
    # With it, `python -m anything` started in the checkout would find our folder as Hugging Face's `kernels`.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_folder_with_python_files_is_a_listed_package() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"])
    on_disk = {"intarsia." + path.rpartition("/")[0].replace("/", ".") for path in sources()}
    assert listed == on_disk


def test_files_stay_short_enough_to_read() -> None:
    everything = sources(*MAY_IMPORT, "tests", "benchmarks")
    long = {path: lines for path, text in everything.items() if (lines := len(text.splitlines())) > MAX_LINES}
    assert long == {}


def swallows(handler: ast.ExceptHandler) -> bool:
    """Whether a handler catches everything and does not raise it again."""
    names = [] if handler.type is None else [ast.unparse(part) for part in ast.walk(handler.type)]
    broad = handler.type is None or bool({"Exception", "BaseException"} & set(names))
    again = any(isinstance(node, ast.Raise) and node.exc is None for node in ast.walk(handler))
    return broad and not again


def test_one_place_catches_everything() -> None:
    found = [
        path
        for path, source in sources().items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ExceptHandler) and swallows(node)
    ]
    assert found == ["app/runner.py"]


def test_only_the_command_line_prints() -> None:
    found = [
        f"{path}:{node.lineno}"
        for path, source in sources().items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert [place for place in found if not place.startswith("app/cli.py:")] == []


def page_side_modules() -> list[str]:
    names = [f"pipelines/{name}.py" for name in TORCH_FREE] + ["training/recipe.py"]
    names += ["composition/layout.py", "composition/method.py"]
    names += [
        path
        for path in sources()
        if path.startswith(("app/", "training/recipes/", "composition/methods/")) and path not in WORKER_ONLY
    ]
    return [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in names]


LOOK = """
import importlib, sys
for name in sys.argv[2:]:
    importlib.import_module("intarsia." + name)
    loaded = sorted(set(sys.argv[1].split(",")) & set(sys.modules))
    if loaded:
        sys.exit(f"importing intarsia.{name} loads {', '.join(loaded)}")
"""


def test_page_process_loads_no_torch() -> None:
    names = [name for name in page_side_modules() if not name.endswith("__main__")]
    command = [sys.executable, "-P", "-c", LOOK, ",".join(HEAVY), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("start", ["/" + "work/", "/" + "root/", "/" + "opt/py", "/" + "tmp/contract"])
def test_no_file_names_a_place_on_some_machine(start: str) -> None:
    pattern = re.compile(rb"(?<![\w.])" + re.escape(start.encode()))
    kinds = (".py", ".md", ".toml", ".txt", ".yaml", ".json", ".js", ".css", "Makefile", "run", "NOTICE", "LICENSE")
    found = [str(path.relative_to(ROOT)) for path in files(kinds) if pattern.search(path.read_bytes())]
    assert found == []
