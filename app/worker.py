"""The long-lived process that does the jobs of one device. Started by the studio; heavy imports stay in here.

`python -m intarsia.app.worker --home FOLDER --device auto`
"""

from __future__ import annotations

import argparse
import logging
import sqlite3
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..pipelines.events import CancelToken
from .jobs import JobStore
from .settings import Home

if TYPE_CHECKING:
    from .runner import Runner

LOOK_EVERY = 0.1  # seconds between two looks for a queued job
BEAT_EVERY = 1.0
PREWARM = "mini"

log = logging.getLogger("intarsia.worker")


class Worker:
    """Claims and does jobs until no page needs it any more.

    Args:
        store: The job store.
        device: The device this worker is for; "auto" lets it choose.
        linger: Seconds to stay without a job and without a page.
    """

    def __init__(self, store: JobStore, device: str, linger: float) -> None:
        self._store = store
        self._device = device
        self._linger = linger
        self._replaced = threading.Event()

    def serve(self) -> None:
        """Work until idle and alone; returns at once if another worker has the device."""
        if not self._store.register_worker(self._device):
            return
        threading.Thread(target=self._beat, name="worker-beat", daemon=True).start()
        try:
            self._loop()
        finally:
            self._store.leave_worker(self._device)

    def _loop(self) -> None:
        runner = self._runner()
        warm = False
        idle_since = time.monotonic()
        while not self._replaced.is_set():
            if self._step(runner):
                warm = True
                idle_since = time.monotonic()
            elif not warm:
                warm = True
                runner.prewarm(PREWARM)
            else:
                if self._store.has_server():
                    idle_since = time.monotonic()
                elif time.monotonic() - idle_since > self._linger:
                    return
                time.sleep(LOOK_EVERY)

    def _step(self, runner: Runner) -> bool:
        from .runner import perform

        job = self._store.claim(self._device)
        if job is None:
            return False
        try:
            for _ in perform(runner, self._store, job, CancelToken()):
                pass
        except sqlite3.OperationalError:  # the store itself is out of room: the job shows as interrupted, we go on
            log.exception("job %s could not be recorded", job.id)
        return True

    def _runner(self) -> Runner:
        from ..pipelines.models import Resident
        from .runner import Runner
        from .shelf import Shelf

        return Runner(self._store, Shelf(self._store.home), Resident(), self._device)

    def _beat(self) -> None:
        while True:
            try:
                if not self._store.beat_worker(self._device):
                    self._replaced.set()
            except sqlite3.OperationalError:
                log.warning("heartbeat missed", exc_info=True)
            time.sleep(BEAT_EVERY)


def main() -> None:
    """Serve one device until nobody needs it."""
    parser = argparse.ArgumentParser(prog="intarsia.app.worker")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--linger", type=float, default=10.0)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    store = JobStore(Home(given.home))
    log.info("worker for %s starts", given.device)
    Worker(store, given.device, given.linger).serve()
    log.info("worker for %s leaves", given.device)
    store.close()


if __name__ == "__main__":
    main()
