"""Collections of pictures: captions, unsafe zips, buckets, crops, the order of batches."""

from __future__ import annotations

import random
import shutil
import stat
import zipfile
from pathlib import Path

import pytest
from intarsia.pipelines.errors import InputError, MemoryLimitError
from intarsia.pipelines.requests import TrainingPicture
from intarsia.training import data
from PIL import Image
from training_fakes import picture


def given(path: Path, caption: str = "") -> tuple[TrainingPicture, ...]:
    return (TrainingPicture(path=str(path), caption=caption),)


def packed(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as pack:
        for name, content in entries.items():
            pack.writestr(name, content)
    return path


def test_captions_come_from_the_text_beside_and_else_from_what_was_typed(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a", "b", "c"):
        picture(folder / f"{name}.png")
    (folder / "a.txt").write_text("\ufeff a red\n disc ", encoding="utf-8")
    (folder / "c.txt").write_text("")
    (folder / "notes.pdf").write_text("x")
    found = data.collect(given(folder, "typed"), tmp_path)
    assert [item.caption for item in found.pictures] == ["a red disc", "typed", ""]
    assert len(found.notes) == 1 and "notes.pdf" in found.notes[0]


def test_a_typed_caption_wins_for_a_single_picture(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("from the file")
    assert data.collect(given(path, "typed"), tmp_path).pictures[0].caption == "typed"
    assert data.collect(given(path), tmp_path).pictures[0].caption == "from the file"


@pytest.mark.parametrize("content", [b"\xff\xfe\x00\xd8", b"long " * 500])
def test_a_caption_that_is_no_text_or_too_long_is_named(tmp_path: Path, content: bytes) -> None:
    path = picture(tmp_path / "a.png")
    path.with_suffix(".txt").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.txt"):
        data.collect(given(path), tmp_path)


def test_nothing_there_and_nothing_in_it_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file or folder .*gone"):
        data.collect(given(tmp_path / "gone.png"), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no pictures in"):
        data.collect(given(tmp_path / "empty"), tmp_path)
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(InputError, match=r"bad\.zip is not a readable zip"):
        data.collect(given(tmp_path / "bad.zip"), tmp_path)


def test_a_zip_gives_its_pictures_with_captions(tmp_path: Path) -> None:
    content = picture(tmp_path / "a.png").read_bytes()
    entries = {"in/a.png": content, "in/a.txt": b"one", "b.png": content, "__MACOSX/._b.png": b"x", "x.exe": b"MZ"}
    found = data.collect(given(packed(tmp_path / "all.zip", entries)), tmp_path / "scratch")
    assert [(Path(item.path).name, item.caption) for item in found.pictures] == [("b.png", ""), ("a.png", "one")]
    assert not list((tmp_path / "scratch").rglob("*.exe"))
    assert not list((tmp_path / "scratch").glob(".unpack*"))


@pytest.mark.parametrize("name", ["../out.png", "/out.png", "in/../../out.png", "C:/out.png", "in\\..\\..\\out.png"])
def test_a_name_that_leads_out_of_the_zip_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    content = picture(tmp_path / "a.png").read_bytes()
    pack = packed(tmp_path / "bad.zip", {"fine.png": content, name: content})
    with pytest.raises(InputError, match=r"bad\.zip .*leads out"):
        data.collect(given(pack), tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists() and not (tmp_path / "out.png").exists()


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    pack = tmp_path / "link.zip"
    with zipfile.ZipFile(pack, "w") as file:
        link = zipfile.ZipInfo("a.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(link, "/etc/passwd")
    with pytest.raises(InputError, match="link"):
        data.collect(given(pack), tmp_path / "scratch")


def test_a_thousandfold_expansion_is_refused(tmp_path: Path) -> None:
    pack = packed(tmp_path / "bomb.zip", {"a.png": bytes(8 * 2**20)})
    with pytest.raises(InputError, match=r"bomb\.zip would unpack to 8 MB, \d{3,} times"):
        data.collect(given(pack), tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()


def test_too_many_files_and_a_full_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = picture(tmp_path / "a.png").read_bytes()
    pack = packed(tmp_path / "many.zip", {f"{number}.png": content for number in range(4)})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))  # pyright: ignore
    with pytest.raises(MemoryLimitError, match="0 MB are free"):
        data.collect(given(pack), tmp_path / "scratch")
    monkeypatch.setattr(data, "MAX_ZIP_ENTRIES", 3)
    with pytest.raises(InputError, match="4 files; 3 are allowed"):
        data.collect(given(pack), tmp_path / "scratch")


def test_a_damaged_entry_leaves_nothing_behind(tmp_path: Path) -> None:
    pack = packed(tmp_path / "torn.zip", {"a.png": random.Random(0).randbytes(5000)})
    content = bytearray(pack.read_bytes())
    content[2000] ^= 255
    pack.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        data.collect(given(pack), tmp_path / "scratch")
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("size", [(64, 64), (1000, 10), (640, 480), (300, 900), (4000, 3000), (33, 70)])
@pytest.mark.parametrize("resolution", [96, 256, 1024])
def test_buckets_keep_step_area_and_shape(size: tuple[int, int], resolution: int) -> None:
    wide, high = data.bucket(size, resolution, 32)
    assert wide % 32 == 0 == high % 32 and min(wide, high) >= 32 and wide * high <= resolution**2
    if resolution == 1024 and 0.25 < size[0] / size[1] < 4:
        assert wide / high == pytest.approx(size[0] / size[1], rel=0.05)
        assert wide * high > 0.8 * resolution**2


def test_a_square_picture_gets_the_whole_square() -> None:
    assert data.bucket((777, 777), 256, 32) == (256, 256)


def test_small_pictures_are_not_enlarged_when_that_is_off() -> None:
    assert data.bucket((100, 70), 256, 32, enlarge=False) == (96, 64)
    assert data.fit((100, 70), (96, 64)).enlarged == 1
    with pytest.raises(InputError, match="30x90 pixels is too small"):
        data.bucket((30, 90), 256, 32, enlarge=False)


def test_size_ids_are_true() -> None:
    shrunk = data.fit((1000, 500), (256, 128))
    assert shrunk.time_ids == (128, 256, 0, 0, 128, 256)
    cropped = data.fit((600, 500), (256, 256))
    assert (cropped.resized, cropped.crop) == ((307, 256), (25, 0))
    assert cropped.time_ids == (256, 307, 0, 25, 256, 256)
    enlarged = data.fit((128, 64), (256, 128))
    assert enlarged.time_ids == (64, 128, 0, 0, 128, 256), "an enlarged picture says how small it was"


def test_the_crop_shows_the_planned_part() -> None:
    image = Image.new("RGB", (40, 20))
    image.putpixel((25, 10), (255, 0, 0))
    part = data.apply(image, data.Fit((40, 20), (20, 4), (16, 16), (40, 20)))
    assert part.size == (16, 16) and part.getpixel((5, 6)) == (255, 0, 0)


def test_random_crops_stay_inside_and_differ() -> None:
    crops = {data.fit((200, 64), (64, 64), random.Random(seed)).crop for seed in range(50)}
    assert len(crops) > 20 and all(0 <= left <= 136 and top == 0 for left, top in crops)


def test_every_epoch_shows_each_picture_once_in_batches_of_one_size() -> None:
    sizes = [(64, 64)] * 5 + [(96, 32)] * 3
    orders: list[list[int]] = []
    for epoch in range(2):
        made = [data.batches(sizes, 2, seed=1, step=epoch * 5 + step) for step in range(5)]
        assert all(len({sizes[index] for index in batch}) == 1 for batch in made)
        orders.append([index for batch in made for index in batch])
        assert sorted(orders[-1]) == list(range(8))
    assert orders[0] != orders[1]
    assert data.batches(sizes, 2, seed=1, step=7) == data.batches(sizes, 2, seed=1, step=7)
