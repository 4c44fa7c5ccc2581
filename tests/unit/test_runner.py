"""The runner turns whatever happens in the work into events, and nothing that happens kills its process."""

from __future__ import annotations

import errno
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from intarsia.app.jobs import JobStore
from intarsia.app.processes import this_process
from intarsia.app.runner import Runner, perform, shortage
from intarsia.app.settings import Home
from intarsia.pipelines import sources
from intarsia.pipelines.errors import Cancelled, InputError
from intarsia.pipelines.events import (
    Artifact,
    CancelToken,
    Done,
    Event,
    Failed,
    Interrupted,
    Notice,
    Progress,
    Stage,
    Stopped,
)
from intarsia.pipelines.requests import AdapterUse, GenerateRequest, TrainRequest

Work = Callable[..., Iterator[Event]]


class FakeResident:
    def get(self, name: str, device: str, offload: bool | None) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, device=device, dtype="torch.float32", notes=("Chosen: float32.",), source=name
        )


class FakeShelf:
    """Remembers what was put on it; the name "taken" is taken."""

    def __init__(self) -> None:
        self.added: list[tuple[str, str, str]] = []

    def find(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, path=Path(f"/shelf/{name}.safetensors"))

    def add(self, path: Path, name: str, *, numbered: bool, group: str, thumbnail: Path | None) -> SimpleNamespace:
        assert numbered, "a result of an hour's work must never be refused for its name"
        self.added.append((str(path), str(thumbnail), group))
        name = "taken-2" if name == "taken" else name
        return SimpleNamespace(name=name, path=Path(f"/shelf/{name}.safetensors"))


@pytest.fixture
def store(home: Home) -> Iterator[JobStore]:
    made = JobStore(home)
    yield made
    made.close()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Work], None]:
    """Put `work` in the place of generation and training, and plain markers in that of adapters."""

    def put(name: str, **content: object) -> None:
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)

    def make(work: Work) -> None:
        put("intarsia.pipelines.image", generate=work)
        monkeypatch.setattr(sources, "unet_shapes", "shapes of {}".format)
        put("intarsia.training.run", train=work)
        put("intarsia.pipelines.attach", Attachment=attach)
        put("intarsia.pipelines.adapter_file", read_adapter=read)

    return make


def attach(name: str, adapter: SimpleNamespace, weight: float, *parts: object) -> tuple[object, ...]:
    return name, adapter.sha256, weight, *parts


def read(path: Path, shapes: str) -> SimpleNamespace:
    assert shapes == "shapes of mini", "an adapter is read against the model it is for"
    return SimpleNamespace(sha256=f"sha of {path.name}")


def run(store: JobStore, request: GenerateRequest | TrainRequest, token: CancelToken | None = None) -> list[Event]:
    job = store.submit(request, owner=this_process())
    runner = Runner(store, FakeShelf(), FakeResident(), "cpu")  # type: ignore[arg-type]
    events = list(perform(runner, store, job, token or CancelToken()))
    assert [event for _, event in store.events(job.id)][-1] == events[-1]
    return events


def raising(error: BaseException) -> Work:
    def work(*_: object) -> Iterator[Event]:
        yield Stage(name="denoise")
        raise error

    return work


ASK = GenerateRequest(prompt="x", seed=1)


