"""What every tab works with: the studio, the folded events, and how an error reaches the person."""

from __future__ import annotations

import functools
import logging
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import gradio as gr
from gradio.utils import get_upload_folder

from ...pipelines.errors import InputError, IntarsiaError
from ..present import storage_error
from ..settings import Home
from ..studio import Job, JobKind, Studio
from .library_view import Panel, View
from .pieces import esc
from .watch import Watch, Watcher

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

ACTIVE = ("running", "queued")
TOAST_SECONDS = 12
SENDINGS = 2


@dataclass(frozen=True)
class Desk:
    """The studio, and what has been read of its jobs."""

    studio: Studio
    watcher: Watcher

    def look(self, job: Job) -> Watch:
        return self.watcher.look(job)

    def await_end(self, job_id: str, seconds: float = 1.5) -> None:
        """Wait a moment for a job that was told to stop, so that the answer to the click already shows it stopped."""
        end = time.monotonic() + seconds
        while not self.studio.job(job_id).finished_already and time.monotonic() < end:
            time.sleep(0.05)

    def active(self, kind: JobKind) -> list[Job]:
        """Jobs that run or wait, the running ones first, then in the order they will run."""
        jobs = [job for job in reversed(self.studio.jobs(limit=60, kind=kind)) if job.state in ACTIVE]
        return sorted(jobs, key=lambda job: job.state != "running")


@dataclass
class Seen:
    """What one browser tab shows and has been told; lives as long as the tab.

    Args:
        sent: Last value sent to each place and how often, so that an unchanged place is left alone.
        picture: Job id and number of the picture a person chose to look at, None for the newest.
        composition: Job id of the composition it looks at, and the number of its picture (None: follow the run);
            None for the newest.
        run: Job id opened in the runs tab.
        training: Job id followed in the train tab, "" for the newest.
        tool: Job id of the tool it used last, "" if none.
        unfinished: Jobs seen at work: when they end badly, this tab says so once.
        view: What it looks for in the library.
        panel: The report or form that is open there.
        wanted: What it looks for among the adapters it could use; `cast_wanted` in the Compose tab's own list.
        library_seen: When it last looked at the library, as a monotonic time.
    """

    sent: dict[str, tuple[Any, int]] = field(default_factory=dict[str, tuple[Any, int]])
    picture: tuple[str, int] | None = None
    composition: tuple[str, int | None] | None = None
    run: str = ""
    training: str = ""
    tool: str = ""
    unfinished: set[str] = field(default_factory=set[str])
    view: View = field(default_factory=View)
    panel: Panel | None = None
    wanted: str = ""
    cast_wanted: str = ""
    library_seen: float = 0.0

    def fresh(self, place: str, value: Any) -> Any:  # noqa: ANN401
        """Give the value if this tab may not show it yet, else "leave as it is".

        A value is sent twice: two answers on their way at the same time may arrive in the wrong order, and the second
        sending, one tick later, puts that right. A browser that shows the value already does nothing with it.
        """
        last, times = self.sent.get(place, (None, 0))
        if last != value:
            times = 0
        elif times >= SENDINGS:
            return gr.skip()
        self.sent[place] = (value, times + 1)
        return value


CALM: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}


def toast(error: IntarsiaError, title: str = "That did not work") -> gr.Error:
    """Make the toast that shows an error: its sentence, and the way out beneath."""
    hint = f'<div class="hint">{esc(error.hint)}</div>' if error.hint else ""
    return gr.Error(f"{esc(error.message)}{hint}", duration=TOAST_SECONDS, title=title, print_exception=False)


def shown(handler: Callable[P, R]) -> Callable[P, R]:
    """Let a handler's IntarsiaErrors, and a disk's, reach the person as a toast; a bug goes to the log."""

    @functools.wraps(handler)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return handler(*args, **kwargs)
        except IntarsiaError as error:
            raise toast(error) from None
        except (sqlite3.Error, OSError) as error:  # a full disk, a folder that became read-only
            log.warning("the disk or the job store refused", exc_info=True)
            raise toast(storage_error(error, Home.default().root)) from None

    return wrapped


def uploaded(path: str) -> Path:
    """Check that a path the page sent is a file this page received, before anything reads it.

    Raises:
        InputError: It lies elsewhere: a page must not make the server read other files.
    """
    real, folder = Path(path).resolve(), Path(get_upload_folder()).resolve()
    if not path or not real.is_relative_to(folder) or not real.is_file():
        raise InputError("The page sent a file it never uploaded.", "Drop the file again.")
    return real
