"""The service layer on the real path: a real worker process, a tiny SDXL model, real files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from intarsia.app.jobs import JobStore
from intarsia.app.processes import is_alive, pid_of
from intarsia.app.settings import Home
from intarsia.app.studio import Job, Studio
from intarsia.pipelines.errors import IntarsiaError
from intarsia.pipelines.events import Artifact, Done, Event, Failed, Interrupted, Metric, Notice, Progress, Stopped
from intarsia.pipelines.requests import AdapterUse, GenerateRequest, TrainingPicture, TrainRequest
from PIL import Image

WAIT = 120.0  # seconds a worker may need to load torch on a busy machine


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """One studio with one worker for all tests of this file: loading torch takes seconds."""
    with Studio(Home(tmp_path_factory.mktemp("home")), linger=2).start() as made:
        yield made
        worker = made.store.worker("auto")
    if worker is not None:
        wait(lambda: not is_alive(worker), 20)


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> str:
    return str(tiny("sdxl", variant="vpred"))


@pytest.fixture
def picture(tmp_path: Path) -> TrainingPicture:
    path = tmp_path / "cat.png"
    Image.linear_gradient("L").convert("RGB").save(path)
    return TrainingPicture(path=str(path), caption="a cat")


def wait(condition: object, seconds: float = WAIT) -> float:
    """Wait until `condition()` is true; gives the seconds it took."""
    assert callable(condition)
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "waited in vain"
        time.sleep(0.02)
    return time.monotonic() - began


def finish(studio: Studio, job: Job) -> list[Event]:
    return [event for _, event in studio.follow(job.id)]


def reached(studio: Studio, job: Job, stage: str, step: int = 1) -> bool:
    return any(
        isinstance(event, Progress) and event.stage == stage and event.step >= step
        for _, event in studio.events(job.id)
    )


def picture_of(events: list[Event]) -> Path:
    return next(Path(event.path) for event in events if isinstance(event, Artifact) and event.kind == "picture")


def kill_worker(studio: Studio) -> None:
    owner = studio.store.worker("auto")
    assert owner is not None
    os.kill(pid_of(owner), signal.SIGKILL)


def small(model: str, **more: object) -> GenerateRequest:
    return GenerateRequest.parse(
        {"model": model, "prompt": "a red apple", "seed": 7, "steps": 3, "width": 64, "height": 64, **more}
    )


def training(model: str, picture: TrainingPicture, steps: int, **more: object) -> TrainRequest:
    options = {"steps": steps, "rank": 2, "resolution": 64, "sample_every": 0, "checkpoint_every": 5}
    return TrainRequest.parse(
        {"recipe": "lora", "model": model, "name": "cat", "pictures": [picture], "options": options, **more}
    )


def test_a_picture_is_made_and_shown_by_every_studio_of_the_home(studio: Studio, model: str) -> None:
    job = studio.submit(small(model, seed=-1))
    events = finish(studio, job)
    made = [event for event in events if isinstance(event, Artifact) and event.kind == "picture"]
    assert isinstance(events[-1], Done), events[-1]
    assert len(made) == 1 and Image.open(made[0].path).size == (64, 64)
    assert Path(made[0].path).is_relative_to(studio.home.outputs)
    request = studio.job(job.id).request
    assert isinstance(request, GenerateRequest) and request.seed >= 0, "the seed was drawn when it was submitted"
    with Studio(studio.home) as other:
        assert other.job(job.id) == studio.job(job.id)
        assert [event for _, event in other.follow(job.id)] == events
        assert next(number for number, _ in other.follow(job.id, after=2)) == 3


def test_the_same_request_gives_the_same_bytes_in_the_worker_and_here(studio: Studio, model: str) -> None:
    first = finish(studio, studio.submit(small(model)))
    second = list(studio.run(small(model)))
    paths = [
        next(e.path for e in events if isinstance(e, Artifact) and e.kind == "picture") for events in (first, second)
    ]
    assert paths[0] != paths[1] and Path(paths[0]).read_bytes() == Path(paths[1]).read_bytes()
    assert studio.jobs(limit=1)[0].state == "done"


def test_stop_answers_within_two_seconds(studio: Studio, model: str) -> None:
    job = studio.submit(small(model, steps=200, count=64))
    wait(lambda: reached(studio, job, "denoise", 2))
    began = time.monotonic()
    studio.cancel(job.id)
    assert isinstance(finish(studio, job)[-1], Stopped)
    assert time.monotonic() - began < 2


def test_jobs_wait_in_line_and_a_waiting_one_can_be_stopped(studio: Studio, model: str) -> None:
    long = studio.submit(small(model, steps=200, count=64))
    waiting = studio.submit(small(model))
    wait(lambda: reached(studio, long, "denoise"))
    assert studio.job(waiting.id).state == "queued"
    studio.cancel(waiting.id)
    assert finish(studio, waiting) == [Stopped()]
    studio.cancel(long.id)
    finish(studio, long)


def test_a_killed_worker_interrupts_its_job_and_a_new_one_resumes_it(
    studio: Studio, model: str, picture: TrainingPicture
) -> None:
    job = studio.submit(training(model, picture, steps=5000))
    wait(lambda: reached(studio, job, "train", 12))
    kill_worker(studio)
    took = wait(lambda: studio.job(job.id).state == "interrupted", 5)
    assert took < 5
    assert studio.events(job.id)[-1][1] == Interrupted(resumable=True)
    assert studio.job(job.id).resumable

    again = studio.resume(job.id)
    assert again.parent == job.id
    wait(lambda: reached(studio, again, "train", 11))
    events = [event for _, event in studio.events(again.id)]
    steps = [event.step for event in events if isinstance(event, Metric) and event.name == "loss"]
    assert steps and min(steps) >= 5, "it went on instead of starting again"
    studio.cancel(again.id)
    assert finish(studio, again)[-1] == Stopped(resumable=True)


def test_a_trained_adapter_enters_the_library_and_makes_pictures(
    studio: Studio, model: str, picture: TrainingPicture
) -> None:
    events = finish(studio, studio.submit(training(model, picture, steps=3, name="kitten")))
    assert isinstance(events[-1], Done), events[-1]
    made = [event for event in events if isinstance(event, Artifact) and event.kind == "adapter"]
    assert [event.label for event in made] == ["kitten"]
    entry = studio.shelf.find("kitten")
    assert str(entry.path) == made[0].path
    job = studio.submit(small(model, adapters=[AdapterUse(adapter="kitten", weight=0.5)]))
    events = finish(studio, job)
    assert isinstance(events[-1], Done), events[-1]
    assert any(isinstance(event, Notice) and "modules matched" in event.text for event in events)
    request = studio.job(job.id).request
    assert isinstance(request, GenerateRequest) and request.adapters[0].sha256 == entry.sha256


def test_a_failure_is_told_in_words_and_the_worker_goes_on(studio: Studio, model: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG not really")
    final = finish(studio, studio.submit(training(model, TrainingPicture(path=str(broken)), steps=3)))[-1]
    assert isinstance(final, Failed) and final.code == "input" and "broken.png" in final.message
    assert isinstance(finish(studio, studio.submit(small(model)))[-1], Done)


def test_a_second_server_adopts_the_worker(studio: Studio, model: str) -> None:
    finish(studio, studio.submit(small(model)))
    worker = studio.store.worker("auto")
    with Studio(studio.home, linger=0.2).start() as other:
        time.sleep(1.2)
        assert other.store.worker("auto") == worker
        assert isinstance(finish(other, other.submit(small(model)))[-1], Done)
    assert studio.store.worker("auto") == worker, "the first server still needs it"


BAD = [
    ({"model": "no-such-model-anywhere"}, "no-such-model-anywhere"),
    ({"adapters": [{"adapter": "nobody"}]}, "nobody"),
]


@pytest.mark.parametrize(("change", "named"), BAD, ids=lambda value: value if isinstance(value, str) else None)
def test_a_wrong_request_is_refused_before_it_is_queued(
    studio: Studio, model: str, change: dict[str, object], named: str
) -> None:
    before = len(studio.jobs(limit=1000))
    with pytest.raises(IntarsiaError) as caught:
        studio.submit(small(model).model_copy(update=dict(GenerateRequest.parse({"model": model, **change}))))
    assert named in caught.value.message
    assert len(studio.jobs(limit=1000)) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe": "magic"}, "magic"),
        ({"pictures": []}, ""),
        ({"pictures": [{"path": "/nowhere/cat.png"}]}, "/nowhere/cat.png"),
        ({"options": {"stepps": 3}}, "stepps"),
        ({"options": {"steps": 0}}, "Steps"),
    ],
)
def test_a_wrong_training_is_refused_before_it_is_queued(
    studio: Studio, model: str, picture: TrainingPicture, change: dict[str, object], named: str
) -> None:
    with pytest.raises(IntarsiaError) as caught:
        studio.submit(training(model, picture, 3, **change))
    assert named in caught.value.message


def test_only_jobs_with_a_checkpoint_can_be_resumed(studio: Studio, model: str) -> None:
    job = studio.submit(small(model))
    finish(studio, job)
    with pytest.raises(IntarsiaError, match="kept no checkpoint"):
        studio.resume(job.id)


def test_a_worker_without_a_page_ends_its_job_and_leaves(home: Home, model: str) -> None:
    with Studio(home, linger=0.2).start() as page:
        job = page.submit(small(model))
        wait(lambda: page.job(job.id).state == "running")
    store = JobStore(home)
    wait(lambda: store.job(job.id).finished_already)
    assert store.job(job.id).state == "done"
    wait(lambda: store.worker("auto") is None, 20)
    store.close()


def test_a_worker_that_cannot_start_fails_the_waiting_jobs(
    home: Home, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Studio(home).start() as page:
        job = page.submit(small(model))
        events = finish(page, job)
    assert isinstance(events[-1], Failed) and "does not start" in events[-1].message
    assert "worker-auto.log" in events[-1].hint


IDLE = """
import sys, time
from pathlib import Path
import psutil
from intarsia.app.settings import Home
from intarsia.app.studio import Studio
with Studio(Home(Path(sys.argv[1])), linger=0).start() as studio:
    studio.jobs(), studio.recipes(), studio.shelf.entries(), studio.models()
    time.sleep(0.3)
    heavy = sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "diffusers", "transformers", "peft"})
    print(",".join(heavy) or "none", psutil.Process().memory_info().rss)
