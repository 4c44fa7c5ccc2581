"""The frame of the benches: records that resume, a page that needs nothing else, discovery, flags, statistics."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from intarsia.app.cli import app
from intarsia.app.cli_evaluate import add_evaluate
from intarsia.app.evaluation import run
from intarsia.app.evaluation.bench import Place, Sheet, Summary, Table, benches
from intarsia.app.evaluation.options import EvaluationOptions
from intarsia.app.evaluation.page import write_page, written
from intarsia.app.evaluation.records import Records
from intarsia.app.evaluation.statistics import deviation, interval, mean_spread, rank_correlation, ranks, shown
from intarsia.app.settings import Home
from intarsia.app.studio import Studio
from intarsia.pipelines.errors import InputError
from intarsia.pipelines.events import Artifact, CancelToken, Done, Event, Notice, Progress, Stopped
from intarsia.pipelines.options import describe
from PIL import Image
from typer.testing import CliRunner

HEADER = {"bench": "fake", "options": {"seed": 0}, "model": "a1"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records.jsonl"


# Records


def test_records_go_on_where_they_stopped(path: Path) -> None:
    first = Records(path, HEADER)
    first.add("cat/0", kind="picture", score=0.5)
    first.add("pace", seconds=1.5)
    again = Records(path, HEADER)
    assert again.resumed == 2
    assert again.has("cat/0")
    assert not again.has("cat/1")
    again.add("cat/1", kind="picture", score=0.25)
    scores = [row["score"] for row in Records(path, HEADER).rows("picture")]
    assert scores == [0.5, 0.25]
    assert json.loads(path.read_text().splitlines()[0]) == HEADER


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_cut_off_at_the_end_is_dropped_and_measured_again(path: Path, cut: int) -> None:
    records = Records(path, HEADER)
    records.add("cat/0", kind="picture", score=0.5)
    records.add("cat/1", kind="picture", score=0.75)
    path.write_bytes(path.read_bytes()[:-cut])
    again = Records(path, HEADER)
    assert [row["key"] for row in again.rows()] == ["cat/0"]
    again.add("cat/1", kind="picture", score=1.0)
    assert [row["score"] for row in Records(path, HEADER).rows()] == [0.5, 1.0]


def test_a_header_cut_off_begins_anew(path: Path) -> None:
    path.write_text('{"bench": "fa')
    Records(path, HEADER).add("cat/0", score=1)
    assert len(Records(path, HEADER)) == 1


def test_records_of_other_conditions_are_refused_by_name(path: Path) -> None:
    Records(path, HEADER).add("cat/0", score=1)
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"model.*\"a1\".*\"b2\"") as refused:
        Records(path, HEADER | {"model": "b2"})
    assert "--out" in refused.value.hint
    assert path.read_bytes() == before


def test_a_line_broken_in_the_middle_is_refused(path: Path) -> None:
    Records(path, HEADER)
    path.write_text(path.read_text() + "rubbish\n" + '{"key": "cat/0"}\n')
    with pytest.raises(InputError, match="Line 2"):
        Records(path, HEADER)


def test_a_row_is_written_once_and_finite(path: Path) -> None:
    records = Records(path, HEADER)
    records.add("cat/0", score=1)
    with pytest.raises(ValueError, match="already"):
        records.add("cat/0", score=2)
    with pytest.raises(ValueError):
        records.add("cat/1", score=math.nan)
    assert [row["key"] for row in Records(path, HEADER).rows()] == ["cat/0"]


# Statistics


def test_mean_and_standard_error_follow_their_formulas() -> None:
    mean, error = mean_spread([1, 2, 3, 4])
    assert mean == 2.5
    assert error == pytest.approx(math.sqrt(5 / 3) / 2)
    assert deviation([1, 2, 3, 4]) == pytest.approx(math.sqrt(5 / 3))
    assert mean_spread([7]) == (7, 0)
    assert math.isnan(mean_spread([])[0])
    assert shown([1, 2, 3, 4], 2) == "2.50 ± 0.65"


def test_an_interval_holds_its_share_and_never_leaves_0_to_1() -> None:
    low, high = interval(8, 10)
    assert (low, high) == (pytest.approx(0.490, abs=1e-3), pytest.approx(0.943, abs=1e-3))  # Wilson, by hand
    assert interval(0, 10)[0] == 0 and 0 < interval(0, 10)[1] < 0.35
    assert interval(10, 10)[1] == 1
    assert interval(0, 0) == (0, 1)


def test_ranks_agree_whatever_the_scale() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 100, 1e3, 1e4]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert ranks([5, 1, 5]) == [2.5, 1, 2.5]
    assert rank_correlation([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert math.isnan(rank_correlation([1, 1], [1, 2]))


# The page


def summary_of(folder: Path) -> Summary:
    Image.new("RGB", (300, 300), "red").save(folder / "red.png")
    rows = (("prompt only", 0.5, 12, "0.81 ± 0.02"), ("<lora> & more", math.nan, 1234, "0.79 ± 0.11"))
    table = Table("Arms", ("arm", "content", "pictures", "style"), rows, note="Higher is better.")
    sheet = Sheet("Pictures", (folder / "red.png",) * 2, ("a <red> one", ""), across=2)
    return Summary("A report", (table,), (sheet,), ("Only a sample.",), {"content_top1": 0.5, "pictures": 12})


def test_page_holds_everything_and_refers_to_nothing_outside(tmp_path: Path) -> None:
    write_page(summary_of(tmp_path), tmp_path / "report.html", HEADER)
    text = (tmp_path / "report.html").read_text("utf-8")
    references = re.findall(r"(?:src|href|srcset|action)\s*=\s*[\"']?([^\"'\s>]+)", text)
    assert len(references) == 2
    assert all(one.startswith("data:image/webp;base64,") for one in references)
    assert not re.search(r"https?:|@import|url\(|<script|<link", text)
    assert "prefers-color-scheme: dark" in text
    for words in ("A report", "Only a sample.", "Higher is better.", "content top1", "model", "a1"):
        assert words in text


def test_page_escapes_text_and_aligns_numbers(tmp_path: Path) -> None:
    write_page(summary_of(tmp_path), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "&lt;lora&gt; &amp; more" in text and "<lora>" not in text
    assert "a &lt;red&gt; one" in text
    for cell in ("0.500", "–", "1,234", "0.81 ± 0.02"):
        assert f'<td class="number">{cell}</td>' in text
    assert "<td>prompt only</td>" in text


def test_numbers_are_written_for_people() -> None:
    assert [written(cell) for cell in (0.12345, 1234567, math.inf, "as it is")] == [
        "0.123",
        "1,234,567",
        "–",
        "as it is",
    ]


def test_table_and_sheet_refuse_rows_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        Table("T", ("a", "b"), ((1,),))
    with pytest.raises(AssertionError):
        Sheet("S", (tmp_path,), (), 1)


# A whole run, with everything heavy replaced


class FakeBench:
    name = "fake"
    title = "Counts to three"
    options = EvaluationOptions

    def __init__(self) -> None:
        self.measured: list[int] = []
        self.interrupted_at = -1

    def run(self, options: EvaluationOptions, place: Place) -> Iterator[Event]:
        for index in range(3):
            place.token.check()
            if index == self.interrupted_at:
                os.kill(os.getpid(), signal.SIGINT)
            if not place.records.has(f"n/{index}"):
                self.measured.append(index)
                place.keep(f"n/{index}", Image.new("RGB", (8, 8)))
                place.records.add(f"n/{index}", kind="n", value=index + options.seed)
            yield Progress(stage="count", step=index + 1, total=3)

    def summarise(self, options: EvaluationOptions, place: Place) -> Summary:
        values = [row["value"] for row in place.records.rows("n")]
        sheet = Sheet("Kept", tuple(place.path(f"n/{index}") for index in range(3)), ("", "", ""), 3)
        return Summary("Fake", (Table("Sum", ("sum",), ((sum(values),),)),), (sheet,), (), {"sum": sum(values)})


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> FakeBench:
    """A bench in place of the real ones, on a model, judge and pictures that are not there."""
    from intarsia.pipelines import judge, models

    made = FakeBench()
    model = types.SimpleNamespace(notes=("A note.",))

    def get(*_: object, **__: object) -> Any:  # noqa: ANN401 - stands for a model
        return model

    def header(_: object, options: EvaluationOptions, *__: object) -> dict[str, Any]:
        return {"options": options.model_dump()}

    def nothing(*_: object) -> None: ...

    monkeypatch.setattr(models.Resident, "get", get)
    monkeypatch.setattr(judge.Judge, "load", nothing)
    monkeypatch.setattr(run, "open_pictures", nothing)
    monkeypatch.setattr(run, "header", header)
    monkeypatch.setattr(Studio, "benches", staticmethod(lambda: {"fake": made}))
    return made


def test_a_run_ends_with_report_and_summary_and_repeats_for_nothing(home: Home, bench: FakeBench) -> None:
    with Studio(home) as studio:
        events = list(studio.evaluate("fake", {"seed": 5}))
        assert isinstance(events[-1], Done)
        assert Notice(text="A note.") in events
        (report,) = [event for event in events if isinstance(event, Artifact)]
        assert Path(report.path) == home.root / "evaluations" / "fake" / "report.html"
        found = json.loads(Path(report.path).with_name("summary.json").read_text())
        assert found["figures"] == {"sum": 18}
        assert found["header"]["options"]["seed"] == 5
        assert isinstance(list(studio.evaluate("fake", {"seed": 5}))[-1], Done)
    assert bench.measured == [0, 1, 2]


def test_a_stopped_run_keeps_its_rows_and_goes_on(home: Home, bench: FakeBench) -> None:
    token = CancelToken()
    with Studio(home) as studio:
        events: list[Event] = []
        for event in studio.evaluate("fake", {}, token=token):
            events.append(event)
            if isinstance(event, Progress) and event.step == 2:
                token.cancel()
        assert events[-1] == Stopped(resumable=True)
        assert not (home.evaluations / "fake" / "report.html").exists()
        again = list(studio.evaluate("fake", {}))
    assert any(isinstance(event, Notice) and "Going on from 2 rows" in event.text for event in again)
    assert isinstance(again[-1], Done)
    assert bench.measured == [0, 1, 2]


def test_a_quick_run_and_a_full_one_do_not_meet(home: Home, bench: FakeBench) -> None:
    with Studio(home) as studio:
        list(studio.evaluate("fake", {"quick": True}))
        list(studio.evaluate("fake", {}))
        assert {path.name for path in home.evaluations.iterdir()} == {"fake", "fake-quick"}
        with pytest.raises(InputError, match="other settings"):
            list(studio.evaluate("fake", {"seed": 9}))


def test_an_unknown_bench_or_option_is_refused_before_anything_loads(home: Home, bench: FakeBench) -> None:
    with Studio(home) as studio:
        with pytest.raises(InputError, match="no bench"):
            studio.evaluate("nothing", {})
        with pytest.raises(InputError, match="Seed"):
            studio.evaluate("fake", {"seed": -1})
        with pytest.raises(InputError, match="no setting"):
            studio.evaluate("fake", {"colour": "red"})


def test_a_file_in_place_of_the_folder_is_refused(home: Home, bench: FakeBench, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with Studio(home) as studio, pytest.raises(InputError, match="it is a file"):
        list(studio.evaluate("fake", {}, tmp_path / "taken"))


def test_fingerprints_change_with_the_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"a")
    two.write_bytes(b"b")
    assert len({run.fingerprint(paths) for paths in ([one], [two], [one, two])}) == 3


def command() -> typer.Typer:
    """The command line with the bench that is there now."""
    made = typer.Typer()
    add_evaluate(made)
    return made


def test_command_prints_tables_and_where_the_report_is(home: Home, bench: FakeBench) -> None:
    done = CliRunner().invoke(command(), ["evaluate", "fake", "--seed", "2"])
    assert done.exit_code == 0, done.output
    report = home.root / "evaluations" / "fake" / "report.html"
    assert done.stdout.split() == ["Sum", "sum", "9", "Report:", str(report)]


def test_command_writes_json_lines_for_machines(home: Home, bench: FakeBench, tmp_path: Path) -> None:
    done = CliRunner().invoke(command(), ["evaluate", "fake", "--json", "--out", str(tmp_path / "here")])
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["step"] for line in lines if line["type"] == "progress"] == [1, 2, 3]
    assert lines[-1] == {
        "type": "result",
        "state": "done",
        "report": str(tmp_path / "here" / "report.html"),
        "figures": {"sum": 3},
    }


def test_interrupted_command_leaves_with_130_and_goes_on_next_time(home: Home, bench: FakeBench) -> None:
    bench.interrupted_at = 1
    stopped = CliRunner().invoke(command(), ["evaluate", "fake"])
    assert stopped.exit_code == 130
    assert "again to go on" in stopped.stdout
    bench.interrupted_at = -1
    assert CliRunner().invoke(command(), ["evaluate", "fake"]).exit_code == 0
    assert bench.measured == [0, 1, 2]


def test_command_refuses_in_words(home: Home, bench: FakeBench) -> None:
    assert CliRunner().invoke(command(), ["evaluate", "fake"]).exit_code == 0
    refused = CliRunner().invoke(command(), ["evaluate", "fake", "--seed", "1", "--json"])
    assert refused.exit_code == 2
    assert "other settings" in refused.stderr and "--out" in refused.stderr
    assert json.loads(refused.stdout.splitlines()[-1])["code"] == "input"


# The real benches


def test_benches_are_found_by_name() -> None:
    found = benches()
    assert {"base", "separation", "composition"} <= set(found)
    for name, bench in found.items():
        assert bench.name == name and bench.title
        assert issubclass(bench.options, EvaluationOptions)
        bench.options.parse({})  # every option has a default


@pytest.mark.parametrize("name", sorted(benches()))
def test_help_lists_every_option_of_a_bench(name: str) -> None:
    shown_help = CliRunner().invoke(app, ["evaluate", name, "--help"], env={"COLUMNS": "200"}).output
    names = [info.name.replace("_", "-") for info in describe(benches()[name].options)]
    assert {"model", "quick", "seed", "corpus"} <= set(names)
    for flag in [*names, "out", "json"]:
        assert f"--{flag}" in shown_help


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from intarsia.app.cli import app\n"
        "app(['evaluate', 'base', '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'diffusers', 'gradio', 'numpy'} & {name.partition('.')[0] for name in sys.modules}\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
