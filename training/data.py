"""Pictures to learn from: folders, lists and zips, their captions, and the size each picture trains at. No torch."""

from __future__ import annotations

import math
import os
import random
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ..pipelines.errors import InputError, MemoryLimitError
from ..pipelines.requests import TrainingPicture

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_PICTURES = 5000
MAX_ZIP_ENTRIES = 10_000
MAX_UNPACKED = 8 * 2**30  # bytes
MAX_RATIO = 100  # pictures hardly shrink in a zip; a file that grows more than this is made to fill the disk
RATIO_FREE = 2**20  # bytes below which the ratio does not matter
MAX_CAPTION = 2000  # characters
FLATTEST = 4  # sides of a bucket differ by this factor at most, unless the picture's own do not fit otherwise


@dataclass(frozen=True)
class Collected:
    """Pictures with their captions, and what was left out.

    Args:
        pictures: Files that exist; captions as typed, or from the .txt file beside the picture.
        notes: Sentences for the person, such as which files were skipped.
    """

    pictures: tuple[TrainingPicture, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fit:
    """How a picture becomes its training size; all sizes are (width, height) in pixels.

    Args:
        resized: Size after scaling, covering `size`.
        crop: Left and top of the part that is kept, in the scaled picture.
        size: What is trained on; both sides are multiples of the model's step.
        original: Size the model is told the picture had: its own if it was enlarged, else the scaled one.
    """

    resized: tuple[int, int]
    crop: tuple[int, int]
    size: tuple[int, int]
    original: tuple[int, int]

    @property
    def enlarged(self) -> float:
        """How many times the picture was enlarged; 1 if it was not."""
        return max(1.0, self.resized[0] / self.original[0])

    @property
    def time_ids(self) -> tuple[int, ...]:
        """SDXL's size conditioning: original height, width, crop top, left, trained height, width."""
        (width, height), (left, top), (wide, high) = self.original, self.crop, self.size
        return (height, width, top, left, high, wide)


def collect(pictures: Sequence[TrainingPicture], scratch: Path) -> Collected:
    """Resolve what a person gave to single pictures with captions.

    Args:
        pictures: Each names a picture, a folder of pictures or a zip; a caption typed for a folder or zip is given
            to its pictures that have no .txt file.
        scratch: Folder where zips are unpacked.

    Raises:
        InputError: Nothing there, no pictures inside, too many, an unreadable caption, an unsafe zip.
    """
    found: list[TrainingPicture] = []
    notes: list[str] = []
    for given in pictures:
        path = Path(given.path).expanduser()
        if not path.exists():
            raise InputError(f"There is no file or folder {path}.", "Check the path.")
        if path.is_dir():
            found += _folder(path, given.caption, notes)
        elif zipfile.is_zipfile(path):
            found += _folder(unpack(path, scratch / f"{path.stem}-{len(found)}"), given.caption, notes)
        elif path.suffix.lower() == ".zip":
            raise InputError(f"{path.name} is not a readable zip file.", "Pack the pictures again.")
        else:
            found.append(TrainingPicture(path=str(path), caption=given.caption.strip() or caption_beside(path) or ""))
    if len(found) > MAX_PICTURES:
        raise InputError(f"{len(found)} pictures are more than the {MAX_PICTURES} allowed.", "Give fewer pictures.")
    return Collected(tuple(found), tuple(notes))


def _folder(folder: Path, caption: str, notes: list[str]) -> list[TrainingPicture]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path.relative_to(folder)))
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not pictures:
        raise InputError(f"There are no pictures in {folder}.", f"Pictures end in {', '.join(sorted(SUFFIXES))}.")
    others = [path for path in files if path.suffix.lower() not in SUFFIXES | {".txt"}]
    if others:
        shown = ", ".join(path.name for path in others[:3])
        notes.append(f"{len(others)} files in {folder.name} are not pictures and were left out: {shown}.")
    return [
        TrainingPicture(path=str(path), caption=own if (own := caption_beside(path)) is not None else caption.strip())
        for path in pictures
    ]


