"""Does one job: finds its model and adapters, drives the work, and turns whatever happens into events."""

from __future__ import annotations

import errno
import logging
import sqlite3
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from ..composition.layout import ComposeRequest
from ..pipelines.errors import Cancelled, IntarsiaError, MemoryLimitError
from ..pipelines.events import Artifact, CancelToken, Done, Event, Failed, Interrupted, Notice, Stage, Stopped
from ..pipelines.requests import EffectRequest, GenerateRequest, ToolRequest, TrainRequest
from .jobs import Job, JobStore, checkpoint_of
from .present import full_disk
from .recorder import Recorder

if TYPE_CHECKING:
    from ..pipelines.attach import Attachment
    from ..pipelines.models import Model, Resident
    from .shelf import Shelf

log = logging.getLogger("intarsia.runner")
ASK_EVERY = 0.2  # seconds between two looks at the store's cancel flag


class Runner:
    """Runs jobs one after another on one device, keeping the model between them.

    Args:
        store: Where requests are completed and stops are asked for.
        shelf: Where adapters are found and put.
        resident: Holds the loaded model.
        device: As the resident knows it: "auto", "cpu", "cuda:0".
    """

    def __init__(self, store: JobStore, shelf: Shelf, resident: Resident, device: str = "auto") -> None:
        self._store = store
        self._shelf = shelf
        self._resident = resident
        self._device = device

    def run(self, job: Job, token: CancelToken) -> Generator[Event, None, None]:
        """Do a job; the last event is its end. Raises nothing but what closes a generator."""
        started = time.monotonic()
        try:
            if isinstance(job.request, GenerateRequest):
                yield from self._generate(job, job.request, token)
            elif isinstance(job.request, ToolRequest):
                yield from self._tool(job, job.request, token)
            elif isinstance(job.request, ComposeRequest):
                yield from self._compose(job, job.request, token)
            elif isinstance(job.request, EffectRequest):
                yield from self._effect(job, job.request, token)
            else:
                yield from self._train(job, job.request, token)
        except Cancelled:
            yield Stopped(resumable=checkpoint_of(job) is not None)
        except IntarsiaError as error:
            yield Failed(code=error.code, message=error.message, hint=error.hint)
        except Exception as error:  # noqa: BLE001 - the one place that turns a bug into an event instead of a dead worker
            yield _unexpected(job, error)
        else:
            yield Done(seconds=round(time.monotonic() - started, 2))

    def prewarm(self, name: str) -> None:
        """Load a model before anybody asks; a failure shows again, in words, when a job needs it."""
        try:
            self._resident.get(name, self._device, offload=None)
        except (IntarsiaError, OSError, RuntimeError):
            log.warning("could not load %s in advance", name, exc_info=True)

    def _model(self, name: str, token: CancelToken) -> Generator[Event, None, Model]:
        yield Stage(name="load", detail=name)
        token.check()
        model = self._resident.get(name, self._device, offload=None)
        token.check()
        yield Stage(name="ready", detail=f"{name} on {model.device}, {str(model.dtype).removeprefix('torch.')}")
        return model

    def _generate(self, job: Job, request: GenerateRequest, token: CancelToken) -> Iterator[Event]:
        from ..pipelines.image import generate

        model = yield from self._model(request.model, token)
        request, attachments = self._attachments(request, model)
        self._store.set_request(job.id, request)
        yield from generate(request, model, attachments, self._store.home.outputs, job.folder, token)

    def _attachments(self, request: GenerateRequest, model: Model) -> tuple[GenerateRequest, tuple[Attachment, ...]]:
        from .hang import read

        uses, attachments = read(request.adapters, model, self._shelf)
        return request.model_copy(update={"adapters": uses}), attachments

    def _train(self, job: Job, request: TrainRequest, token: CancelToken) -> Iterator[Event]:
        from ..training.run import train

        model = yield from self._model(request.model, token)
        for note in model.notes:
            yield Notice(text=note)
        sample: Path | None = None
        for event in train(request, model, job.folder, token):
            if isinstance(event, Artifact) and event.kind == "adapter":
                yield from self._shelve(job, event, sample)
                continue
            if isinstance(event, Artifact) and event.kind == "sample":
                sample = Path(event.path)
            yield event

    def _tool(self, job: Job, request: ToolRequest, token: CancelToken) -> Iterator[Event]:
        from .tool_work import work

        for event in work(request, self._shelf, job.folder, token):
            if isinstance(event, Artifact) and event.kind == "adapter" and not request.out:
                yield from self._shelve(job, event, None)
                continue
            yield event

    def _compose(self, job: Job, request: ComposeRequest, token: CancelToken) -> Iterator[Event]:
        from ..composition.run import compose
        from .compose_work import resolved

        model = yield from self._model(request.model, token)
        yield Stage(name="attach", detail=", ".join(use.called for use in request.concepts))
        request, composition = resolved(request, model, self._shelf, token)
        self._store.set_request(job.id, request)
        yield from compose(request, composition, self._store.home.outputs, job.folder)

    def _effect(self, job: Job, request: EffectRequest, token: CancelToken) -> Iterator[Event]:
        from ..pipelines.effect import measure_effect

        model = yield from self._model(request.model, token)
        named, (attachment,) = self._attachments(request.picture, model)
        self._store.set_request(job.id, request.model_copy(update={"adapter": named.adapters[0]}))
        yield from measure_effect(request, model, attachment, job.folder, token)

    def _shelve(self, job: Job, made: Artifact, picture: Path | None) -> Iterator[Event]:
        entry = self._shelf.add(Path(made.path), made.label, numbered=True, group=job.id, thumbnail=picture)
        if entry.name != made.label:
            yield Notice(text=f"The library already has {made.label}; the new one is called {entry.name}.")
        yield made.model_copy(update={"path": str(entry.path), "label": entry.name})


