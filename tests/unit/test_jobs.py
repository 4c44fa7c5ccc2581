"""The job store: one state for every process, and the truth about jobs whose process died."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from intarsia.app import jobs as jobs_module
from intarsia.app.jobs import Job, JobStore, checkpoint_of
from intarsia.app.processes import is_alive, this_process
from intarsia.app.recorder import Recorder
from intarsia.app.settings import Home
from intarsia.pipelines.errors import InputError
from intarsia.pipelines.events import (
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
from intarsia.pipelines.requests import AdapterUse, GenerateRequest, TrainRequest

ASK = GenerateRequest(prompt="an apple", seed=3, adapters=(AdapterUse(adapter="x", weight=0.5),))
LEARN = TrainRequest(recipe="lora", name="cat")


@pytest.fixture
def store(home: Home) -> Iterator[JobStore]:
    made = JobStore(home)
    yield made
    made.close()


def own(store: JobStore, request: GenerateRequest | TrainRequest = ASK) -> Job:
    return store.submit(request, owner=this_process())


def bodies(store: JobStore, job: Job) -> list[Event]:
    return [event for _, event in store.events(job.id)]


def dead_owner() -> str:
    """The name of a process that is gone."""
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    return f"{this_process().split('|', maxsplit=1)[0]}|{child.pid}|1.00"


def test_a_job_comes_back_as_it_was_submitted(store: JobStore) -> None:
    job = store.submit(ASK)
    assert store.job(job.id) == job
    assert (job.request, job.state, job.kind, job.started) == (ASK, "queued", "generate", None)
    assert job.folder.is_dir()


def test_jobs_are_listed_newest_first_and_by_kind_and_state(store: JobStore) -> None:
    first, second, third = store.submit(ASK), store.submit(LEARN), store.submit(ASK)
    assert [job.id for job in store.jobs()] == [third.id, second.id, first.id]
    assert [job.id for job in store.jobs(kind="train")] == [second.id]
    store.cancel(first.id)
    assert [job.id for job in store.jobs(state="queued")] == [third.id, second.id]
    assert [job.id for job in store.jobs(limit=1)] == [third.id]


def test_an_unknown_job_is_refused_with_a_sentence(store: JobStore) -> None:
    for look in (store.job, store.cancel):
        with pytest.raises(InputError, match="There is no job nothing"):
            look("nothing")


def test_workers_take_jobs_in_order_and_only_those_of_their_device(store: JobStore) -> None:
    anywhere, pinned = store.submit(ASK), store.submit(ASK, device="cuda:1")
    taken = [store.claim("cpu"), store.claim("cpu"), store.claim("cuda:1")]
    assert taken[0] is not None and (taken[0].id, taken[0].device, taken[0].state) == (anywhere.id, "cpu", "running")
    assert taken[1] is None
    assert taken[2] is not None and taken[2].id == pinned.id


def claim_all(root: Path, device: str) -> list[str]:
    store = JobStore(Home(root))
    found: list[str] = []
    while (job := store.claim(device)) is not None:
        found.append(job.id)
    store.close()
    return found


def test_threads_never_claim_the_same_job(store: JobStore) -> None:
    wanted = {store.submit(ASK).id for _ in range(60)}
    with ThreadPoolExecutor(6) as pool:
        parts = list(pool.map(claim_all, [store.home.root] * 6, ["cpu"] * 6))
    taken = [job_id for part in parts for job_id in part]
    assert len(taken) == len(wanted) and set(taken) == wanted


CLAIM = """
import sys
from pathlib import Path
from intarsia.app.jobs import JobStore
from intarsia.app.settings import Home
store = JobStore(Home(Path(sys.argv[1])))
while (job := store.claim(sys.argv[2])) is not None:
    print(job.id)
