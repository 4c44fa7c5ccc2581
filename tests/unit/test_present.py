"""What people read: every event and error has words, rates and times are short and right."""

from __future__ import annotations

import errno
import sqlite3
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest
from intarsia.app import present
from intarsia.pipelines import errors, events
from intarsia.pipelines.requests import GenerateRequest, TrainRequest

SAMPLES: list[tuple[events.Event, str]] = [
    (events.Stage(name="load", detail="mini"), "Loading the model: mini"),
    (events.Stage(name="polish"), "Polish"),
    (events.Progress(stage="denoise", step=3, total=20), "Drawing: step 3 of 20"),
    (events.Preview(path="/p.png", step=1), ""),
    (events.Metric(name="loss", value=1, step=1), ""),
    (events.Notice(text="Chosen: euler."), "Chosen: euler."),
    (events.Artifact(kind="picture", path="/a.png"), "Picture saved: /a.png"),
    (events.Artifact(kind="adapter", path="/a.safetensors", label="cat-style"), "Adapter saved: cat-style"),
    (events.Done(seconds=3.21), "Done in 3.2 s"),
    (events.Stopped(), "Stopped."),
    (events.Stopped(resumable=True), "Stopped; it can be resumed."),
    (events.Failed(code="input", message="No steps.", hint="Give some."), "No steps. Give some."),
    (
        events.Interrupted(resumable=True),
        "Interrupted: the process that did the work is gone; it can be resumed.",
    ),
]


@pytest.mark.parametrize(("event", "text"), SAMPLES, ids=lambda value: getattr(value, "type", None))
def test_every_event_has_its_words(event: events.Event, text: str) -> None:
    assert present.status(event) == text


def test_no_event_was_forgotten() -> None:
    union = typing.get_args(events.Event)[0]
    assert {type(event) for event, _ in SAMPLES} == set(typing.get_args(union))


def test_fractions_lie_between_0_and_1() -> None:
    assert present.fraction(events.Progress(stage="x", step=5, total=20)) == 0.25
    assert present.fraction(events.Progress(stage="x", step=25, total=20)) == 1.0
    assert present.fraction(events.Progress(stage="x", step=0, total=0)) is None
    assert present.fraction(events.Done()) == 1.0
    assert present.fraction(events.Notice(text="x")) is None


@pytest.mark.parametrize("kind", [errors.InputError, errors.AdapterError, errors.WeightsError, errors.MemoryLimitError])
def test_a_persons_error_gives_code_2_and_its_own_words(kind: type[errors.IntarsiaError]) -> None:
    shown = present.show_error(kind("What is wrong.", "What to do."))
    assert (shown.message, shown.hint, shown.exit_code, shown.code) == (
        "What is wrong.",
        "What to do.",
        2,
        kind.code,
    )


@pytest.mark.parametrize(
    ("error", "free", "said", "hint"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 5_000, "is full (0.0 MB free)", "INTARSIA_HOME"),
        (sqlite3.OperationalError("database or disk is full"), 2_000_000, "is full (2.0 MB free)", "INTARSIA_HOME"),
        (sqlite3.OperationalError("disk I/O error"), 0, "is full (0.0 MB free)", "INTARSIA_HOME"),
        (sqlite3.OperationalError("unable to open database file"), 10**9, "job store cannot be used", "read-only"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), 10**9, "/a/b: Permission denied.", "permissions"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/a/b"), 0, "/a/b: No such file.", "folder"),
    ],
    ids=str,
)
def test_a_disk_that_refuses_is_told_in_words(
    error: OSError | sqlite3.Error, free: int, said: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(present.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))  # pyright: ignore
    told = present.storage_error(error, tmp_path / "not" / "there")
    assert said in told.message and hint in told.hint
    assert present.show_error(told).exit_code == 2


def test_a_bug_gives_code_1_and_a_stop_130() -> None:
    assert present.show_error(KeyError("x")).exit_code == 1
    assert present.show_error(errors.Cancelled()).exit_code == 130
    assert present.show_error(KeyboardInterrupt()).exit_code == 130


def test_exit_codes_follow_the_last_event() -> None:
    assert present.exit_code(events.Done()) == 0
    assert present.exit_code(events.Stopped()) == 130
    assert present.exit_code(events.Interrupted()) == 130
    assert present.exit_code(events.Failed(code="input", message="x")) == 2
    assert present.exit_code(events.Failed(code="bug", message="x")) == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (4.24, "4.2 s"),
        (9.96, "10 s"),
        (59.96, "1 min 0 s"),
        (185.4, "3 min 5 s"),
        (3600, "1 h 0 min"),
        (7799, "2 h 9 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert present.duration(seconds) == text


@pytest.mark.parametrize(("speed", "text"), [(12.34, "12.3 steps/s"), (0.25, "4.0 s per step"), (0, "-")])
def test_rates(speed: float, text: str) -> None:
    assert present.rate(speed) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(812, "812 bytes"), (1500, "1.5 kB"), (29_400_000, "29.4 MB"), (812e6, "812 MB"), (1.4e9, "1.4 GB")],
)
def test_sizes(count: float, text: str) -> None:
    assert present.size(count) == text


def test_pace_measures_the_last_seconds_only() -> None:
    pace = present.Pace()
    assert pace.text() == ""
    pace.update(events.Progress(stage="train", step=0, total=100), now=0.0)
    assert pace.text() == ""
    pace.update(events.Progress(stage="train", step=1, total=100), now=10.0)  # a slow first step
    for step in range(2, 50):
        pace.update(events.Progress(stage="train", step=step, total=100), now=10.0 + (step - 1) * 0.5)
    assert pace.per_second == pytest.approx(2.0)
    assert pace.text() == "2.0 steps/s, 26 s left"


def test_pace_starts_again_with_every_stage_and_picture() -> None:
    pace = present.Pace()
    for step in range(3):
        pace.update(events.Progress(stage="denoise", step=step, total=3), now=float(step))
    pace.update(events.Progress(stage="denoise", step=0, total=3), now=3.0)
    assert pace.per_second == 0.0
    pace.update(events.Progress(stage="decode", step=1, total=3), now=4.0)
    assert pace.per_second == 0.0


def test_jobs_are_named_by_what_was_asked_for() -> None:
    assert present.title(GenerateRequest(prompt="an apple")) == "an apple"
    assert len(present.title(GenerateRequest(prompt="x" * 500))) == 60
    assert present.title(GenerateRequest()) == "(no prompt)"
    assert present.title(TrainRequest(recipe="blora", name="cat")) == "blora training: cat"
