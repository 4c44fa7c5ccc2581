"""What a person reads: errors, events, rates and times as short texts. The page and the command line share it."""

from __future__ import annotations

import errno
import shutil
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

from ..composition.layout import ComposeRequest
from ..pipelines.atomic import FULL
from ..pipelines.errors import Cancelled, InputError, IntarsiaError, MemoryLimitError
from ..pipelines.events import (
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
from ..pipelines.requests import EffectRequest, ToolRequest, TrainRequest
from .requests import AnyRequest

EXIT_DONE, EXIT_BUG, EXIT_PERSON, EXIT_STOPPED = 0, 1, 2, 130

HOME_HINT = "Is its folder read-only? INTARSIA_HOME chooses another."
ROOM = 500_000  # bytes; with less free space a job store that fails does so for want of room

STAGES = {
    "load": "Loading the model",
    "ready": "Model ready",
    "attach": "Attaching",
    "encode": "Encoding",
    "denoise": "Drawing",
    "decode": "Finishing the picture",
    "cache": "Preparing the pictures",
    "prepare": "Preparing",
    "train": "Training",
    "sample": "Making a sample picture",
    "save": "Saving",
    "base": "Drawing the base model's picture",
    "judge": "Looking",
    "score": "Drawing",
    "effect": "Drawing with and without the adapter",
}
STATES = {
    "queued": "waiting",
    "running": "running",
    "done": "done",
    "stopped": "stopped",
    "failed": "failed",
    "interrupted": "interrupted",
}


@dataclass(frozen=True)
class Shown:
    """An error as a person sees it."""

    code: str
    message: str
    hint: str
    exit_code: int

    @property
    def text(self) -> str:
        return f"{self.message} {self.hint}".strip()


def show_error(error: BaseException) -> Shown:
    """Turn anything that was raised into words and an exit code."""
    if isinstance(error, IntarsiaError):
        return Shown(error.code, error.message, error.hint, EXIT_PERSON)
    if isinstance(error, Cancelled | KeyboardInterrupt):
        return Shown("stopped", "Stopped.", "", EXIT_STOPPED)
    return Shown("bug", f"Something in Intarsia broke: {type(error).__name__}: {error}", "Please report it.", EXIT_BUG)


def storage_error(error: OSError | sqlite3.Error, root: Path) -> IntarsiaError:
    """Explain why the disk or the job store refused.

    Args:
        error: What was raised.
        root: The studio's folder.
    """
    number = getattr(error, "errno", None)
    # SQLite calls a full disk an I/O error where it cannot even make its own helper files
    if number in FULL or "disk is full" in str(error) or (isinstance(error, sqlite3.Error) and _free(root) < ROOM):
        return full_disk(root)
    if isinstance(error, sqlite3.Error):
        return InputError(f"The job store cannot be used: {error}.", HOME_HINT)
    text = f"{error.filename or 'A file'}: {error.strerror or error}."
    hint = "Check its permissions." if number in (errno.EACCES, errno.EPERM, errno.EROFS) else "Check the folder."
    return InputError(text, hint)


def full_disk(folder: Path) -> MemoryLimitError:
    """Say which disk is full."""
    return MemoryLimitError(
        f"The disk with {folder} is full ({_free(folder) / 1e6:,.1f} MB free).",
        "Delete pictures or models you no longer need, or set INTARSIA_HOME to a folder on a larger disk.",
    )


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def show_failure(event: Failed) -> Shown:
    """The same for a job that failed."""
    return Shown(event.code, event.message, event.hint, EXIT_BUG if event.code == "bug" else EXIT_PERSON)


def exit_code(event: Event) -> int:
    """Exit code of a command whose job ended with `event`."""
    if isinstance(event, Failed):
        return show_failure(event).exit_code
    return EXIT_STOPPED if isinstance(event, Stopped | Interrupted) else EXIT_DONE


def status(event: Event) -> str:
    """One short line for an event; "" for those that only feed a plot or a picture."""
    match event:
        case Stage(name=name, detail=detail):
            words = STAGES.get(name, name.capitalize())
            return f"{words}: {detail}" if detail else words
        case Progress(stage=stage, step=step, total=total):
            return f"{STAGES.get(stage, stage.capitalize())}: step {step} of {total}"
        case Notice(text=text):
            return text
        case Artifact(kind=kind, label=label, path=path):
            return f"{kind.capitalize()} saved: {label or path}"
        case Done(seconds=seconds):
            return f"Done in {duration(seconds)}"
        case Stopped(resumable=resumable):
            return "Stopped; it can be resumed." if resumable else "Stopped."
        case Failed():
            return show_failure(event).text
        case Interrupted(resumable=resumable):
            ending = "it can be resumed" if resumable else "start it again"
            return f"Interrupted: the process that did the work is gone; {ending}."
        case Metric() | Preview():
            return ""


def fraction(event: Event) -> float | None:
    """How much of its stage is done, 0..1; None for events that do not say."""
    if isinstance(event, Progress) and event.total > 0:
        return min(1.0, event.step / event.total)
    return 1.0 if isinstance(event, Done) else None


def title(request: AnyRequest) -> str:
    """Name a job by what was asked for."""
    if isinstance(request, TrainRequest):
        return f"{request.recipe} training: {request.name}"
    if isinstance(request, ToolRequest):
        return f"{request.tool}: {', '.join(use.adapter for use in request.adapters) or request.name}"
    if isinstance(request, EffectRequest):
        return f"effect of {request.adapter.adapter}"
    said = request.said if isinstance(request, ComposeRequest) else request.prompt
    prompt = said.strip() or "(no prompt)"
    return prompt if len(prompt) <= 60 else prompt[:57] + "..."


def duration(seconds: float) -> str:
    """Write a time span: 4.2 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def rate(per_second: float) -> str:
    """Write a speed: 12.3 steps/s, or 4.1 s per step when slow."""
    if per_second <= 0:
        return "-"
    return f"{per_second:.1f} steps/s" if per_second >= 1 else f"{1 / per_second:.1f} s per step"


def size(count: float) -> str:
    """Write a number of bytes: 812 kB, 1.4 GB."""
    for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= divisor:
            return f"{count / divisor:.3g} {unit}" if count < 100 * divisor else f"{count / divisor:.0f} {unit}"
    return f"{count:.0f} bytes"


class Pace:
    """Follows progress events and tells rate and time left.

    The rate is measured over the last few seconds, so that slow first steps (warm-up, cached pictures) are forgotten.
    """

    WINDOW = 8.0  # seconds

    def __init__(self) -> None:
        self._stage = ""
        self._marks: list[tuple[float, int]] = []  # time, step
        self._left = 0

    def update(self, event: Progress, now: float | None = None) -> None:
        """Take in one event; `now` is a monotonic time in seconds."""
        now = time.monotonic() if now is None else now
        if event.stage != self._stage or (self._marks and event.step < self._marks[-1][1]):
            self._stage, self._marks = event.stage, []
        self._marks.append((now, event.step))
        while len(self._marks) > 2 and now - self._marks[0][0] > self.WINDOW:
            self._marks.pop(0)
        self._left = event.total - event.step

    @property
    def per_second(self) -> float:
        """Steps per second, 0 before two events came."""
        if len(self._marks) < 2:
            return 0.0
        (begin, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) / (end - begin) if end > begin else 0.0

    def text(self) -> str:
        """Rate and time left, such as "12.3 steps/s, 5.1 s left"; "" while unknown."""
        speed = self.per_second
        return f"{rate(speed)}, {duration(self._left / speed)} left" if speed > 0 else ""
