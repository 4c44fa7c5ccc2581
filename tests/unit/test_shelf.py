"""The library: import, names, duplicates, lost files, full disks, two processes."""

from __future__ import annotations

import base64
import errno
import io
import shutil
import sqlite3
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from adapter_files import Arrays, attention, kohya, lora, matrices, peft, write
from intarsia.app import library_import, library_index
from intarsia.app import shelf as shelf_module
from intarsia.app.settings import Home
from intarsia.app.shelf import Shelf, make_slug
from intarsia.app.studio import Studio
from intarsia.pipelines.errors import AdapterError, InputError, MemoryLimitError
from PIL import Image

SD15 = matrices("sd15")
SOME = dict(list(attention(SD15).items())[::20])
B_LORA = attention({p: s for p, s in matrices("sdxl").items() if ".up_blocks.0.attentions." in p})


def make(path: Path, seed: int = 0, metadata: dict[str, str] | None = None, tensors: Arrays | None = None) -> Path:
    return write(path, tensors or lora(SOME, peft, seed=seed), metadata)


def files(home: Home) -> list[str]:
    return sorted(path.name for path in home.adapters.iterdir())


def test_an_import_copies_the_file_and_lists_it(home: Home, tmp_path: Path) -> None:
    source = make(tmp_path / "My cat v1.5.safetensors", metadata={"intarsia.trigger": "a [c]", "intarsia.base": "mini"})
    entry = Shelf(home).add(source)
    assert (entry.name, entry.family, entry.rank, entry.trigger, entry.base) == (
        "My-cat-v1-5",
        "sd15",
        2,
        "a [c]",
        "mini",
    )
    assert (entry.modules, entry.matched, entry.missing) == (len(SOME), len(SOME), False)
    assert entry.path.read_bytes() == source.read_bytes()
    source.unlink()
    assert Shelf(home).entries() == [entry]
    assert Shelf(home).find("my-CAT-v1-5") == entry


