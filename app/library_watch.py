"""Follows the library's folders while a page is open: files put there, moved or taken away are noticed."""

from __future__ import annotations

import logging
import sqlite3
import threading
from typing import TYPE_CHECKING

from ..pipelines.errors import Cancelled, IntarsiaError

if TYPE_CHECKING:
    from .shelf import Shelf

EVERY = 15.0  # seconds between two scans; ten thousand unchanged files take a fifth of one

log = logging.getLogger("intarsia.library")


class FolderWatch:
    """A thread that scans the folders again and again.

    Args:
        shelf: The library.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="library", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Leave after the file that may be read just now."""
        self._leave.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            try:
                self._shelf.scan(self._go_on)
            except Cancelled:
                return
            except (IntarsiaError, OSError, sqlite3.Error):
                log.warning("the folders could not be read", exc_info=True)  # a drive that was taken out may come back
            if self._leave.wait(EVERY):
                return

    def _go_on(self, done: int, total: int) -> None:
        if self._leave.is_set():
            raise Cancelled