def perform(runner: Runner, store: JobStore, job: Job, token: CancelToken) -> Generator[Event, None, None]:
    """Run a job that belongs to this process and record its events, giving each as it happens.

    A stop asked for in the store reaches the work; so does the loss of the lease. When the caller leaves early the
    job becomes interrupted.
    """
    with ExitStack() as stack:
        recorder = stack.enter_context(Recorder(store, job))
        joined = CancelToken(_every(ASK_EVERY, lambda: recorder.lost or token.cancelled or store.cancel_asked(job.id)))
        work = runner.run(job, joined)
        stack.callback(work.close)
        try:
            for event in work:
                try:
                    recorder.put(event)
                except sqlite3.OperationalError as error:  # the runner explains it like any other shortage
                    event = work.throw(error)
                    recorder.put(event)
                yield event
        finally:
            if recorder.final is None:
                recorder.put(Interrupted(resumable=checkpoint_of(job) is not None))


def run_here(store: JobStore, shelf: Shelf, job: Job, token: CancelToken) -> Iterator[Event]:
    """Run a job that was submitted as this process's own, with a model of its own."""
    from ..pipelines.models import Resident

    yield from perform(Runner(store, shelf, Resident(), job.device), store, job, token)


def _every(seconds: float, ask: Callable[[], bool]) -> Callable[[], bool]:
    """Limit how often a question is asked; a yes is for good."""
    last = 0.0
    answer = False

    def asked() -> bool:
        nonlocal last, answer
        if not answer and time.monotonic() - last >= seconds:
            last = time.monotonic()
            answer = ask()
        return answer

    return asked


def _unexpected(job: Job, error: Exception) -> Failed:
    """Explain memory and disk shortages; log anything else as a bug of ours."""
    known = shortage(error, job.folder)
    if known is not None:
        return Failed(code=known.code, message=known.message, hint=known.hint)
    log = job.folder / "log.txt"
    trace = "".join(traceback.format_exception(error))
    try:
        with log.open("a", encoding="utf-8") as file:
            file.write(trace)
        hint = f"Its details are in {log}; please report it with them."
    except OSError:
        hint = f"Its details could not be written: {type(error).__name__}: {error}"
    return Failed(code="bug", message=f"Something in Intarsia broke during job {job.id}.", hint=hint)


def shortage(error: Exception, folder: Path) -> MemoryLimitError | None:
    """Recognize a lack of memory or disk in the many forms libraries report it; None for anything else."""
    text = str(error).lower()
    if getattr(error, "errno", None) == errno.ENOSPC or "no space left" in text or "disk is full" in text:
        return full_disk(folder)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return MemoryLimitError(
            "There is not enough memory for this job.",
            "Lower the size or the number of pictures, choose a smaller model, or close other programs.",
        )
    return None
