"""The library's commands, from import to export, as people and machines read them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import attention, lora, matrices, peft, write
from intarsia.app.settings import Home

SOME = dict(list(attention(matrices("sd15")).items())[::40])
COMMANDS = ("list", "import", "edit", "remove", "restore", "trash", "scan", "export", "folder add", "folder refused")


def intarsia(*arguments: str | Path, code: int = 0) -> str:
    """Run `intarsia adapters ...`; gives stdout, or stderr where it fails."""
    command = [sys.executable, "-m", "intarsia.app", "adapters", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if code else done.stdout


def machine(*arguments: str | Path) -> Any:  # noqa: ANN401 - JSON
    return json.loads(intarsia(*arguments, "--json"))


def make(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, lora(SOME, peft, seed=seed))


def names(entries: list[dict[str, Any]]) -> list[str]:
    return [entry["name"] for entry in entries]


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom intarsia.app.cli import app\n"
        "for words in sys.argv[1:]:\n"
        "    app(['adapters', *words.split(), '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'diffusers', 'gradio', 'numpy', 'PIL'} & {name.partition('.')[0] for name in sys.modules}\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *COMMANDS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_folder_is_imported_file_by_file(home: Home, tmp_path: Path) -> None:
    make(tmp_path / "in/a.safetensors")
    make(tmp_path / "in/deep/b.safetensors", 1)
    write(tmp_path / "in/oft.safetensors", {"lora_unet_x.oft_blocks": np.ones((2, 2), np.float32)})
    said = intarsia("import", tmp_path / "in", code=2)
    assert "error: oft.safetensors is OFT" in said
    assert names(machine("list", "--sort", "name")) == ["a", "b"]
    (tmp_path / "in/oft.safetensors").unlink()
    assert [(one["state"], one["name"]) for one in machine("import", tmp_path / "in")] == [
        ("known", "a"),
        ("known", "b"),
    ]
    assert "about one" in intarsia("import", tmp_path / "in", "--name", "x", code=2)
    assert "no families" not in intarsia("import", tmp_path / "in/a.safetensors", "--family", "sd15")
    assert "cannot be for SDXL" in intarsia("import", make(tmp_path / "c.safetensors", 2), "--family", "sdxl", code=2)
    assert "cannot be for SDXL" in machine("inspect", tmp_path / "c.safetensors", "--family", "sdxl")["refusal"]


def test_cards_are_edited_found_thrown_away_and_taken_back(home: Home, tmp_path: Path) -> None:
    intarsia("import", make(tmp_path / "a.safetensors"), make(tmp_path / "b.safetensors", 1))
    changed = machine(
        *("edit", "a", "--tag", "ink", "--tag", "wash", "--note", "soft", "--licence", "CC0", "--favourite"),
        *("--trigger", "sumi", "--rename", "brush"),
    )
    assert {key: changed[key] for key in ("name", "tags", "notes", "licence", "favourite", "trigger")} == {
        "name": "brush", "tags": ["ink", "wash"], "notes": "soft", "licence": "CC0", "favourite": True,
        "trigger": "sumi",
    }  # fmt: skip
    for query in (("sum", "so"), ("--tag", "ink"), ("--favourite",), ("--sort", "size", "br")):
        assert names(machine("list", *query)) == ["brush"], query
    assert names(machine("list", "--limit", "1")) == ["b"] and "1 of 2" in intarsia("list", "--limit", "1")
    assert intarsia("list", "zebra") == "Nothing was found.\n"
    assert machine("edit", "brush", "--untag", "ink", "--no-favourite")["favourite"] is False
    assert intarsia("remove", "brush") == "Moved brush to the trash.\n"
    assert names(machine("list", "--trash")) == names(machine("trash")) == ["brush"]
    assert "restore brush" in intarsia("edit", "brush", "--note", "x", code=2)
    assert machine("restore", "brush")[0]["tags"] == ["wash"]
    machine("remove", "brush", "b")
    assert machine("trash", "--empty") == {"deleted": 2}
    assert list(home.adapters.iterdir()) == [] and intarsia("trash") == "The trash is empty.\n"


def test_folders_are_watched_scanned_and_left_out(home: Home, tmp_path: Path) -> None:
    folder = tmp_path / "lib"
    make(folder / "a.safetensors")
    added = machine("folder", "add", folder)
    assert (added["new"], added["folders"]) == (1, [str(folder)])
    make(folder / "b.safetensors", 1)
    write(folder / "oft.safetensors", {"lora_unet_x.oft_blocks": np.ones((2, 2), np.float32)})
    assert intarsia("scan") == "Looked at 3 files, 1 new, 1 refused.\n"
    (bad,) = machine("folder", "refused")
    assert bad["path"] == str(folder / "oft.safetensors") and "OFT" in bad["message"]
    (told,) = machine("folder", "list")
    assert (told["path"], told["entries"], told["refused"], told["missing"]) == (str(folder), 2, 1, False)
    assert str(folder) in intarsia("folder", "list")
    assert "stay where they are" in intarsia("folder", "remove", folder)
    assert machine("list") == [] and len(list(folder.iterdir())) == 3


def test_an_export_is_written_once(home: Home, tmp_path: Path) -> None:
    intarsia("import", make(tmp_path / "a.safetensors"))
    out = tmp_path / "out"
    out.mkdir()
    assert machine("export", "a", "--out", out) == {"files": [str(out / "a.safetensors")]}
    assert "nothing was written" in intarsia("export", "a", "--out", out, code=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("list", "--sort", "colour"), "newest, name, size"),
        (("edit", "nobody", "--note", "x"), "no adapter called nobody"),
        (("edit", "nobody", "--tag", " "), "1 to 40"),
        (("restore", "nobody"), "in the trash"),
        (("folder", "add", "/no/such/folder"), "/no/such/folder"),
        (("folder", "remove", "/no/such/folder"), "is not watched"),
        (("export", "nobody", "--out", "."), "no adapter called nobody"),
    ],
)
def test_a_persons_error_is_one_line_and_code_2(home: Home, arguments: tuple[str, ...], said: str) -> None:
    told = intarsia(*arguments, code=2)
    assert told.startswith("error: ") and said in told and len(told.splitlines()) <= 2