def test_work_that_ends_is_done(store: JobStore, install: Callable[[Work], None]) -> None:
    install(lambda *_: iter([Artifact(kind="picture", path="/a.png")]))
    events = run(store, ASK)
    assert [event.type for event in events] == ["stage", "stage", "artifact", "done"]
    assert events[1] == Stage(name="ready", detail="mini on cpu, float32")
    assert store.jobs()[0].state == "done"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("No such size.", "Choose another."), "input", "No such size."),
        (OSError(errno.ENOSPC, "No space left on device"), "memory", "The disk with"),
        (
            RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "memory",
            "The disk",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "memory", "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory", "not enough memory"),
        (MemoryError(), "memory", "not enough memory"),
        (ZeroDivisionError("division by zero"), "bug", "Something in Intarsia broke during job"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_every_failure_becomes_one_clear_event(
    store: JobStore, install: Callable[[Work], None], error: Exception, code: str, words: str
) -> None:
    install(raising(error))
    final = run(store, ASK)[-1]
    assert isinstance(final, Failed) and final.code == code and words in final.message and final.hint
    assert store.jobs()[0].state == "failed"


def test_a_bug_leaves_its_traceback_in_the_jobs_log(store: JobStore, install: Callable[[Work], None]) -> None:
    install(raising(ZeroDivisionError("division by zero")))
    final = run(store, ASK)[-1]
    job = store.jobs()[0]
    log = job.folder / "log.txt"
    assert isinstance(final, Failed) and job.id in final.message and str(log) in final.hint
    assert "raise error" in log.read_text() and "ZeroDivisionError" in log.read_text()


def test_the_runner_goes_on_after_a_bug(store: JobStore, install: Callable[[Work], None]) -> None:
    install(raising(ZeroDivisionError()))
    run(store, ASK)
    install(lambda *_: iter([Notice(text="fine")]))
    assert isinstance(run(store, ASK)[-1], Done)


def test_a_stop_asked_for_in_the_store_reaches_the_work(store: JobStore, install: Callable[[Work], None]) -> None:
    def endless(*given: object) -> Iterator[Event]:
        token = given[-1]
        assert isinstance(token, CancelToken)
        for step in range(100_000):
            token.check()
            yield Progress(stage="denoise", step=step, total=100_000)
            time.sleep(0.01)
            if step == 3:
                store.cancel(store.jobs()[0].id)

    install(endless)
    began = time.monotonic()
    assert run(store, ASK)[-1] == Stopped()
    assert time.monotonic() - began < 2


def test_a_stopped_training_with_a_checkpoint_is_resumable(store: JobStore, install: Callable[[Work], None]) -> None:
    def work(request: TrainRequest, model: object, folder: Path, token: CancelToken) -> Iterator[Event]:
        (folder / "checkpoint").mkdir()
        (folder / "checkpoint" / "state.json").write_text("{}")
        yield Stage(name="train")
        raise Cancelled

    install(work)
    assert run(store, TrainRequest(recipe="lora", name="cat"))[-1] == Stopped(resumable=True)
    assert store.jobs()[0].resumable


def test_leaving_early_interrupts_the_job_and_closes_the_work(store: JobStore, install: Callable[[Work], None]) -> None:
    closed: list[bool] = []

    def work(*_: object) -> Iterator[Event]:
        try:
            yield Notice(text="one")
            yield Notice(text="two")
        finally:
            closed.append(True)

    install(work)
    job = store.submit(ASK, owner=this_process())
    viewer = perform(Runner(store, FakeShelf(), FakeResident()), store, job, CancelToken())  # type: ignore[arg-type]
    while next(viewer) != Notice(text="one"):
        pass
    viewer.close()
    assert closed == [True]
    assert store.job(job.id).state == "interrupted"
    assert store.events(job.id)[-1][1] == Interrupted()


def test_the_job_names_the_adapters_that_were_used(store: JobStore, install: Callable[[Work], None]) -> None:
    given: list[object] = []

    def work(request: GenerateRequest, model: object, attachments: list[object], *_: object) -> Iterator[Event]:
        given.extend(attachments)
        yield Notice(text="seen")

    install(work)
    run(store, ASK.model_copy(update={"adapters": (AdapterUse(adapter="cat", weight=0.5, last=0.6),)}))
    request = store.jobs()[0].request
    assert isinstance(request, GenerateRequest)
    assert given == [("cat", "sha of cat.safetensors", 0.5, {}, (0.0, 0.6))]
    assert request.adapters == (AdapterUse(adapter="cat", weight=0.5, last=0.6, sha256="sha of cat.safetensors"),)


def test_trained_adapters_go_onto_the_shelf_as_one_group(store: JobStore, install: Callable[[Work], None]) -> None:
    install(
        lambda *_: iter(
            [
                Artifact(kind="sample", path="/j/sample.png", step=3),
                Artifact(kind="adapter", path="/j/cat-content.safetensors", label="cat-content"),
                Artifact(kind="adapter", path="/j/taken.safetensors", label="taken"),
            ]
        )
    )
    job = store.submit(TrainRequest(recipe="blora", name="cat"), owner=this_process())
    shelf = FakeShelf()
    events = list(perform(Runner(store, shelf, FakeResident()), store, job, CancelToken()))  # type: ignore[arg-type]
    made = [event for event in events if isinstance(event, Artifact)]
    assert [(item.label, item.path) for item in made] == [
        ("", "/j/sample.png"),
        ("cat-content", "/shelf/cat-content.safetensors"),
        ("taken-2", "/shelf/taken-2.safetensors"),
    ]
    assert {(thumbnail, group) for _, thumbnail, group in shelf.added} == {("/j/sample.png", job.id)}
    assert any(isinstance(event, Notice) and "taken-2" in event.text for event in events)


def test_a_full_disk_under_the_job_store_fails_the_job_in_words(
    store: JobStore, install: Callable[[Work], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(lambda *_: iter([Notice(text="write me")]))
    append = store.append

    def full(job_id: str, events: Sequence[Event], owner: str | None = None) -> bool:
        if any(isinstance(event, Notice) for event in events):
            raise sqlite3.OperationalError("database or disk is full")
        return append(job_id, events, owner)

    monkeypatch.setattr(store, "append", full)
    job = store.submit(ASK, owner=this_process())
    runner = Runner(store, FakeShelf(), FakeResident(), "cpu")  # type: ignore[arg-type]
    final = list(perform(runner, store, job, CancelToken()))[-1]
    assert isinstance(final, Failed) and "is full" in final.message


def test_other_errors_are_no_shortage(tmp_path: Path) -> None:
    assert shortage(OSError(errno.EACCES, "Permission denied"), tmp_path) is None
    assert shortage(RuntimeError("shape mismatch"), tmp_path) is None
