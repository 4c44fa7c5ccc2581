"""Importing many files: each on its own, a batch a transaction, nothing half-written; and the family a person says."""

from __future__ import annotations

import errno
import json
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from adapter_files import attention, kohya, lora, matrices, peft, write
from intarsia.app import library_import
from intarsia.app.library_import import BATCH
from intarsia.app.settings import Home
from intarsia.app.shelf import Shelf
from intarsia.app.studio import Studio
from intarsia.pipelines.errors import AdapterError, InputError, MemoryLimitError
from PIL import Image

SOME = dict(list(attention(matrices("sd15")).items())[::40])
TEXT = {path: shape for path, shape in matrices("sd15").items() if path.startswith("text_encoder.")}
BOTH = dict(list(attention(TEXT, "text_encoder", ("q_proj", "k_proj")).items())[:6])  # in SD 1.5 and in SDXL


def make(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, lora(SOME, peft, seed=seed))


def refused(path: Path) -> Path:
    return write(path, {"lora_unet_x.oft_blocks": np.ones((2, 2), np.float32)})


def left(home: Home) -> list[str]:
    return sorted(path.name for path in home.adapters.iterdir())


def test_folders_are_walked_and_a_refused_file_keeps_no_other_out(home: Home, tmp_path: Path) -> None:
    root = tmp_path / "many"
    good = [make(root / f"sub{n % 3}/a{n}.safetensors", n) for n in range(BATCH + 3)]
    bad = refused(root / "sub0" / "oft.safetensors")
    pickle = tmp_path / "old.ckpt"
    pickle.write_bytes(b"\x80\x02}q\x00.")
    (root / "notes.txt").write_text("not an adapter")
    make(root / ".hidden.safetensors", 99)
    outcomes = list(Shelf(home).add_all([root, pickle, good[0], tmp_path / "nowhere.safetensors"]))
    told = {one.path: one for one in outcomes}
    assert {path for path, one in told.items() if one.state == "refused"} == {
        bad, pickle, tmp_path / "nowhere.safetensors"
    }  # fmt: skip
    assert "OFT" in str(told[bad].error) and "could run code" in str(told[pickle].error)
    assert [one.state for one in outcomes if one.path == good[0]] == ["added", "known"]
    assert len(Shelf(home).entries()) == len(good) == len(left(home))


def test_an_unreadable_file_is_refused_in_words(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path) -> Any:  # noqa: ANN401
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("intarsia.app.library_checks.inspect", closed)
    (outcome,) = Shelf(home).add_all([make(tmp_path / "a.safetensors")])
    assert "cannot be read: Permission denied" in str(outcome.error)


