"""Pictures people give for training, copied under the home so that a run survives their removal."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

from ..pipelines.atomic import replacing
from ..pipelines.errors import InputError
from ..pipelines.picture import open_picture
from ..pipelines.requests import TrainingPicture
from ..training.data import collect, unpack
from .settings import Home


def store_upload(home: Home, path: Path) -> Path:
    """Keep a copy of a picture (and the caption beside it), or the unpacked pictures of a zip.

    The same bytes are kept once.

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
        return folder if folder.is_dir() else unpack(path, folder)
    open_picture(path)
    name = re.sub(r"[^\w.-]+", "_", path.name)[-80:]
    kept = home.uploads / f"{digest}-{name}"
    if not kept.exists():
        _copy(path, kept)
    caption = path.with_suffix(".txt")
    if caption.is_file():
        _copy(caption, kept.with_suffix(".txt"))
    return kept


def pictures_of(home: Home, path: Path) -> tuple[TrainingPicture, ...]:
    """Collect pictures with their captions: those of a folder or a zip in order of name, or one file.

    A caption stands in a .txt file of the same name.

    Raises:
        InputError: Nothing there, or no pictures in it.
    """
    if path.suffix.lower() == ".zip":
        path = store_upload(home, path)
    return collect([TrainingPicture(path=str(path.absolute()))], home.uploads).pictures


def _copy(source: Path, target: Path) -> None:
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)