def test_an_adapter_that_comes_along_enters_the_library_when_it_is_asked_for(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapters").mkdir()
    source = make(tmp_path / "adapters" / "fast.safetensors")
    monkeypatch.setattr(shelf_module, "files", lambda package: tmp_path)  # type: ignore[misc]
    entry = Shelf(home).find("fast")
    assert entry.path.read_bytes() == source.read_bytes() and Shelf(home).entries() == [entry]
    with pytest.raises(AdapterError):
        Shelf(home).find("adapters/fast")


def test_the_same_file_twice_is_one_entry(home: Home, tmp_path: Path) -> None:
    shelf = Shelf(home)
    first = shelf.add(make(tmp_path / "a.safetensors"))
    assert shelf.add(make(tmp_path / "a copy (1).safetensors")) == first
    assert len(shelf.entries()) == len(files(home)) == 1


def test_a_taken_name_is_an_error_a_replacement_or_a_number(home: Home, tmp_path: Path) -> None:
    shelf = Shelf(home)
    old = shelf.add(make(tmp_path / "a.safetensors"), "cat")
    other = make(tmp_path / "b.safetensors", seed=1)
    with pytest.raises(InputError) as caught:
        shelf.add(other, "Cat")
    assert "cat-2" in caught.value.hint.lower()
    numbered = shelf.add(other, "cat", numbered=True)
    assert numbered.name == "cat-2"
    new = shelf.add(make(tmp_path / "c.safetensors", seed=2), "cat", replace=True)
    assert new.sha256 != old.sha256
    assert {entry.name: entry.sha256 for entry in shelf.entries()} == {"cat": new.sha256, "cat-2": numbered.sha256}


def test_refused_files_leave_nothing_behind(home: Home, tmp_path: Path) -> None:
    tensors = {"lora_unet_x.oft_blocks": np.ones((2, 2), np.float32)}
    with pytest.raises(AdapterError, match="OFT"):
        Shelf(home).add(make(tmp_path / "a.safetensors", tensors=tensors))
    assert Shelf(home).entries() == []
    assert files(home) == []


def test_find_takes_names_and_paths_and_offers_near_names(home: Home, tmp_path: Path) -> None:
    shelf = Shelf(home)
    shelf.add(make(tmp_path / "watercolour.safetensors"))
    loose = make(tmp_path / "loose.safetensors", seed=3)
    assert shelf.find(loose).path == loose
    assert len(shelf.entries()) == 1
    with pytest.raises(AdapterError) as caught:
        shelf.find("watercolor")
    assert caught.value.hint == "Did you mean watercolour?"
    with pytest.raises(AdapterError, match="no adapter file"):
        shelf.find(tmp_path / "nowhere.safetensors")
    with pytest.raises(AdapterError, match="library is empty"):
        Shelf(Home(tmp_path / "other")).find("x")


def test_removing_moves_to_the_trash_and_emptying_it_deletes_the_copy_not_the_original(
    home: Home, tmp_path: Path
) -> None:
    shelf, source = Shelf(home), make(tmp_path / "a.safetensors")
    shelf.add(source)
    shelf.remove("a")
    assert (shelf.entries(), files(home)) == ([], ["a.safetensors"])
    with pytest.raises(AdapterError, match="no adapter called a") as caught:
        shelf.remove("a")
    assert "trash" in caught.value.hint
    assert shelf.empty_trash() == 1
    assert (files(home), source.is_file(), shelf.empty_trash()) == ([], True, 0)


def test_a_file_that_vanished_is_said_and_can_come_back(home: Home, tmp_path: Path) -> None:
    shelf, source = Shelf(home), make(tmp_path / "a.safetensors")
    shelf.add(source).path.unlink()
    assert shelf.entries()[0].missing
    with pytest.raises(AdapterError, match="file of a is gone"):
        shelf.find("a")
    shelf.add(source)
    assert not shelf.find("a").missing
    shelf.entries()[0].path.unlink()
    shelf.remove("a")
    assert shelf.entries() == []


def test_a_moved_home_keeps_its_library(home: Home, tmp_path: Path) -> None:
    entry = Shelf(home).add(make(tmp_path / "a.safetensors"))
    moved = Home(tmp_path / "moved")
    shutil.move(home.root, moved.root)
    assert Shelf(moved).find("a").path == moved.adapters / entry.path.name


def test_a_full_disk_leaves_nothing_half_written(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        """The disk fills up while the first part of the copy is written."""

        def update(self, part: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(library_import, "hashlib", SimpleNamespace(sha256=Full))
    with pytest.raises(MemoryLimitError, match="disk is full"):
        Shelf(home).add(make(tmp_path / "a.safetensors"))
    assert (files(home), Shelf(home).entries()) == ([], [])


def test_a_full_database_is_the_same_error(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> str:  # noqa: ANN401
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(library_index.json, "dumps", full)
    with pytest.raises(MemoryLimitError, match="disk is full"):
        Shelf(home).add(make(tmp_path / "a.safetensors"))
    assert files(home) == []


def test_a_b_lora_with_both_halves_is_split(home: Home, tmp_path: Path) -> None:
    both = {p: s for p, s in B_LORA.items() if ".attentions.2" not in p}
    shelf = Shelf(home)
    entry = shelf.add(make(tmp_path / "cat.safetensors", tensors=lora(both, kohya, rank=1, alpha=1)))
    assert (entry.modules, entry.halves, entry.role) == (160, ("content", "style"), "concept")
    content, style = shelf.split("cat")
    assert [(e.name, e.role, e.modules, e.group) for e in (content, style)] == [
        ("cat-content", "content", 80, "cat"),
        ("cat-style", "style", 80, "cat"),
    ]
    assert files(home) == ["cat-content.safetensors", "cat-style.safetensors", "cat.safetensors"]
    with pytest.raises(AdapterError, match="does not hold"):
        shelf.split("cat-style")


def test_the_studio_numbers_files_of_one_name_and_brings_both_halves_of_a_b_lora(home: Home, tmp_path: Path) -> None:
    both = {p: s for p, s in B_LORA.items() if ".attentions.2" not in p}
    with Studio(home) as studio:
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            file = make(tmp_path / folder / "pytorch_lora_weights.safetensors", seed=ord(folder))
            studio.import_adapter(file)
        whole = make(tmp_path / "cat.safetensors", tensors=lora(both, kohya, rank=1, alpha=1))
        studio.import_adapter(whole)
        studio.import_adapter(whole)  # again: nothing is added twice
        names = [entry.name for entry in studio.shelf.entries()]
        assert names == [
            "pytorch_lora_weights", "pytorch_lora_weights-2", "cat", "cat-content", "cat-style"
        ]  # fmt: skip
        with pytest.raises(InputError, match="already has"):
            studio.import_adapter(make(tmp_path / "c.safetensors", seed=9), name="cat")


def thumbnail(kind: str = "png", size: tuple[int, int] = (900, 300)) -> str:
    raw = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(raw, format=kind)
    return f"data:image/{kind};base64,{base64.b64encode(raw.getvalue()).decode()}"


def test_thumbnails_are_re_encoded_small(home: Home, tmp_path: Path) -> None:
    inside = Shelf(home).add(make(tmp_path / "a.safetensors", metadata={"modelspec.thumbnail": thumbnail()}))
    assert inside.thumbnail is not None
    with Image.open(inside.thumbnail) as picture:
        assert (picture.format, picture.width) == ("WEBP", 512)
    own = tmp_path / "own.png"
    Image.new("RGB", (64, 64)).save(own)
    given = Shelf(home).add(make(tmp_path / "b.safetensors", seed=1), thumbnail=own)
    assert given.thumbnail is not None
    Shelf(home).remove("a")
    assert inside.thumbnail.exists()
    Shelf(home).empty_trash()
    assert not inside.thumbnail.exists() and given.thumbnail.exists()


@pytest.mark.parametrize(
    "text", ["data:image/svg+xml;base64,AAAA", "data:image/png;base64,AAAA", "http://x/y.png", "x" * 3_000_000]
)
def test_other_thumbnails_are_left_out(home: Home, tmp_path: Path, text: str) -> None:
    assert Shelf(home).add(make(tmp_path / "a.safetensors", metadata={"modelspec.thumbnail": text})).thumbnail is None


@pytest.mark.parametrize(
    ("text", "slug"),
    [("../../evil", "evil"), ("a.b:c", "a-b-c"), ("  Über cat_1 ", "Über-cat_1"), ("<b>x</b>", "b-x-b")],
)
def test_names_become_safe(text: str, slug: str) -> None:
    assert make_slug(text) == slug


@pytest.mark.parametrize("text", ["", "...", "x" * 81])
def test_impossible_names_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        make_slug(text)


def test_inspect_reports_unusable_files_too(home: Home, tmp_path: Path) -> None:
    shelf = Shelf(home)
    bad = make(tmp_path / "a.safetensors", tensors={"lora_unet_x.oft_blocks": np.ones((2, 2), np.float32)})
    assert shelf.inspect(bad).algorithm == "oft"
    shelf.add(make(tmp_path / "b.safetensors"))
    assert shelf.inspect("b").matched == len(SOME)


def test_imports_at_the_same_time_all_arrive(home: Home, tmp_path: Path) -> None:
    sources = [make(tmp_path / f"a{n}.safetensors", seed=n) for n in range(8)]
    failures: list[BaseException] = []

    def work(source: Path) -> None:
        try:
            Shelf(home).add(source)
        except BaseException as error:  # noqa: BLE001 - reported below
            failures.append(error)

    threads = [threading.Thread(target=work, args=(source,)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(Shelf(home).entries()) == 8
