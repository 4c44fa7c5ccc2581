"""Bad files at every door: refused in one clear sentence with a way out, nothing in the library changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from adapter_files import lora, peft
from bad_files import BROKEN, CONTAINERS, FOREIGN, OTHERS, Bad, command
from hostile_files import SOME, save
from intarsia.app import library_checks
from intarsia.app.settings import Home
from intarsia.app.studio import Studio
from intarsia.pipelines import headers, identify
from intarsia.pipelines.errors import AdapterError, IntarsiaError
from intarsia.pipelines.headers import Header, read_header
from intarsia.pipelines.identify import Report, inspect

BAD = CONTAINERS | OTHERS | FOREIGN | BROKEN


@pytest.fixture(autouse=True)
def no_mini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found must not depend on which weights Mini has today."""
    monkeypatch.setattr(identify, "mini_folder", lambda: tmp_path / "no mini")


def contents(home: Home) -> tuple[list[str], list[str]]:
    """Names in the library, and what lies in its folder."""
    with Studio(home) as studio:
        names = [entry.name for entry in studio.shelf.entries()]
    return names, sorted(path.name for path in home.adapters.iterdir()) if home.adapters.is_dir() else []


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_with_a_sentence_and_a_way_out(
    name: str, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad: Bad = BAD[name]
    (tmp_path / "given").mkdir()
    path = bad.build(tmp_path / "given")
    with Studio(home) as studio, pytest.raises(AdapterError) as caught:
        studio.import_adapter(path)
    error = caught.value
    for word in bad.words:
        assert word in error.message
    assert error.message.endswith(".") and error.message.count("\n") == 0 and len(error.message) < 600
    assert error.hint and bad.hint in error.hint
    assert command(monkeypatch, "adapters", "import", path) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told and told.count("error: ") == 1
    for word in bad.words:
        assert word in told
    assert contents(home) == ([], [])


def sound(path: Path, seed: int = 0) -> Path:
    return save(path, lora(SOME, peft, seed=seed))


def test_a_bad_file_among_good_ones_leaves_the_library_as_it_was(home: Home, tmp_path: Path) -> None:
    with Studio(home) as studio:
        studio.import_adapter(sound(tmp_path / "cat.safetensors"))
        before = contents(home)
        (tmp_path / "given").mkdir()
        with pytest.raises(AdapterError):
            studio.import_adapter(BROKEN["float8"].build(tmp_path / "given"))
        assert contents(home) == before == (["cat"], before[1])


def test_a_folder_is_told_from_a_file(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is a folder, not a file") as caught:
        inspect(tmp_path)
    assert "that is in it" in caught.value.hint


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="a device or a pipe"):
        inspect(tmp_path / "a.safetensors")


def test_a_zero_byte_in_a_path_names_no_file() -> None:
    with pytest.raises(AdapterError, match="There is no file"):
        inspect(Path("a\x00b.safetensors"))


def test_a_file_that_may_not_be_read_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sound(tmp_path / "a.safetensors")

    def forbidden(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(headers.Path, "open", forbidden)  # root may read everything
    with pytest.raises(AdapterError, match=r"a\.safetensors may not be read") as caught:
        inspect(path)
    assert "permissions" in caught.value.hint


def vanish(path: Path) -> None:
    path.unlink()


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [(vanish, "There is no file"), (grow, "changed while it was read"), (shrink, "changed while it was read")],
)
def test_a_file_that_changes_while_it_is_read_is_refused(
    change: Callable[[Path], None], words: str, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sound(tmp_path / "a.safetensors")

    def read(path: Path) -> Header:
        header = read_header(path)
        change(path)
        return header

    monkeypatch.setattr(identify, "read_header", read)
    with Studio(home) as studio, pytest.raises(IntarsiaError, match=words):
        studio.import_adapter(path)
    assert contents(home) == ([], [])


def test_a_file_that_becomes_shorter_between_two_readings_is_refused(tmp_path: Path) -> None:
    path = sound(tmp_path / "a.safetensors")
    header = read_header(path)
    last = max(header.tensors, key=lambda name: header.tensors[name].end)
    shrink(path)
    with pytest.raises(AdapterError, match="became shorter"):
        header.values(last)


def test_an_adapter_of_zeros_is_taken_with_a_warning(home: Home, tmp_path: Path) -> None:
    zero = {name: np.zeros_like(value) for name, value in lora(SOME, peft).items()}
    with Studio(home) as studio:
        entry = studio.import_adapter(save(tmp_path / "a.safetensors", zero))
    assert any("does nothing" in warning for warning in entry.warnings)


def test_the_same_file_twice_is_one_entry_and_another_of_its_name_gets_a_number(home: Home, tmp_path: Path) -> None:
    with Studio(home) as studio:
        first = studio.import_adapter(sound(tmp_path / "cat.safetensors"))
        assert studio.import_adapter(tmp_path / "cat.safetensors") == first
        second = studio.import_adapter(sound(tmp_path / "cat.safetensors", seed=1))
        assert (first.name, second.name) == ("cat", "cat-2")
        assert first.path.read_bytes() != second.path.read_bytes()


@pytest.mark.parametrize(
    "name", ["x" * 200, "..\\..\\evil", "..", "CON", "\x1b[2J", "a\nb", "<script>", "é" * 100, "-rf", "a\u202eb"]
)
def test_a_files_own_name_never_leads_out_of_the_library(name: str, home: Home, tmp_path: Path) -> None:
    path = sound(tmp_path / f"{name}.safetensors")
    with Studio(home) as studio:
        try:
            entry = studio.import_adapter(path)
        except IntarsiaError as error:  # nothing in it can be a name
            assert error.message.isprintable() and error.hint
            return
    assert entry.path.parent == home.adapters and entry.path.is_file()
    assert entry.name.isprintable() and not set(entry.name) & set("/\\.:<>\x1b\n")
    assert len(entry.path.name.encode()) < 255


def test_a_name_that_is_no_text_is_taken(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / os.fsdecode(b"\xff\xfe cat.safetensors")
    try:
        sound(path)
    except OSError:
        pytest.skip("this file system keeps text names alone")
    assert command(monkeypatch, "adapters", "import", path) == 0
    assert contents(home)[0] == ["cat"]
    new = tmp_path / "new.safetensors"
    assert command(monkeypatch, "adapters", "convert", path, "--to", "kohya", "--out", new) == 2  # safetensors' limit
    assert command(monkeypatch, "adapters", "inspect", path) == 0
    path.write_bytes(b"")
    assert command(monkeypatch, "adapters", "import", path) == 2


def test_a_name_cannot_steer_the_terminal(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sound(tmp_path / "a\x1b[2Jb.safetensors")
    assert command(monkeypatch, "adapters", "inspect", path) == 0
    path.write_bytes(b"")
    assert command(monkeypatch, "adapters", "inspect", path) == 2
    told = capsys.readouterr()
    assert "\x1b" not in told.out + told.err and "a\N{REPLACEMENT CHARACTER}[2Jb" in told.err


def test_a_file_that_vanishes_before_it_is_copied_keeps_no_other_out(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, stays = sound(tmp_path / "gone.safetensors"), sound(tmp_path / "stays.safetensors", seed=1)

    def look(path: Path) -> Report:
        report = inspect(path)
        if path == gone:
            path.unlink()
        return report

    monkeypatch.setattr(library_checks, "inspect", look)
    with Studio(home) as studio:
        outcomes = list(studio.import_adapters([gone, stays]))
    assert [outcome.state for outcome in outcomes] == ["refused", "added"]
    assert contents(home)[0] == ["stays"]


def test_titles_are_texts_and_no_paths(home: Home, tmp_path: Path) -> None:
    keys = ("modelspec.title", "intarsia.base", "ss_output_name", "ss_sd_model_name")
    texts: dict[str, str] = dict.fromkeys(keys, "../../../x")
    with Studio(home) as studio:
        entry = studio.import_adapter(save(tmp_path / "cat.safetensors", lora(SOME, peft), texts))
    assert (entry.name, entry.path.parent) == ("cat", home.adapters)
    assert not (home.root.parent / "x").exists()