"""


def test_processes_never_claim_the_same_job(store: JobStore) -> None:
    wanted = {store.submit(ASK).id for _ in range(60)}
    claimers = [
        subprocess.Popen([sys.executable, "-c", CLAIM, str(store.home.root), device], stdout=subprocess.PIPE, text=True)
        for device in ("cpu", "cpu", "other")
    ]
    taken = [job_id for claimer in claimers for job_id in claimer.communicate(timeout=60)[0].split()]
    assert len(taken) == len(wanted) and set(taken) == wanted


EVENTS: list[Event] = [
    Stage(name="load", detail="mini"),
    Progress(stage="denoise", step=1, total=2),
    Preview(path="/x.png", step=1),
    Metric(name="loss", value=0.25, step=1),
    Notice(text="größer"),
]


def test_events_are_numbered_and_given_from_any_number_on(store: JobStore) -> None:
    job = own(store)
    assert store.append(job.id, EVENTS[:2]) and store.append(job.id, EVENTS[2:])
    assert store.events(job.id) == list(enumerate(EVENTS, start=1))
    assert store.events(job.id, after=3) == [(4, EVENTS[3]), (5, EVENTS[4])]
    assert store.events(job.id, after=5) == []


@pytest.mark.parametrize(
    ("event", "state"),
    [
        (Done(seconds=2), "done"),
        (Stopped(resumable=True), "stopped"),
        (Failed(code="input", message="No."), "failed"),
        (Interrupted(), "interrupted"),
    ],
)
def test_the_last_event_and_the_state_arrive_together(store: JobStore, event: Event, state: str) -> None:
    job = own(store)
    assert store.finish(job.id, event)
    after = store.job(job.id)
    assert (after.state, after.resumable, bodies(store, job)) == (state, getattr(event, "resumable", False), [event])
    assert after.finished is not None and after.finished_already
    assert not store.finish(job.id, Done()), "a job ends once"
    assert not store.append(job.id, [Notice(text="late")])
    assert bodies(store, job) == [event]


def test_only_the_owner_writes_events(store: JobStore) -> None:
    job = own(store)
    assert not store.append(job.id, EVENTS, owner=dead_owner())
    assert not store.finish(job.id, Done(), owner=dead_owner())
    assert bodies(store, job) == []


def test_cancelling_a_queued_job_stops_it_at_once(store: JobStore) -> None:
    job = store.submit(ASK)
    store.cancel(job.id)
    assert store.job(job.id).state == "stopped" and bodies(store, job) == [Stopped()]
    assert store.claim("cpu") is None


def test_cancelling_a_running_job_raises_its_flag(store: JobStore) -> None:
    job = own(store)
    assert not store.cancel_asked(job.id)
    store.cancel(job.id)
    assert store.cancel_asked(job.id) and store.job(job.id).cancelling and store.job(job.id).state == "running"


def test_a_job_of_a_dead_process_becomes_interrupted_at_once(store: JobStore) -> None:
    mine, queued = own(store), store.submit(ASK)
    lost = store.submit(ASK, owner=dead_owner())
    assert [job.id for job in store.reap()] == [lost.id]
    assert [store.job(job.id).state for job in (mine, queued, lost)] == ["running", "queued", "interrupted"]
    assert bodies(store, lost) == [Interrupted()]
    assert store.reap() == []


def test_a_killed_process_counts_as_dead_before_it_is_buried(store: JobStore) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    process = psutil.Process(child.pid)
    owner = f"{this_process().split('|', maxsplit=1)[0]}|{child.pid}|{process.create_time():.2f}"
    assert is_alive(owner)
    child.kill()
    deadline = time.monotonic() + 5
    while process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_alive(owner) is False
    child.wait()


def test_a_reused_process_id_is_not_the_owner() -> None:
    host, pid, _ = this_process().rsplit("|", 2)
    assert is_alive(this_process()) is True
    assert is_alive(f"{host}|{pid}|1.00") is False


def test_on_another_host_only_the_lease_tells(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    job = store.submit(ASK, owner="elsewhere|1|1.00")
    assert store.reap() == []
    monkeypatch.setattr(jobs_module, "LEASE", -1.0)
    assert [lost.id for lost in store.reap()] == [job.id]


def test_a_living_but_silent_owner_is_given_patience(store: JobStore) -> None:
    job = own(store)
    assert store.reap(patience=30) == []
    assert [lost.id for lost in store.reap(patience=-1)] == [job.id]


def test_an_interrupted_training_is_resumable_when_it_kept_a_checkpoint(store: JobStore, tmp_path: Path) -> None:
    without, with_own = store.submit(LEARN, owner=dead_owner()), store.submit(LEARN, owner=dead_owner())
    (with_own.folder / "checkpoint").mkdir()
    (with_own.folder / "checkpoint" / "state.json").write_text("{}")
    earlier = tmp_path / "checkpoint"
    earlier.mkdir()
    (earlier / "state.json").write_text("{}")
    inherited = store.submit(LEARN.model_copy(update={"resume_from": str(earlier)}), owner=dead_owner())
    picture = store.submit(ASK, owner=dead_owner())
    store.reap()
    found = {job.id: job.resumable for job in store.jobs()}
    assert found == {without.id: False, with_own.id: True, inherited.id: True, picture.id: False}
    assert checkpoint_of(inherited) == earlier


def test_one_worker_per_device_and_a_dead_one_is_replaced(store: JobStore) -> None:
    assert store.register_worker("cpu", dead_owner()) and store.worker("cpu") is None
    assert store.register_worker("cpu") and store.worker("cpu") == this_process()
    assert not store.register_worker("cpu", "elsewhere|1|1.00")
    assert store.beat_worker("cpu")
    store.leave_worker("cpu")
    assert store.worker("cpu") is None and not store.beat_worker("cpu")


def test_servers_are_seen_while_they_live(store: JobStore) -> None:
    assert not store.has_server()
    store.beat_server()
    assert store.has_server()
    store.leave_server()
    assert not store.has_server()


def test_two_stores_on_one_home_see_the_same(store: JobStore, home: Home) -> None:
    job = own(store)
    store.append(job.id, EVENTS)
    other = JobStore(home)
    assert other.jobs() == store.jobs() and other.events(job.id) == store.events(job.id)
    other.close()


def test_stores_may_be_opened_all_at_once(home: Home) -> None:
    gate, errors = threading.Barrier(8), list[Exception]()

    def open_and_write() -> None:
        gate.wait()
        try:
            made = JobStore(home)
            made.submit(ASK)
            made.close()
        except sqlite3.Error as error:
            errors.append(error)

    threads = [threading.Thread(target=open_and_write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    store = JobStore(home)
    assert len(store.jobs()) == 8
    store.close()


def test_connections_of_ended_threads_are_closed(store: JobStore) -> None:
    before = psutil.Process().num_fds()
    for _ in range(20):
        thread = threading.Thread(target=store.jobs)
        thread.start()
        thread.join()
    assert psutil.Process().num_fds() - before < 12


def test_the_recorder_batches_frequent_events_and_loses_none(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    job, calls = own(store), list[int]()
    append = store.append

    def counted(job_id: str, events: list[Event], owner: str | None = None) -> bool:
        calls.append(len(list(events)))
        return append(job_id, events, owner)

    monkeypatch.setattr(store, "append", counted)
    with Recorder(store, job) as recorder:
        for step in range(60):
            recorder.put(Progress(stage="train", step=step, total=60))
            recorder.put(Metric(name="loss", value=step, step=step))
            time.sleep(0.005)
        recorder.put(Done())
    found = bodies(store, job)
    assert [event.step for event in found if isinstance(event, Metric)] == list(range(60))
    assert [event.step for event in found if isinstance(event, Progress)][-1] == 59
    assert isinstance(found[-1], Done) and store.job(job.id).state == "done"
    assert len(calls) < 30, "about ten transactions a second, not one an event"


def test_waiting_events_appear_within_half_a_second(store: JobStore) -> None:
    job = own(store)
    with Recorder(store, job) as recorder:
        recorder.put(Metric(name="loss", value=1, step=1))
        time.sleep(0.5)
        assert len(bodies(store, job)) == 1
        recorder.put(Notice(text="at once"))
        assert len(bodies(store, job)) == 2
        recorder.put(Stopped())


def test_the_recorder_notices_that_the_job_was_taken_away(store: JobStore) -> None:
    job = own(store)
    with Recorder(store, job) as recorder:
        store.reap(patience=-1)
        recorder.put(Notice(text="anybody?"))
        assert recorder.lost
        recorder.put(Done())
    assert store.job(job.id).state == "interrupted" and bodies(store, job) == [Interrupted()]


def test_the_end_of_a_job_is_recorded_as_soon_as_there_is_room(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, finish, seen = own(store), store.finish, list[bool]()

    def full(job_id: str, event: Event, owner: str | None = None) -> bool:
        seen.append((job.folder / "reserve").exists())
        if seen[-1]:
            raise sqlite3.OperationalError("database or disk is full")
        return finish(job_id, event, owner)

    monkeypatch.setattr(store, "finish", full)
    with Recorder(store, job) as recorder:
        recorder.put(Failed(code="memory", message="The disk is full."))
    assert seen == [True, False], "the reserve is given up so that the end can be written"
    assert store.job(job.id).state == "failed"
