"""Write a file as a whole or not at all."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from .errors import MemoryLimitError

FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # disk full, quota used up


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Give a temporary path beside `path`; it takes the place of `path` when the block ends well, else it is removed.

    Raises:
        MemoryLimitError: The disk is full; nothing half-written is left.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.part")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.errno in FULL:
            free = shutil.disk_usage(path.parent).free // 2**20
            raise MemoryLimitError(
                f"The disk is full: {path.name} could not be written ({free} MB free in {path.parent}).",
                "Free some space, then try again.",
            ) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)
