"""Keeps a worker per device alive, and tells the truth about jobs whose worker died."""

from __future__ import annotations

import logging
import math
import os
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

from ..pipelines.events import Failed
from .jobs import ANY_DEVICE, PATIENCE, JobStore

TICK = 0.5  # seconds
LONGEST_WAIT = 30.0  # seconds between two attempts to start a worker that keeps dying
YOUNG = 10.0  # seconds; a worker that dies sooner may well have died of its start
HOPELESS = 3  # workers in a row that died young

log = logging.getLogger("intarsia.watchdog")


class Watchdog:
    """A thread that starts, adopts and replaces workers, and reaps their jobs.

    Args:
        store: The job store.
        linger: Passed on to the workers.
    """

    def __init__(self, store: JobStore, linger: float) -> None:
        self._store = store
        self._linger = linger
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        devices = os.environ.get("INTARSIA_DEVICES", ANY_DEVICE)
        self._keepers = [_Keeper(store, device.strip(), linger) for device in devices.split(",") if device.strip()]

    def start(self) -> None:
        self._store.beat_server()  # before any worker looks whether somebody needs it
        self._thread.start()

    def stop(self) -> None:
        self._leave.set()
        self._thread.join()
        self._store.leave_server()

    def _watch(self) -> None:
        last = awake_since = time.time()
        while True:
            now = time.time()
            if now - last > 5 * TICK + 1:  # the computer slept: give living workers the time to beat again
                awake_since = now
            last = now
            try:
                self._store.beat_server()
                self._store.reap(PATIENCE if now - awake_since > PATIENCE / 2 else math.inf)
                for keeper in self._keepers:
                    keeper.tend()
            except (sqlite3.Error, OSError):  # a full disk now may be free in a minute
                log.exception("watching over the workers failed; trying again")
            if self._leave.wait(TICK):
                return


class _Keeper:
    """Sees to it that one device has a worker."""

    def __init__(self, store: JobStore, device: str, linger: float) -> None:
        self._store = store
        self._device = device
        self._linger = linger
        self._child: subprocess.Popen[bytes] | None = None
        self._not_before = 0.0
        self._born = 0.0
        self._early_deaths = 0

    def tend(self) -> None:
        """Start a worker if the device has none."""
        child, self._child = self._child, None
        running = child is not None and child.poll() is None  # poll also buries a dead child
        if self._store.worker(self._device) is not None:
            self._child = child
            return
        if running:
            self._child = child  # still starting
            return
        if child is not None:
            self._mourn(child.returncode)
        if time.monotonic() >= self._not_before:
            self._child = self._spawn()
            self._born = time.monotonic()

    def _mourn(self, code: int) -> None:
        log.warning("the worker for %s ended with %s", self._device, code)
        if time.monotonic() - self._born > YOUNG:
            self._early_deaths = 0
            return  # it worked before: a new one at once
        self._early_deaths += 1
        self._not_before = time.monotonic() + min(LONGEST_WAIT, 2.0 ** (self._early_deaths - 1))
        if self._early_deaths >= HOPELESS:
            log_file = self._log_file()
            message = f"The worker for device {self._device} does not start."
            self._store.fail_queued(
                Failed(code="bug", message=message, hint=f"See {log_file}, or run intarsia doctor.")
            )

    def _spawn(self) -> subprocess.Popen[bytes]:
        # -P: the folder the server was started in must not shadow installed packages. A session of its own: Ctrl-C
        # in the server's terminal is for the server.
        command = [sys.executable, "-P", "-m", "intarsia.app.worker"]
        command += ["--home", str(self._store.home.root), "--device", self._device, "--linger", str(self._linger)]
        with self._log_file().open("ab") as output:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _log_file(self) -> Path:
        return self._store.home.root / f"worker-{self._device.replace(':', '-')}.log"