"""


def test_the_service_layer_never_loads_torch_and_stays_small(home: Home) -> None:
    result = subprocess.run(
        [sys.executable, "-c", IDLE, str(home.root)], capture_output=True, text=True, timeout=60, check=True
    )
    heavy, memory = result.stdout.split()
    assert heavy == "none"
    assert int(memory) < 150e6, "the page adds gradio to this, and must stay under 500 MB"


def test_a_job_done_here_that_dies_is_interrupted_for_everybody(studio: Studio, model: str) -> None:
    code = (
        "import sys; from pathlib import Path; from intarsia.app.settings import Home\n"
        "from intarsia.app.studio import Studio; from intarsia.pipelines.requests import GenerateRequest\n"
        "studio = Studio(Home(Path(sys.argv[1])))\n"
        "for event in studio.run(GenerateRequest(model=sys.argv[2], steps=200, count=64, width=64, height=64)):\n"
        "    print(event.type, flush=True)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(studio.home.root), model], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    while child.stdout.readline().strip() != "progress":
        assert child.poll() is None
    job = studio.jobs(limit=1)[0]
    assert job.state == "running"
    child.kill()
    took = wait(lambda: studio.job(job.id).state == "interrupted", 5)
    child.wait()
    assert took < 5 and isinstance(studio.events(job.id)[-1][1], Interrupted)
