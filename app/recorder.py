"""Writes the events of one running job to the store, in batches, and keeps its lease alive."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from types import TracebackType
from typing import Self

from ..pipelines.events import FINAL, Event, Metric, Progress
from .jobs import Job, JobStore

FLUSH_EVERY = 0.1  # seconds; a training run makes some 80 events a second
BEAT_EVERY = 1.0
RETRIES = 20  # of the last event, when the disk is full
RESERVE = 256 * 1024  # bytes kept on disk during a job, given up when its end does not fit otherwise


class Recorder:
    """Use as a context manager around a job's work; `put` every event.

    Frequent events (progress, metrics) wait up to a tenth of a second so that they share a transaction; all others
    are written at once. When the body raises, whatever waits is still written.
    """

    def __init__(self, store: JobStore, job: Job) -> None:
        self._store = store
        self._job = job
        self._waiting: list[Event] = []
        self._lock = threading.Lock()
        self._leave = threading.Event()
        self._reserve = job.folder / "reserve"
        self._thread = threading.Thread(target=self._beat, name=f"beat-{job.id}", daemon=True)
        self.lost = False  # the job was taken away from this process
        self.final: Event | None = None

    def __enter__(self) -> Self:
        with contextlib.suppress(OSError):  # no room even for this: the work will say so in its own words
            self._reserve.write_bytes(bytes(RESERVE))
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._leave.set()
        self._thread.join()
        self._reserve.unlink(missing_ok=True)

    def put(self, event: Event) -> None:
        """Record an event; a final one ends the job."""
        if isinstance(event, FINAL):
            self._finish(event)
            return
        with self._lock:
            if isinstance(event, Progress) and self._waiting:
                self._waiting = [old for old in self._waiting if not _same_stage(old, event)]
            self._waiting.append(event)
        if not isinstance(event, Progress | Metric):
            self._flush()

    def _finish(self, event: Event) -> None:
        """Try until the store takes it: a job whose end is not written would look interrupted."""
        self.final = event
        for attempt in range(RETRIES):
            try:
                self._flush()
                self._store.finish(self._job.id, event)
                return
            except sqlite3.OperationalError:
                self._reserve.unlink(missing_ok=True)
                if attempt > 0:
                    self._waiting = []  # the end matters more than the last metrics
                if attempt == RETRIES - 1:
                    raise
                time.sleep(0.25)

    def _flush(self) -> None:
        with self._lock:  # held while writing: the order of events is the order of `put`
            if self._waiting and not self.lost:
                self.lost = not self._store.append(self._job.id, self._waiting)
            self._waiting = []

    def _beat(self) -> None:
        beaten = time.monotonic()
        while not self._leave.wait(FLUSH_EVERY):
            try:
                if self._waiting:
                    self._flush()
                    beaten = time.monotonic()
                elif time.monotonic() - beaten >= BEAT_EVERY:
                    self.lost = not self._store.append(self._job.id, ()) and self.final is None
                    beaten = time.monotonic()
            except sqlite3.OperationalError:  # full disk or a long lock: what waits is tried again with the next beat
                continue


def _same_stage(old: Event, new: Progress) -> bool:
    return isinstance(old, Progress) and old.stage == new.stage
