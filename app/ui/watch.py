"""What the page knows of a job: its events, read once from the store and folded into one value."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ...pipelines.events import (
    Artifact,
    Done,
    Event,
    Failed,
    Interrupted,
    Metric,
    Notice,
    Preview,
    Progress,
    Stage,
    Stopped,
)
from ..present import Pace
from ..studio import Job

KEPT_JOBS = 200  # folded jobs held in memory; older ones are read again when somebody looks at them


class EventSource(Protocol):
    """Anything that gives a job's events; in the product it is `Studio`."""

    def events(self, job_id: str, after: int = 0) -> list[tuple[int, Event]]: ...


@dataclass
class Watch:
    """Everything the events of one job have said so far.

    Args:
        reached: Step and total of every stage that counts steps.
        rate: Steps per second, 0 while unknown: the job's own metric, else counted from the progress events.
        preview: Last preview picture and its step.
        preview_label: What it shows, where a job draws several.
        losses: `(step, loss)` in the order they came.
        ended: The final event.
    """

    after: int = 0
    stage: str = ""
    detail: str = ""
    reached: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    rate: float = 0.0
    memory: float = 0.0
    preview: tuple[str, int] | None = None
    preview_label: str = ""
    pictures: list[Artifact] = field(default_factory=list[Artifact])
    samples: list[Artifact] = field(default_factory=list[Artifact])
    adapters: list[Artifact] = field(default_factory=list[Artifact])
    reports: list[Artifact] = field(default_factory=list[Artifact])
    losses: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    notices: list[str] = field(default_factory=list[str])
    ended: Done | Stopped | Failed | Interrupted | None = None
    seconds: float = 0.0
    _pace: Pace = field(default_factory=Pace)
    _measured: bool = False

    @property
    def step(self) -> int:
        return self.reached.get(self.stage, (0, 0))[0]

    @property
    def total(self) -> int:
        """Steps of the stage that is going on, 0 if it does not count."""
        return self.reached.get(self.stage, (0, 0))[1]

    @property
    def fraction(self) -> float:
        return min(1.0, self.step / self.total) if self.total else 0.0

    @property
    def left(self) -> float | None:
        """Seconds this stage still needs, None while unknown."""
        return (self.total - self.step) / self.rate if self.rate > 0 and self.total else None

    def add(self, event: Event, now: float) -> None:
        """Fold one event in, read at the monotonic time `now`; events read together share it, so none is a speed."""
        match event:
            case Stage():
                self.stage, self.detail = event.name, event.detail
                if event.name != "train":  # training goes on where it was after a sample; others begin anew
                    self.reached.pop(event.name, None)
            case Progress():
                self._progress(event, now)
            case Preview():
                self.preview, self.preview_label = (event.path, event.step), event.label
            case Metric():
                self._metric(event)
            case Notice():
                self.notices.append(event.text)
            case Artifact():
                kinds = {
                    "picture": self.pictures, "sample": self.samples, "adapter": self.adapters, "report": self.reports
                }  # fmt: skip
                if event.kind in kinds:
                    kinds[event.kind].append(event)
            case Done() | Stopped() | Failed() | Interrupted():
                self.ended = event
                self.seconds = event.seconds if isinstance(event, Done) else 0.0

    def _progress(self, event: Progress, now: float) -> None:
        self.stage = event.stage
        self.reached[event.stage] = (event.step, event.total)
        self._pace.update(event, now)
        if not self._measured:
            self.rate = self._pace.per_second

    def _metric(self, event: Metric) -> None:
        if event.name == "loss":
            self.losses.append((event.step, event.value))
        elif event.name == "rate":
            self.rate, self._measured = event.value, True
        elif event.name == "memory":
            self.memory = event.value


class Watcher:
    """Keeps the folded events of the jobs people look at, and reads only what is new."""

    def __init__(self, source: EventSource) -> None:
        self._source = source
        self._known: dict[str, Watch] = {}
        self._lock = threading.Lock()

    def look(self, job: Job) -> Watch:
        """Give everything known of a job, its newest events included."""
        with self._lock:
            watch = self._known.pop(job.id, None) or Watch()
            self._known[job.id] = watch  # last in, last to be dropped
            while len(self._known) > KEPT_JOBS:
                del self._known[next(iter(self._known))]
            if watch.ended is None:
                now = time.monotonic()
                for number, event in self._source.events(job.id, watch.after):
                    watch.add(event, now)
                    watch.after = number
        return watch


def pictures_of(watch: Watch) -> list[Artifact]:
    """Give the finished pictures that are still on the disk."""
    return [artifact for artifact in watch.pictures if Path(artifact.path).is_file()]
