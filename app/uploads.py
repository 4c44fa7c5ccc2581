"""Pictures people give for training: checked, copied under the home, unpacked from zips with limits."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from ..pipelines.errors import InputError
from ..pipelines.picture import open_picture
from ..pipelines.requests import TrainingPicture
from .settings import Home

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MOST_FILES = 5000
MOST_BYTES = 4 * 1024**3  # unpacked
MOST_EXPANSION = 200  # a text file may shrink that much, pictures never do
LONGEST_CAPTION = 2000


def store_upload(home: Home, path: Path) -> Path:
    """Keep a copy of a picture or the unpacked pictures of a zip; the same bytes are kept once.

    Returns:
        The picture, or the folder of pictures.

    Raises:
        InputError: Nothing there, or not a usable picture or zip.
    """
    if not path.is_file():
        raise InputError(f"There is no file {path}.", "Choose it again.")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    if path.suffix.lower() == ".zip":
        folder = home.uploads / digest
        if not folder.is_dir():
            _unpack(path, folder)
        return folder
    open_picture(path)
    name = re.sub(r"[^\w.-]+", "_", path.name)[-80:]
    kept = home.uploads / f"{digest}-{name}"
    if not kept.exists():
        temporary = kept.with_name(f".{kept.name}.{os.getpid()}")
        shutil.copyfile(path, temporary)
        temporary.replace(kept)
        caption = path.with_suffix(".txt")
        if caption.is_file():
            shutil.copyfile(caption, kept.with_suffix(".txt"))
    return kept


def pictures_of(home: Home, path: Path) -> tuple[TrainingPicture, ...]:
    """Collect pictures with their captions: those of a folder or a zip in order of name, or one file.

    A caption stands in a .txt file of the same name.

    Raises:
        InputError: Nothing there, or no pictures in it.
    """
    if path.is_file() and path.suffix.lower() == ".zip":
        path = store_upload(home, path)
    if path.is_file():
        return (_picture(path),)
    if not path.is_dir():
        raise InputError(f"There is no picture, folder or zip {path}.", "Choose it again.")
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and not _hidden(file, path))
    if not found:
        raise InputError(f"There are no pictures in {path}.", f"Pictures end in {', '.join(SUFFIXES)}.")
    return tuple(_picture(file) for file in found)


def _picture(path: Path) -> TrainingPicture:
    caption = path.with_suffix(".txt")
    if not caption.is_file():
        return TrainingPicture(path=str(path))
    try:
        text = caption.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise InputError(f"The caption {caption.name} is not UTF-8 text.", "Save it as UTF-8.") from None
    if len(text) > LONGEST_CAPTION:
        raise InputError(f"The caption {caption.name} has {len(text)} letters.", f"At most {LONGEST_CAPTION} are read.")
    return TrainingPicture(path=str(path), caption=text)


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in file.relative_to(folder).parts)


def _unpack(path: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            wanted = _wanted(archive, path)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpack-") as scratch:
                for entry, place in wanted:
                    target = Path(scratch, "pictures", *place.parts)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(entry) as packed, target.open("wb") as file:
                        shutil.copyfileobj(packed, file)  # never gives more than the declared size
                Path(scratch, "pictures").replace(folder)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise InputError(f"{path.name} is not a readable zip: {error}.", "Pack it again.") from None


def _wanted(archive: zipfile.ZipFile, path: Path) -> list[tuple[zipfile.ZipInfo, PurePosixPath]]:
    """Check a zip before anything of it is written; gives its pictures and captions."""
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    if len(entries) > MOST_FILES:
        raise InputError(f"{path.name} holds {len(entries)} files.", f"At most {MOST_FILES} are unpacked.")
    total = sum(entry.file_size for entry in entries)
    packed = max(1, sum(entry.compress_size for entry in entries))
    if total > MOST_BYTES or (total > 16 * 1024**2 and total / packed > MOST_EXPANSION):
        raise InputError(
            f"{path.name} would grow from {packed / 1e6:.1f} MB to {total / 1e6:,.0f} MB.",
            f"Zips may grow {MOST_EXPANSION} times and to {MOST_BYTES / 1e9:.1f} GB; pack the pictures alone.",
        )
    wanted: list[tuple[zipfile.ZipInfo, PurePosixPath]] = []
    for entry in entries:
        place = PurePosixPath(entry.filename.replace("\\", "/"))
        if place.is_absolute() or ".." in place.parts or ":" in entry.filename:
            raise InputError(f"{path.name} names a file outside of itself: {entry.filename}.", "Pack it again.")
        if entry.flag_bits & 1:
            raise InputError(f"{path.name} is locked with a password.", "Pack it again without one.")
        visible = not any(part.startswith((".", "__MACOSX")) for part in place.parts)
        if visible and place.suffix.lower() in (*SUFFIXES, ".txt"):
            wanted.append((entry, place))
    if not any(place.suffix.lower() != ".txt" for _, place in wanted):
        raise InputError(f"There are no pictures in {path.name}.", f"Pictures end in {', '.join(SUFFIXES)}.")
    return wanted
