"""Write a file or a folder as a whole or not at all."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from .errors import InputError, MemoryLimitError

FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # disk full, quota used up


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Give a temporary path beside `path`; it takes the place of `path` when the block ends well, else it is removed.

    Raises:
        MemoryLimitError: The disk is full; nothing half-written is left.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.part")
    try:
        with _explained(path):
            yield temporary
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Generator[Path]:
    """The same for a folder, which is made; there must be none at `path` yet.

    Raises:
        InputError: Something is at `path`.
        MemoryLimitError: The disk is full; nothing half-written is left.
    """
    if path.exists():
        raise InputError(f"{path} is already there.", "Choose another name.")
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.part")
    try:
        with _explained(path):
            temporary.mkdir()
            yield temporary
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _explained(path: Path) -> Generator[None]:
    """Say in words that the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(path.parent).free // 2**20
        raise MemoryLimitError(
            f"The disk is full: {path.name} could not be written ({free} MB free in {path.parent}).",
            "Free some space, then try again.",
        ) from None
