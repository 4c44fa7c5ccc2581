"""Watched folders: files listed in place, moved, changed, vanished and refused ones; and what is written on export."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from adapter_files import attention, lora, matrices, peft, write
from intarsia.app import library_folders, library_watch
from intarsia.app.library_entry import Scan
from intarsia.app.library_index import Index
from intarsia.app.settings import Home
from intarsia.app.shelf import Query, Shelf
from intarsia.pipelines.errors import AdapterError, InputError
from PIL import Image

SOME = dict(list(attention(matrices("sd15")).items())[::40])


def make(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, lora(SOME, peft, seed=seed))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Another studio's folder with two adapters, one of them below."""
    make(tmp_path / "lib/a.safetensors", 1)
    make(tmp_path / "lib/sub/b.safetensors", 2)
    return tmp_path / "lib"


def watched(home: Home, *folders: Path) -> Shelf:
    shelf = Shelf(home)
    for folder in folders:
        shelf.add_folder(folder)
    shelf.scan()
    return shelf


def names(shelf: Shelf, **wanted: str) -> list[str]:
    return [one.name for one in shelf.page(Query(sort="name", **wanted)).entries]  # type: ignore[arg-type]


def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Which files are inspected from now on."""
    real, seen = library_folders.check, list[Path]()

    def check(index: Index, path: Path) -> object:
        seen.append(path)
        return real(index, path)

    monkeypatch.setattr(library_folders, "check", check)
    return seen


def test_a_folder_is_listed_in_place_and_never_changed(home: Home, folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    shelf = Shelf(home)
    assert shelf.add_folder(folder) == [folder]
    told: list[tuple[int, int]] = []
    assert shelf.scan(lambda done, total: told.append((done, total))) == Scan(2, new=2)
    assert told == [(2, 2)] and names(shelf) == ["a", "b"]
    entry = shelf.find("b")
    assert (entry.path, entry.folder, entry.source) == (folder / "sub/b.safetensors", str(folder), f"lies in {folder}")
    assert names(shelf, folder=str(folder)) == ["a", "b"] and names(shelf, folder="") == []
    assert list(home.adapters.iterdir()) == []
    assert [(one.path, one.entries, one.refused, one.missing) for one in shelf.folders()] == [(folder, 2, 0, False)]
    assert shelf.add(folder / "a.safetensors") == shelf.find("a"), "importing what is listed in place copies nothing"
    shelf.remove("a")
    shelf.empty_trash()
    shelf.scan()
    assert names(shelf) == ["b"], "what was removed is not listed again"
    assert [one.message for one in shelf.refused()] == ["It was removed from the library."]
    shelf.add(folder / "a.safetensors")
    assert names(shelf, folder="") == ["a"]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_second_scan_opens_nothing(home: Home, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "oft.safetensors", {"lora_unet_x.oft_blocks": np.ones((2, 2), np.float32)})
    shelf = watched(home, folder)
    seen = reads(monkeypatch)
    assert shelf.scan() == Scan(3) and seen == []
    (bad,) = shelf.refused()
    assert bad.path == folder / "oft.safetensors" and "OFT" in bad.message and bad.hint
    assert shelf.folders()[0].refused == 1
    make(folder / "oft.safetensors", 3)
    assert shelf.scan() == Scan(3, new=1) and seen == [folder / "oft.safetensors"]
    assert shelf.refused() == [] and names(shelf) == ["a", "b", "oft"]


def test_moved_and_renamed_files_keep_their_cards(home: Home, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shelf = watched(home, folder, other)
    shelf.tag("a", ["ink"])
    shelf.note("b", "mine")
    (folder / "a.safetensors").rename(other / "renamed.safetensors")
    (folder / "sub").rename(folder / "deeper")
    assert shelf.scan() == Scan(2, moved=2)
    assert (shelf.find("a").path, shelf.find("a").tags) == (other / "renamed.safetensors", ("ink",))
    assert (shelf.find("b").path, shelf.find("b").notes) == (folder / "deeper/b.safetensors", "mine")
    assert names(shelf) == ["a", "b"]


def test_two_files_that_trade_their_names_keep_their_own_cards(home: Home, folder: Path, tmp_path: Path) -> None:
    shelf = watched(home, folder)
    shelf.tag("a", ["was a"])
    a, b, between = folder / "a.safetensors", folder / "sub/b.safetensors", tmp_path / "between"
    a.rename(between)
    b.rename(a)
    between.rename(b)
    for path in (a, b):
        os.utime(path)
    assert shelf.scan() == Scan(2, moved=2)
    assert (shelf.find("a").path, shelf.find("a").tags, shelf.find("b").path) == (b, ("was a",), a)


def test_a_file_that_changed_in_place_keeps_its_card_and_one_that_moved_on_leaves_the_place(
    home: Home, folder: Path
) -> None:
    shelf = watched(home, folder)
    shelf.tag("a", ["ink"])
    old = shelf.find("a")
    make(folder / "a.safetensors", 7)
    assert shelf.scan() == Scan(2, changed=1)
    assert shelf.find("a").sha256 != old.sha256 and shelf.find("a").tags == ("ink",)
    (folder / "a.safetensors").rename(folder / "z.safetensors")
    make(folder / "a.safetensors", 8)
    assert shelf.scan() == Scan(3, moved=1, new=1)
    assert (shelf.find("a").path.name, shelf.find("a").tags) == ("z.safetensors", ("ink",))
    assert shelf.find("a-2").path.name == "a.safetensors"


def test_vanished_files_are_missing_until_they_are_back(home: Home, folder: Path, tmp_path: Path) -> None:
    shelf = watched(home, folder)
    shutil.move(folder, tmp_path / "unplugged")
    assert shelf.scan() == Scan(0), "a drive that is not there says nothing about its files"
    assert shelf.folders()[0].missing
    with pytest.raises(AdapterError, match="file of a is gone"):
        shelf.find("a")
    shutil.move(tmp_path / "unplugged", folder)
    (folder / "a.safetensors").rename(tmp_path / "a")
    assert shelf.scan() == Scan(1, missing=1) and shelf.entries()[0].missing
    (tmp_path / "a").rename(folder / "back.safetensors")
    assert shelf.scan() == Scan(2, moved=1) and not shelf.find("a").missing


def test_a_second_copy_is_not_listed_and_takes_over_when_the_first_goes(home: Home, folder: Path) -> None:
    shelf = watched(home, folder)
    shelf.tag("a", ["ink"])
    shutil.copy(folder / "a.safetensors", folder / "copy.safetensors")
    assert shelf.scan() == Scan(3) and names(shelf) == ["a", "b"] and shelf.refused() == []
    (folder / "a.safetensors").unlink()
    assert shelf.scan() == Scan(2, moved=1)
    assert (shelf.find("a").path.name, shelf.find("a").tags) == ("copy.safetensors", ("ink",))


def test_copies_that_were_there_from_the_start_are_listed_once(
    home: Home, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):  # more than a batch
        shutil.copy(folder / "a.safetensors", folder / f"c{number}.safetensors")
    shelf = Shelf(home)
    shelf.add_folder(folder)
    assert shelf.scan() == Scan(22, new=2) and shelf.page(Query()).total == 2
    seen = reads(monkeypatch)
    assert shelf.scan() == Scan(22) and seen == [], "every copy is remembered"
    shelf.find("b").path.unlink()
    one = next(entry for entry in shelf.entries() if entry.name != "b")
    one.path.rename(folder / "y.safetensors")
    shutil.copy(folder / "y.safetensors", folder / "z.safetensors")
    assert shelf.scan() == Scan(22, moved=1, missing=1)
    assert not shelf.find(one.name).missing


def test_the_studios_own_folder_is_watched_the_same_way(home: Home, tmp_path: Path) -> None:
    shelf = Shelf(home)
    entry = shelf.add(make(tmp_path / "cat.safetensors"))
    shelf.tag("cat", ["ink"])
    make(home.adapters / "by hand.safetensors", 1)
    assert shelf.scan() == Scan(2, new=1) and names(shelf) == ["by-hand", "cat"]
    entry.path.rename(home.adapters / "tom.safetensors")
    assert shelf.scan() == Scan(2, moved=1)
    assert (shelf.find("cat").path.name, shelf.find("cat").tags) == ("tom.safetensors", ("ink",))
    shelf.remove("cat")
    assert shelf.scan() == Scan(2) and names(shelf) == ["by-hand"], "what lies in the trash stays there"


def test_scans_and_imports_at_the_same_time_list_everything_once(home: Home, tmp_path: Path) -> None:
    files = [make(tmp_path / f"in/a{number:02}.safetensors", number) for number in range(20)]
    failures: list[BaseException] = []
    over = threading.Event()

    def look() -> None:
        try:
            while not over.is_set():
                Shelf(home).scan()
        except BaseException as error:  # noqa: BLE001 - reported below
            failures.append(error)

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    states = [
        outcome.state for number in range(0, 20, 5) for outcome in Shelf(home).add_all(files[number : number + 5])
    ]
    over.set()
    for looker in lookers:
        looker.join()
    assert (states, failures) == (["added"] * 20, [])
    assert Shelf(home).scan() == Scan(20) and len(names(Shelf(home))) == 20


def test_a_new_file_at_the_place_of_one_in_the_trash_is_listed(home: Home, folder: Path) -> None:
    shelf = watched(home, folder)
    shelf.remove("a")
    make(folder / "a.safetensors", 9)
    shelf.scan()
    assert names(shelf) == ["a", "b"]


def test_a_folder_that_comes_back_brings_its_cards(home: Home, folder: Path, tmp_path: Path) -> None:
    shelf = watched(home, folder)
    shelf.tag("a", ["ink"])
    shelf.remove_folder(folder)
    assert names(shelf) == [] and (folder / "a.safetensors").is_file() and shelf.folders() == []
    shelf.add(make(tmp_path / "a.safetensors", 5))
    shelf.add_folder(folder)
    assert names(shelf) == ["a", "a-2", "b"] and shelf.find("a-2").tags == ("ink",)
    shelf.remove_folder(folder)
    assert shelf.add(folder / "sub/b.safetensors").folder == "", "imported, it is a copy of its own"
    with pytest.raises(InputError, match="is not watched"):
        shelf.remove_folder(folder)


def test_other_studios_folders_are_found_inside_theirs(home: Home, tmp_path: Path) -> None:
    root = tmp_path / "webui"
    make(root / "models/Lora/x.safetensors")
    make(root / "models/LyCORIS/y.safetensors", 1)
    make(root / "models/Stable-diffusion/model.safetensors", 2)
    make(root / "models/Lora/embeddings/e.safetensors", 3)
    mine = make(tmp_path / "mine/Lora/z.safetensors", 4).parent.parent
    make(mine / "loose.safetensors", 5)
    shelf = Shelf(home)
    assert {path.name for path in shelf.add_folder(root)} == {"Lora", "LyCORIS"}
    shelf.scan()
    assert names(shelf) == ["x", "y"]
    assert shelf.add_folder(mine) == [mine], "a person's own folder is taken as it is"
    shelf.scan()
    assert names(shelf) == ["loose", "x", "y", "z"]
    for overlapping in (root, root / "models/Lora", root / "models", home.root, home.adapters):
        with pytest.raises(InputError, match="watched already"):
            shelf.add_folder(overlapping)
    with pytest.raises(InputError, match="no folder"):
        shelf.add_folder(root / "none")


def test_links_that_go_in_circles_end(home: Home, folder: Path) -> None:
    (folder / "round").symlink_to(folder, target_is_directory=True)
    (folder / "sub" / "up").symlink_to(folder, target_is_directory=True)
    (folder / "broken.safetensors").symlink_to(folder / "nothing")
    shelf = watched(home, folder)
    assert names(shelf) == ["a", "b"]


def test_texts_and_pictures_put_beside_a_file_later_are_read(home: Home, folder: Path) -> None:
    shelf = watched(home, folder)
    shelf.note("b", "mine")
    (folder / "sub/b.json").write_text(json.dumps({"notes": "theirs", "activation text": "sumi"}))
    Image.new("RGB", (64, 64), "red").save(folder / "sub/b.preview.png")
    shelf.scan()
    entry = shelf.find("b")
    assert (entry.notes, entry.trigger) == ("mine", "sumi"), "what a person wrote here stays"
    assert entry.thumbnail is not None and entry.thumbnail.is_file()
    assert names(shelf, text="sumi") == ["b"]


def test_ten_thousand_unchanged_files_are_scanned_quickly(home: Home, tmp_path: Path) -> None:
    root = tmp_path / "many"
    for number in range(100):
        (root / f"{number:02}").mkdir(parents=True)
    for number in range(10_000):
        (root / f"{number % 100:02}" / f"n{number}.safetensors").touch()
    shelf = Shelf(home)
    shelf.add_folder(root)
    assert shelf.scan() == Scan(10_000, refused=10_000), "empty ones are refused, and remembered"
    began = time.perf_counter()
    assert shelf.scan() == Scan(10_000)
    assert time.perf_counter() - began < 2


def test_an_export_can_be_read_by_others_and_by_us(home: Home, tmp_path: Path) -> None:
    source = make(tmp_path / "cat.safetensors")
    Image.new("RGB", (64, 32), "red").save(tmp_path / "cat.png")
    shelf, out = Shelf(home), tmp_path / "out"
    shelf.add(source)
    shelf.tag("cat", ["ink", "wash"])
    shelf.note("cat", "my note")
    with pytest.raises(InputError, match="no folder"):
        shelf.export(["cat"], out)
    out.mkdir()
    assert shelf.export(["cat", "cat"], out) == [out / "cat.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == ["cat.json", "cat.preview.png", "cat.safetensors"]
    assert (out / "cat.safetensors").read_bytes() == source.read_bytes()
    told = json.loads((out / "cat.json").read_text())
    assert (told["notes"], told["sd version"], told["intarsia"]["tags"]) == ("my note", "SD1", ["ink", "wash"])
    with Image.open(out / "cat.preview.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (64, 32))
    there = Shelf(Home(tmp_path / "there"))
    again = there.add(out / "cat.safetensors")
    assert (again.tags, again.notes) == (("ink", "wash"), "my note") and again.thumbnail is not None


@pytest.mark.parametrize("ending", ["safetensors", "json", "preview.png"])
def test_an_export_overwrites_nothing(home: Home, tmp_path: Path, ending: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    shelf = Shelf(home)
    for number, name in enumerate("ab"):
        shelf.add(make(tmp_path / f"{name}.safetensors", number))
    (out / f"b.{ending}").write_text("theirs")
    with pytest.raises(InputError, match=f"b.{ending} is there already"):
        shelf.export(["a", "b"], out)
    assert [path.read_text() for path in out.iterdir()] == ["theirs"]
    with pytest.raises(AdapterError, match="no adapter called c"):
        shelf.export(["a", "c"], out)


def test_while_a_page_is_open_a_file_put_into_a_folder_is_noticed(
    home: Home, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_watch, "EVERY", 0.05)
    shelf = watched(home, folder)
    follower = library_watch.FolderWatch(shelf)
    follower.start()
    try:
        make(folder / "later.safetensors", 7)
        end = time.monotonic() + 30
        while not any(entry.name == "later" for entry in shelf.entries()):
            assert time.monotonic() < end, "it was never noticed"
            time.sleep(0.05)
    finally:
        begun = time.monotonic()
        follower.stop()
    assert time.monotonic() - begun < 5 and not any(thread.name == "library" for thread in threading.enumerate())


def test_a_scan_that_is_going_on_does_not_keep_a_page_from_closing(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch asks before every stretch of files whether it should leave."""
    asked = threading.Event()

    def endless(progress: Callable[[int, int], None]) -> None:
        while True:
            progress(1, 2)
            asked.set()
            time.sleep(0.01)

    shelf = Shelf(home)
    monkeypatch.setattr(shelf, "scan", endless)
    follower = library_watch.FolderWatch(shelf)
    follower.start()
    assert asked.wait(10)
    begun = time.monotonic()
    follower.stop()
    assert time.monotonic() - begun < 5