def _hidden(path: Path | PurePosixPath) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def caption_beside(picture: Path) -> str | None:
    """Read the .txt file with the picture's name, if there is one.

    Raises:
        InputError: It is not text, or longer than a prompt may be.
    """
    path = picture.with_suffix(".txt")
    if not path.is_file():
        return None
    if path.stat().st_size > 4 * MAX_CAPTION + 3:
        raise InputError(f"The caption {path.name} is longer than {MAX_CAPTION} characters.", "Shorten it.")
    try:
        text = " ".join(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError:
        raise InputError(f"The caption {path.name} is not UTF-8 text.", "Save it as UTF-8.") from None
    if len(text) > MAX_CAPTION:
        raise InputError(f"The caption {path.name} is longer than {MAX_CAPTION} characters.", "Shorten it.")
    return text


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack the pictures and captions of a zip; everything is checked before the first byte is written.

    Args:
        archive: The zip.
        folder: Where its files go; made here, complete or not at all.

    Returns:
        `folder`.

    Raises:
        InputError: A name that leaves the folder, a link, a password, too many files, a suspicious expansion.
        MemoryLimitError: The disk is too small.
    """
    try:
        with zipfile.ZipFile(archive) as pack:
            wanted = list(_checked(pack, archive.name))
            folder.parent.mkdir(parents=True, exist_ok=True)
            _need_space(sum(info.file_size for info in wanted), folder.parent)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpack-") as temporary:
                inside = Path(temporary) / "files"
                inside.mkdir()
                for info in wanted:
                    _extract(pack, info, inside)
                shutil.rmtree(folder, ignore_errors=True)
                inside.replace(folder)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError, zlib.error) as error:
        raise InputError(
            f"{archive.name} is damaged or not a usual zip: {error}.", "Pack the pictures again."
        ) from None
    return folder


def _checked(pack: zipfile.ZipFile, name: str) -> Iterator[zipfile.ZipInfo]:
    """Give the entries to unpack, or refuse the whole zip."""
    infos = [info for info in pack.infolist() if not info.is_dir()]
    if len(infos) > MAX_ZIP_ENTRIES:
        raise InputError(
            f"{name} holds {len(infos)} files; {MAX_ZIP_ENTRIES} are allowed.", "Pack only the pictures you need."
        )
    total = sum(info.file_size for info in infos)
    packed = max(1, sum(info.compress_size for info in infos))
    if total > MAX_UNPACKED or (total > RATIO_FREE and total > MAX_RATIO * packed):
        raise InputError(
            f"{name} would unpack to {total / 2**20:,.0f} MB, {total // packed} times its size; it is not unpacked.",
            "Pack the pictures themselves, without other files.",
        )
    for info in infos:
        unsafe = _unsafe(info)
        if unsafe:
            raise InputError(f"{name} holds {unsafe} ({info.filename[:80]!r}); it is not unpacked.", "Pack it again.")
    paths = [(info, PurePosixPath(info.filename)) for info in infos]
    wanted = [(info, path) for info, path in paths if not _hidden(path)]
    if not any(path.suffix.lower() in SUFFIXES for _, path in wanted):
        raise InputError(f"There are no pictures in {name}.", f"Pictures end in {', '.join(sorted(SUFFIXES))}.")
    yield from (info for info, path in wanted if path.suffix.lower() in SUFFIXES | {".txt"})


def _unsafe(info: zipfile.ZipInfo) -> str:
    """Say what is wrong with an entry, "" if nothing."""
    name = info.filename.replace("\\", "/")
    parts = name.split("/")
    if name.startswith("/") or ":" in parts[0] or ".." in parts or "\0" in name:
        return "a name that leads out of its folder"
    mode = info.external_attr >> 16
    if mode and not stat.S_ISREG(mode) and stat.S_IFMT(mode):
        return "a link or a special file"
    if info.flag_bits & 1:
        return "a file with a password"
    if max(len(os.fsencode(part)) for part in parts) > 255:
        return "a name that is too long"
    return ""


def _extract(pack: zipfile.ZipFile, info: zipfile.ZipInfo, folder: Path) -> None:
    target = folder.joinpath(*PurePosixPath(info.filename.replace("\\", "/")).parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    with pack.open(info) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 2**20)


def _need_space(needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed + 2**24 > free:
        raise MemoryLimitError(
            f"Unpacking needs {needed / 2**20:,.0f} MB, {free / 2**20:,.0f} MB are free in {folder}.",
            "Free some space, or give fewer pictures.",
        )


def bucket(size: tuple[int, int], resolution: int, step: int, enlarge: bool = True) -> tuple[int, int]:
    """Choose the training size of a picture: its shape, at most `resolution` squared in area.

    Args:
        size: (width, height) of the picture.
        resolution: Side of a square picture.
        step: Both sides are multiples of it.
        enlarge: Otherwise no side is larger than the picture's own.

    Returns:
        (width, height) with the least change of shape, the larger area among equals.

    Raises:
        InputError: The picture is smaller than one step and may not be enlarged.
    """
    width, height = size
    most = resolution**2 if enlarge else min(resolution**2, width * height)
    best: tuple[float, int, tuple[int, int]] | None = None
    for wide in range(step, FLATTEST // 2 * resolution + 1, step):
        high = most // wide // step * step
        if high > FLATTEST // 2 * resolution:
            high = FLATTEST // 2 * resolution // step * step
        if not enlarge:
            wide, high = min(wide, width // step * step), min(high, height // step * step)
        if wide < step or high < step:
            continue
        off = abs(math.log(wide / high * height / width))
        if best is None or (round(off, 6), -wide * high) < best[:2]:
            best = (round(off, 6), -wide * high, (wide, high))
    if best is None:
        raise InputError(
            f"A picture of {width}x{height} pixels is too small: {step}x{step} is the least.",
            "Give a larger picture, or allow enlarging.",
        )
    return best[2]


def fit(size: tuple[int, int], target: tuple[int, int], rng: random.Random | None = None) -> Fit:
    """Plan scaling and cropping of a picture to its training size.

    Args:
        size: (width, height) of the picture.
        target: (width, height) to train at.
        rng: Draws where to crop; None is the centre.
    """
    (width, height), (wide, high) = size, target
    factor = max(wide / width, high / height)
    resized = (max(wide, round(width * factor)), max(high, round(height * factor)))
    spare = (resized[0] - wide, resized[1] - high)
    crop = (spare[0] // 2, spare[1] // 2) if rng is None else (rng.randint(0, spare[0]), rng.randint(0, spare[1]))
    return Fit(resized, crop, target, size if factor > 1 else resized)


def apply(image: Image, plan: Fit) -> Image:
    """Scale (Lanczos) and crop a picture as planned."""
    from PIL.Image import Resampling

    left, top = plan.crop
    scaled = image if image.size == plan.resized else image.resize(plan.resized, Resampling.LANCZOS)
    return scaled.crop((left, top, left + plan.size[0], top + plan.size[1]))


def batches(buckets: Sequence[tuple[int, int]], batch: int, seed: int, step: int) -> tuple[int, ...]:
    """Say which pictures step `step` learns from; a pure function, so that a resumed run sees the same.

    Every epoch shows each picture once, shuffled anew; a batch holds pictures of one bucket only, and the last batch
    of a bucket may be smaller than the others.

    Args:
        buckets: Training size of each picture.
        batch: Pictures per step.
        seed: Of the run.
        step: Counter from 0.

    Returns:
        Indices of pictures.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(buckets):
        groups.setdefault(size, []).append(index)
    per_epoch = sum(math.ceil(len(group) / batch) for group in groups.values())
    epoch, position = divmod(step, per_epoch)
    rng = random.Random(f"{seed}:{epoch}")
    made: list[tuple[int, ...]] = []
    for size in sorted(groups):
        group = groups[size]
        rng.shuffle(group)
        made += [tuple(group[start : start + batch]) for start in range(0, len(group), batch)]
    rng.shuffle(made)
    return made[position]
