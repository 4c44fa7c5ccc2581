"""The composition bench: what it must find in scenes whose truth is known, and that it leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from adapter_files import low_rank
from bench_fakes import LAYER, PALETTE, FakeJudge, FakePictures, adapter, colours, disc
from intarsia.app.cli import app
from intarsia.app.evaluation import instruments, presence, training
from intarsia.app.evaluation.bench import Place, benches
from intarsia.app.evaluation.benches.composition import Composition, CompositionOptions, plan
from intarsia.app.evaluation.composed import ARMS, Kit
from intarsia.app.evaluation.layouts import ARRANGEMENTS, Scene, choose, draw_scenes, pasted
from intarsia.app.evaluation.presence import Finder, calibrate, measure
from intarsia.app.evaluation.records import Records
from intarsia.app.settings import Home
from intarsia.composition.method import methods
from intarsia.pipelines.errors import Cancelled, InputError
from intarsia.pipelines.events import CancelToken
from intarsia.pipelines.judge import Judge
from intarsia.pipelines.models import Model, load
from intarsia.pipelines.sources import resolve
from intarsia.training.corpus import SETS
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

Tiny = Any


@pytest.fixture(scope="module")
def judge() -> Judge:
    return cast(Judge, FakeJudge())


@pytest.fixture(scope="module")
def finder(judge: Judge) -> Finder:
    scenes = draw_scenes({name: ("noto",) for name in PALETTE[6:]}, ("noto",), 4, seed=1)
    made = [(s, pasted([disc(c) for c in s.contents], s.boxes, (128, 128), seed=2)) for s in scenes]
    found = calibrate(judge, made)
    assert found.hits == 1.0 and found.false_alarms == 0.0, "colours are told apart without error"
    return Finder(judge, found.threshold)


def scene(count: int, arrangement: int = 0, style: str = "noto") -> Scene:
    return Scene(0, ARRANGEMENTS[count][arrangement], PALETTE[:count], style)


def seen(finder: Finder, wanted: Scene, picture: Image.Image, others: Sequence[str] = ()) -> dict[str, Any]:
    return measure(finder, finder.look(picture, wanted.boxes), wanted, others)


EVERY = [(count, i) for count, arrangements in ARRANGEMENTS.items() for i in range(len(arrangements))]


# What is found


@pytest.mark.parametrize(("count", "arrangement"), EVERY)
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_everything_is_found_in_its_place_and_once(
    count: int, arrangement: int, seed: int | None, finder: Finder
) -> None:
    wanted = scene(count, arrangement)
    picture = pasted([disc(c) for c in wanted.contents], wanted.boxes, (128, 128), seed)
    found = seen(finder, wanted, picture, ["navy"])
    assert found["present"] == found["placed"] == [True] * count
    assert found["inside"] == [[i == j for j in range(count)] for i in range(count)]
    assert found["duplicates"] == [0] * count and found["false_alarm"] == [False]


@pytest.mark.parametrize(("count", "arrangement"), EVERY)
def test_exchanged_boxes_are_present_but_never_in_place(count: int, arrangement: int, finder: Finder) -> None:
    wanted = scene(count, arrangement)
    found = seen(finder, wanted, pasted([disc(c) for c in wanted.moved().contents], wanted.boxes, (128, 128)))
    assert found["present"] == [True] * count and found["placed"] == [False] * count
    assert found["inside"] == [[j == (i + 1) % count for j in range(count)] for i in range(count)]
    assert found["duplicates"] == [0] * count


def test_what_is_missing_is_not_found_and_what_is_there_unasked_is_a_false_alarm(finder: Finder) -> None:
    wanted = scene(2)
    found = seen(finder, wanted, pasted([disc("red"), disc("navy")], wanted.boxes, (128, 128)), ["navy", "gold"])
    assert found["present"] == found["placed"] == [True, False] and found["false_alarm"] == [True, False]
    empty = seen(finder, wanted, Image.new("RGB", (128, 128), "white"))
    assert empty["present"] == empty["placed"] == [False, False]


def test_the_same_thing_twice_is_a_duplicate_unless_it_was_asked_for_twice(finder: Finder) -> None:
    grid = scene(4)
    picture = pasted([disc(c) for c in ("red", "red", "blue", "red")], grid.boxes, (128, 128))
    found = seen(finder, grid, picture)
    assert found["duplicates"] == [2, 0, 0, 0] and found["present"] == [True, False, True, False]
    asked = Scene(0, grid.arrangement, ("red", "red", "blue", "red"), "noto")
    assert seen(finder, asked, picture)["duplicates"] == [0, 0, 0, 0]


def test_one_thing_over_the_whole_picture_is_in_no_box(finder: Finder) -> None:
    for count, arrangement in EVERY:
        wanted = scene(count, arrangement)
        found = seen(finder, wanted, disc("red", size=128))
        assert found["present"][0] and not any(found["placed"]), wanted.name


def test_the_threshold_lets_through_no_more_false_alarms_than_allowed() -> None:
    absent = torch.arange(1000) / 1000
    threshold = presence.bound(absent, 0.005)
    assert int((absent >= threshold).sum()) == 5, "five in a thousand"
    assert 0.6 < presence.bound(torch.tensor([0.1, 0.6, 0.2]), 0.005) < 0.61, "none of three"


def test_a_content_the_judge_does_not_know_is_refused(finder: Finder) -> None:
    with pytest.raises(InputError, match="does not know a unicorn"):
        finder.column("a unicorn")


# Who meets whom


def test_prompts_are_worded_as_the_scenes_the_model_was_taught() -> None:
    names = ("burrito", "fog", "eyes", "alien")
    said = [Scene(0, a, names[:n], "noto").prompt for n, group in ARRANGEMENTS.items() for a in group]
    assert said == [
        "a burrito left of a fog, noto style",
        "a burrito above a fog, noto style",
        "a burrito, a fog and eyes, noto style",
        "a burrito and a fog above eyes, noto style",
        "a burrito and a fog above eyes and an alien, noto style",
    ]


def test_boxes_are_square_within_the_canvas_and_do_not_overlap() -> None:
    for arrangement in (a for group in ARRANGEMENTS.values() for a in group):
        for i, box in enumerate(arrangement.boxes):
            assert min(box) >= -1e-9 and max(box) <= 1 + 1e-9
            assert box[2] - box[0] == pytest.approx(box[3] - box[1])
            assert all(presence.overlap(box, other) < 1e-9 for other in arrangement.boxes[i + 1 :])


def test_scenes_use_every_content_as_often_and_each_once_per_scene() -> None:
    drawn = {name: ("noto", "twemoji") for name in PALETTE[:8]}
    scenes = draw_scenes(drawn, ("noto", "twemoji"), each=8, seed=3)
    for count in (2, 3, 4):
        mine = [s for s in scenes if len(s.contents) == count]
        assert len(mine) == 8 and all(len(set(s.contents)) == count for s in mine)
        uses = [sum(name in s.contents for s in mine) for name in drawn]
        assert max(uses) - min(uses) <= 1
        met = {(s.arrangement.name, s.style) for s in mine}
        assert len(met) == 2 * len(ARRANGEMENTS[count]), "every arrangement meets every style"
    assert scenes == draw_scenes(drawn, ("noto", "twemoji"), each=8, seed=3)
    assert scenes != draw_scenes(drawn, ("noto", "twemoji"), each=8, seed=4)


def test_a_scene_takes_a_style_all_its_contents_are_drawn_in() -> None:
    drawn = {"red": ("noto", "fxemoji"), "blue": ("fxemoji",)}
    assert {s.style for s in draw_scenes(drawn, ("noto", "fxemoji"), 4, 0)} == {"fxemoji"}
    with pytest.raises(InputError, match="not all drawn in any of: noto"):
        draw_scenes(drawn, ("noto",), 4, 0)


def test_contents_are_chosen_from_all_groups_in_turn() -> None:
    groups = {"tiger": "animals", "goat": "animals", "pill": "objects", "fog": "travel", "dove": "animals"}
    assert choose(groups, 4) == ("tiger", "pill", "fog", "goat")
    with pytest.raises(InputError, match="needs 6 held-out contents"):
        choose(groups, 6)


# The whole bench


def place_in(
    out: Path, model: Model, judge: Judge, options: CompositionOptions, token: CancelToken | None = None
) -> Place:
    out.mkdir(parents=True, exist_ok=True)
    records = Records(out / "records.jsonl", {"options": options.model_dump(mode="json")})
    return Place(out, Home(out / "home"), cast(Any, FakePictures()), model, judge, records, token or CancelToken())


def hooks_of(model: Model) -> int:
    return sum(len(part._forward_hooks) for part in model.denoiser.modules())


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Model:
    return load(resolve(str(tiny("sdxl"))))


@pytest.fixture(scope="module")
def lessons() -> Generator[list[tuple[str, list[str]]]]:
    """Replace training and Lite0; gives what was taught, with the captions."""
    taught: list[tuple[str, list[str]]] = []

    def teach(
        place: Place,
        recipe: str,
        name: str,
        pictures: Sequence[tuple[Image.Image, str]],
        options: dict[str, Any],
        seed: int,
    ) -> Generator[Any, None, training.Trained]:
        yield from ()
        assert recipe == "lora" and options["steps"] == 3
        taught.append((name, [caption for _, caption in pictures]))
        return training.Trained((adapter(name, len(name)),), 1.5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "training", teach)
        patch.setattr(instruments, "lite0", colours)
        yield taught


COMPARED = ("truth", "swapped", "base", "merge", "klora", "region")  # one that composes two only, one with places
OPTIONS = CompositionOptions(quick=True, scenes=2, seeds=2, steps=2, train_steps=3, contents=4, arms=",".join(COMPARED))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, model: Model, judge: Judge, lessons: list[Any]) -> Place:
    """A finished run."""
    place = place_in(tmp_path_factory.mktemp("bench"), model, judge, OPTIONS)
    list(Composition().run(OPTIONS, place))
    return place


def test_the_bench_is_found_by_its_name() -> None:
    assert isinstance(benches()["composition"], Composition)


def test_controls_come_out_as_they_must_and_costs_are_counted(done: Place, model: Model) -> None:
    rows = done.records.rows("picture")
    assert len(rows) == 3 * 2 * 2 * (len(COMPARED) - 1) + 2 * 2  # numbers of contents, scenes, seeds; K-LoRA's two
    assert {row["count"] for row in rows if row["arm"] == "klora"} == {2}
    for row in rows:
        count = row["count"]
        if ARMS[row["arm"]].control:
            assert all(row["present"]) and row["duplicates"] == [0] * count and not any(row["false_alarm"])
            assert row["placed"] == [row["arm"] == "truth"] * count
            shown = range(count) if row["arm"] == "truth" else [(i - 1) % count for i in range(count)]
            assert row["chosen"] == list(shown), "the judge says of every box what lies in it"
            assert row["passes"] == 0
        else:
            assert row["passes"] == 2 * OPTIONS.steps and row["memory"] > 10**7 and row["seconds"] > 0
        if row["arm"] == "truth":
            assert min(row["identity"]) > 0.9 and min(row["lite0"]) > 0.9 and min(row["fidelity"]) > 0.8
            assert abs(row["fidelity"][0] - row["fidelity_alone"][0]) < 0.1
        if row["arm"] == "swapped":
            assert max(row["identity"]) < 0.7, "the box shows another content"
        assert done.path(row["key"]).is_file() and done.path(f"{row['key']}-boxes").is_file()
    assert hooks_of(model) == 0


def test_contents_are_taught_from_their_real_pictures_in_every_style(done: Place, lessons: list[Any]) -> None:
    assert [name for name, _ in lessons] == list(plan(OPTIONS, done).contents) and len(lessons) == 4
    captions = lessons[0][1]
    assert captions[::3] == [f"a red, {style} style" for style in sorted(icon.style for icon in SETS[:9])]
    strangers = [name for name in PALETTE if name not in plan(OPTIONS, done).contents]
    for caption in (*captions[1::3], *captions[2::3]):
        assert "a red" in caption and sum(f" {name}" in caption for name in strangers) == 1
        assert " left of " in caption or " above " in caption
    assert {row["content"] for row in done.records.rows("alone")} == {name for name, _ in lessons}


def test_a_finished_run_goes_on_with_nothing_to_do_and_reports_from_its_records(
    done: Place, model: Model, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = done.records.path.read_text()
    again = place_in(done.out, model, judge, OPTIONS)
    monkeypatch.setattr(training, "training", None)  # neither taught again
    monkeypatch.setattr("intarsia.pipelines.batch.render_many", None)  # nor drawn
    list(Composition().run(OPTIONS, again))
    assert again.records.path.read_text() == lines
    summary = Composition().summarise(OPTIONS, again)
    titles = [table.title for table in summary.tables]
    assert titles[:3] == ["2 contents", "3 contents", "4 contents"] and len(titles) == 6
    for table in summary.tables[:3]:
        values = {str(row[0]): dict(zip(table.columns, row, strict=True)) for row in table.rows}
        truth, moved = values["Real pictures, laid out"], values["Real pictures, boxes exchanged"]
        assert (truth["n"], truth["all placed"], truth["confusion"]) == (4, "1.00 ± 0.00", "0.00 ± 0.00")
        assert (moved["presence"], moved["place"], moved["confusion"]) == ("1.00 ± 0.00", "0.00 ± 0.00", "1.00 ± 0.00")
    assert all(path.is_file() for sheet in summary.sheets for path in sheet.paths) and len(summary.sheets) == 3
    assert summary.figures["merge, 4: passes"] == 2 * OPTIONS.steps


def test_a_stop_leaves_nothing_attached_and_the_next_run_goes_on_where_it_was(
    tmp_path: Path, model: Model, judge: Judge, lessons: list[Any]
) -> None:
    options = OPTIONS.model_copy(update={"scenes": 1, "contents": 2, "arms": "truth,merge"})
    whole = place_in(tmp_path / "whole", model, judge, options)
    list(Composition().run(options, whole))
    checks = 0

    def asked() -> bool:  # in the middle of drawing with the adapters attached
        nonlocal checks
        checks += any("merge" in row["key"] for row in stopped.records.rows("alone"))
        return checks > 3

    stopped = place_in(tmp_path / "stopped", model, judge, options, CancelToken(asked))
    with pytest.raises(Cancelled):
        list(Composition().run(options, stopped))
    assert hooks_of(model) == 0 and 0 < len(stopped.records) < len(whole.records)
    resumed = place_in(tmp_path / "stopped", model, judge, options)
    list(Composition().run(options, resumed))
    found = [{row["key"]: row.get("present") for row in place.records.rows()} for place in (whole, resumed)]
    assert found[0] == found[1]
    for row in whole.records.rows("picture"):
        with Image.open(whole.path(row["key"])) as first, Image.open(resumed.path(row["key"])) as second:
            assert first.tobytes() == second.tobytes()


def test_merge_at_weight_zero_is_the_prompt_alone_and_at_one_it_is_the_sum(done: Place, model: Model) -> None:
    wanted = plan(OPTIONS, done).scenes[0]
    adapters = {content: adapter(content, number) for number, content in enumerate(wanted.contents)}

    def draw(weight: float, arm: str) -> bytes:
        kit = Kit(done, adapters, weight, 2, 5.0, model.native_size)
        return ARMS[arm].draw(kit, wanted, [5])[0].tobytes()

    assert draw(0.0, "merge") == draw(1.0, "base")
    merged = draw(1.0, "merge")
    assert merged != draw(1.0, "base")
    target = model.denoiser.get_submodule(LAYER.removeprefix("unet."))
    change = sum(low_rank(one)[LAYER].up @ low_rank(one)[LAYER].down for one in adapters.values())
    before = target.weight.data.clone()
    target.weight.data += cast(Tensor, change)
    summed = draw(1.0, "base")
    target.weight.data = before
    apart = [abs(a - b) for a, b in zip(summed, merged, strict=True)]
    assert max(apart) <= 1, "the sum of up @ down over the adapters, up to rounding"


def test_unknown_arms_and_styles_are_refused_with_the_known_ones(tmp_path: Path, judge: Judge) -> None:
    place = place_in(tmp_path / "out", cast(Model, None), judge, OPTIONS)
    with pytest.raises(InputError, match=r"no arm magic.*truth, swapped, base, .*merge"):
        plan(CompositionOptions(arms="base, magic"), place)
    with pytest.raises(InputError, match=r"style oil that the judge knows.*fluent-3d, noto"):
        plan(CompositionOptions(styles="oil"), place)


def test_quick_and_full_runs_ask_for_all_numbers_of_contents(tmp_path: Path, judge: Judge) -> None:
    place = place_in(tmp_path / "out", cast(Model, None), judge, OPTIONS)
    quick = plan(CompositionOptions(quick=True), place)
    full = plan(CompositionOptions(styles="noto, fluent-3d"), place)
    assert (len(quick.contents), len(quick.seeds)) == (4, 2) and {len(s.contents) for s in quick.scenes} == {2, 3, 4}
    assert (len(full.contents), len(full.seeds)) == (8, 4) and {len(s.contents) for s in full.scenes} == {2, 3, 4}
    assert {s.style for s in quick.scenes} == {"noto", "fluent-3d"}
    taught = set(full.contents)
    assert not any(taught & set(s.contents) for s in full.rehearsals), "the threshold is set on other contents"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_quick_bench_on_mini_measures_every_method(tmp_path: Path, home: Home) -> None:
    out = tmp_path / "out"
    asked = [
        "evaluate",
        "composition",
        "--quick",
        "--scenes",
        "1",
        "--seeds",
        "1",
        "--train-steps",
        "20",
        "--guidance",
        "3",
    ]
    result = CliRunner().invoke(app, [*asked, "--out", str(out)])
    assert result.exit_code == 0, result.output
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    for count in (2, 3, 4):
        (table,) = (one for one in summary["tables"] if one["title"] == f"{count} contents")
        measured = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["rows"]}
        expected = {method.title for method in methods().values() if method.least <= count <= method.most}
        assert expected <= measured.keys()
        assert measured["Real pictures, laid out"]["told apart"].startswith("1.00")
        assert measured["Real pictures, boxes exchanged"]["told apart"].startswith("0.00")
    assert (out / "report.html").is_file()