def test_what_was_told_before_the_disk_filled_up_is_listed_and_nothing_else_is_left(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(BATCH + 2):
        make(tmp_path / f"many/a{number:02}.safetensors", number)
    outcomes = Shelf(home).add_all([tmp_path / "many"])
    first = [next(outcomes) for _ in range(BATCH)]

    class Full:
        def update(self, part: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(library_import, "hashlib", SimpleNamespace(sha256=Full))
    with pytest.raises(MemoryLimitError, match="disk is full"):
        next(outcomes)
    assert [one.entry for one in first] == Shelf(home).entries()
    assert len(left(home)) == BATCH


def test_a_batch_that_cannot_be_listed_leaves_no_files(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Iterator[None]:
        raise RuntimeError("a bug while the second file is listed")

    for number in range(3):
        make(tmp_path / f"many/a{number}.safetensors", number)
    real, calls = library_import.describe, iter(range(9))

    def describe(*given: Any) -> object:  # noqa: ANN401
        return real(*given) if next(calls) == 0 else broken()

    monkeypatch.setattr(library_import, "describe", describe)
    with pytest.raises(RuntimeError):
        list(Shelf(home).add_all([tmp_path / "many"]))
    assert (Shelf(home).entries(), left(home)) == ([], [])


def test_a_file_that_changes_while_it_is_copied_is_refused(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = make(tmp_path / "a.safetensors"), library_import.check

    def check(*given: Any) -> object:  # noqa: ANN401
        checked = real(*given)
        make(path, seed=1)
        return checked

    monkeypatch.setattr(library_import, "check", check)
    (outcome,) = Shelf(home).add_all([path])
    assert "changed while it was copied" in str(outcome.error) and left(home) == []


def test_a_long_file_name_is_cut_and_a_strange_one_gets_a_name(home: Home, tmp_path: Path) -> None:
    paths = [make(tmp_path / f"{'x' * 120}.safetensors"), make(tmp_path / "---.safetensors", 1)]
    names = [one.entry.name for one in Shelf(home).add_all(paths) if one.entry]
    assert names == ["x" * 80, "adapter"]


def test_texts_and_picture_beside_a_file_come_along(home: Home, tmp_path: Path) -> None:
    path = make(tmp_path / "My v1.5.safetensors")
    Image.new("RGB", (900, 300), "teal").save(tmp_path / "My v1.5.preview.png")
    user = {"activation text": "ink wash", "preferred weight": 0.7, "notes": "mine", "description": "soft"}
    (tmp_path / "My v1.5.json").write_text(json.dumps(user))
    info = {"baseModel": "SD 1.5", "trainedWords": ["sumi", 3, "x" * 999], "model": {"name": "Ink\x1b[0m"}}
    (tmp_path / "My v1.5.civitai.info").write_text(json.dumps(info))
    made = Shelf(home).add(path)
    assert (made.trigger, made.weight, made.notes, made.description) == ("ink wash", 0.7, "mine", "soft")
    assert (made.base, made.title, made.triggers) == ("SD 1.5", "Ink[0m", ("sumi", "x" * 300))
    assert made.thumbnail is not None
    with Image.open(made.thumbnail) as picture:
        assert (picture.format, picture.size) == ("WEBP", (512, 171))


@pytest.mark.parametrize(
    "text", ["", "[1, 2]", '{"notes": 3, "preferred weight": "1", "intarsia": []}', "[" * 100_000, "\xff", " " * 2**21]
)
def test_strange_texts_beside_a_file_say_nothing(home: Home, tmp_path: Path, text: str) -> None:
    path = make(tmp_path / "a.safetensors")
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    (tmp_path / "a.civitai.info").write_bytes(text.encode("latin-1"))
    (tmp_path / "a.preview.png").write_bytes(b"no picture")
    made = Shelf(home).add(path)
    assert (made.notes, made.weight, made.trigger, made.thumbnail) == ("", None, "", None)


def test_the_studio_brings_the_halves_of_a_b_lora_along(home: Home, tmp_path: Path) -> None:
    blocks = {p: s for p, s in attention(matrices("sdxl")).items() if ".up_blocks.0.attentions." in p}
    both = {p: s for p, s in blocks.items() if ".attentions.2" not in p}
    write(tmp_path / "cat.safetensors", lora(both, kohya, rank=1))
    refused(tmp_path / "bad.safetensors")
    with Studio(home) as studio:
        assert [one.state for one in studio.import_adapters([tmp_path])] == ["refused", "added"]
        assert [one.name for one in studio.shelf.entries()] == ["cat", "cat-content", "cat-style"]


def test_jobs_and_uploads_are_named_as_the_source(home: Home) -> None:
    made = Shelf(home).add(make(home.job("250101-120000-abcdef") / "cat.safetensors"))
    assert made.source == "made by job 250101-120000-abcdef"
    dropped = Shelf(home).add(make(home.uploads / "3f2a" / "dog.safetensors", 1))
    assert dropped.source == "imported from dog.safetensors"


def test_inspecting_a_large_file_takes_a_fraction_of_its_size(home: Home, tmp_path: Path) -> None:
    path, size = tmp_path / "large.safetensors", 0
    table: dict[str, Any] = {}
    for name, shape in SOME.items():
        for key, dims in ((f"{name}.lora_A.weight", (256, shape[1])), (f"{name}.lora_B.weight", (shape[0], 256))):
            length = 2 * dims[0] * dims[1]
            table[key] = {"dtype": "F16", "shape": dims, "data_offsets": [size, size + length]}
            size += length
    raw = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + np.full(size // 2, 0.5, np.float16).tobytes())
    Shelf(home).inspect(make(tmp_path / "warm.safetensors"))  # what is made once, such as the lists of layers
    tracemalloc.start()
    try:
        Shelf(home).inspect(path)
        assert tracemalloc.get_traced_memory()[1] < 1.2 * size
    finally:
        tracemalloc.stop()


def both(path: Path, seed: int = 0) -> Path:
    return write(path, lora(BOTH, lambda p: kohya(p, "lora_te_"), seed=seed))


def test_a_family_that_a_person_says_is_remembered_for_the_same_tensors(home: Home, tmp_path: Path) -> None:
    shelf, path = Shelf(home), both(tmp_path / "a.safetensors")
    guessed = shelf.inspect(path)
    assert guessed.confidence != "certain"
    other = "sdxl" if guessed.family == "sd15" else "sd15"
    assert (shelf.inspect(path, other).family, shelf.inspect(path).family) == (other, guessed.family)
    entry = shelf.add(path)
    assert (entry.family, entry.confidence) == (guessed.family, guessed.confidence)
    decided = shelf.decide("a", other)
    assert (decided.family, shelf.find("a").family, shelf.find("a").confidence) == (other, other, "certain")
    assert not any("may be for" in text for text in shelf.find("a").warnings)
    shelf.remove("a")
    shelf.empty_trash()
    again = write(tmp_path / "b.safetensors", lora(BOTH, lambda p: kohya(p, "lora_te_")), {"other": "texts"})
    assert Shelf(home).add(again).family == other


def test_a_family_that_contradicts_the_shapes_is_refused(home: Home, tmp_path: Path) -> None:
    shelf, path = Shelf(home), make(tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=r"a\.safetensors cannot be for SDXL: 2 of 4 layers fit, first no module"):
        shelf.decide(path, "sdxl")
    with pytest.raises(AdapterError, match=r"cannot be for FLUX\.1: 0 of"):
        shelf.decide(path, "flux1")
    with pytest.raises(InputError, match="no family 'sd9'"):
        shelf.decide(path, "sd9")
    with pytest.raises(AdapterError, match="OFT"):
        shelf.decide(refused(tmp_path / "b.safetensors"), "sdxl")
    assert shelf.add(path).family == "sd15" and shelf.decide("a", "sd15").family == "sd15"
