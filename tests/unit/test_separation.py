"""The separation bench: which pairs it asks, how it scores, what its arms draw, and that nothing is done twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from intarsia.app.evaluation import instruments
from intarsia.app.evaluation import training as adapters
from intarsia.app.evaluation.arms import ARMS, Pair, choose_pairs, chosen_arms, without_truth
from intarsia.app.evaluation.bench import Place
from intarsia.app.evaluation.benches.separation import BENCH, SeparationOptions, cell
from intarsia.app.evaluation.records import Records
from intarsia.app.evaluation.ruler import Ruler
from intarsia.app.settings import Home
from intarsia.pipelines.adapter_types import AdapterFile
from intarsia.pipelines.errors import InputError
from intarsia.pipelines.events import Cancelled, CancelToken, Event
from intarsia.pipelines.judge import Embedded
from intarsia.pipelines.models import Model
from intarsia.training.recipes.blora import BLora
from PIL import Image
from separation_fakes import CONTENTS, HELD, KNOWN, FakeJudge, FakePictures, random_rows
from training_fakes import Tiny, assert_same, load, snapshot

SHORT = {"training_steps": 2, "steps": 2, "pairs": 2, "seeds": 2}


@pytest.fixture(autouse=True)
def own_instruments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The independent instruments are packages that need not be there, and slow."""

    def distances(one: Sequence[Image.Image], other: Sequence[Image.Image]) -> torch.Tensor:
        return (random_rows(one, 9, 4) - random_rows(other, 9, 4)).norm(dim=1)

    monkeypatch.setattr(instruments, "lite0", lambda pictures: random_rows(pictures, 12, 3))  # pyright: ignore
    monkeypatch.setattr(instruments, "st_lpips", distances)


def placed(home: Home, model: Model, out: Path, options: SeparationOptions, token: CancelToken | None = None) -> Place:
    out.mkdir(parents=True, exist_ok=True)
    records = Records(out / "records.jsonl", {"options": options.model_dump(mode="json")})
    pictures, judge = cast(Any, FakePictures()), cast(Any, FakeJudge())
    return Place(out, home, pictures, model, judge, records, token or CancelToken())


def pairs(count: int, seed: int = 0) -> tuple[Pair, ...]:
    return choose_pairs(FakePictures.rows, count, seed, CONTENTS, (*KNOWN, *HELD))


# Pairs


def test_pairs_ask_for_held_out_contents_in_held_out_styles_and_know_the_answer() -> None:
    for pair in pairs(9):
        assert pair.content.split == "held-out" and pair.content.style in KNOWN
        assert pair.style.split == "held-out-style" and pair.style.style in HELD
        assert (pair.truth.content, pair.truth.style) == (pair.content.content, pair.style.style)
        assert pair.style.content != pair.content.content and pair.style.group != pair.content.group


def test_pairs_are_balanced_and_no_question_comes_twice() -> None:
    chosen = pairs(6)
    assert Counter(pair.style.style for pair in chosen) == {"glass": 3, "ink": 3}
    assert max(Counter(pair.content.style for pair in chosen).values()) <= 3
    assert len({pair.content.group for pair in chosen[:4]}) >= 2
    assert len({pair.truth for pair in pairs(100)}) == len(pairs(100)) == 9, "five contents in two styles less one"
    first = [pair.truth.content for pair in chosen[:5]]
    assert len(set(first)) >= 4, "contents that were not asked for yet come first"


def test_pairs_follow_from_the_seed_alone() -> None:
    assert pairs(4) == pairs(4)
    assert pairs(4) != pairs(4, seed=1)
    mixed = choose_pairs(FakePictures.rows[::-1], 4, 0, CONTENTS, (*KNOWN, *HELD))
    assert mixed == pairs(4), "the order of the corpus does not matter"


def test_a_style_without_true_answers_is_left_out_and_named() -> None:
    assert without_truth(FakePictures.rows) == ("sketch",)
    with pytest.raises(InputError, match="no held-out content in a held-out style"):
        choose_pairs([row for row in FakePictures.rows if row.style not in HELD[:2]], 2, 0, CONTENTS, HELD)


def test_contents_and_styles_the_judge_cannot_name_are_left_out() -> None:
    chosen = choose_pairs(FakePictures.rows, 9, 0, CONTENTS[:2], ("flat", "ink"))
    assert {pair.truth.content for pair in chosen} == {"tiger", "goat"}
    assert {(pair.content.style, pair.style.style) for pair in chosen} == {("flat", "ink")}


# Scores


def ruler_of(pair: Pair) -> Ruler:
    draw = FakePictures().image
    real = {"truth": draw(pair.truth), "content-picture": draw(pair.content), "style-picture": draw(pair.style)}
    return Ruler(cast(Any, FakeJudge()), pair, real)


def test_real_pictures_mark_the_ends_of_every_score() -> None:
    ruler = ruler_of(pairs(1)[0])
    truth, content, style = ruler.scores([ruler.real[n] for n in ("truth", "content-picture", "style-picture")])
    for name in ("content", "lite0", "style"):
        assert truth[name] == pytest.approx(1, abs=1e-5)
    assert [truth[name] for name in ("st_lpips", "style_leak", "content_leak")] == pytest.approx([0, 0, 0], abs=1e-5)
    assert content["style_leak"] == pytest.approx(1, abs=1e-5)
    assert style["content_leak"] == pytest.approx(1, abs=1e-5)
    assert (content["content"] or 0) < 0.999 and (style["content"] or 0) < 0.999 and (content["style"] or 0) < 0.999


def test_scores_agree_with_plain_loops_over_the_prototypes() -> None:
    pair, judge = pairs(2)[1], FakeJudge()
    ruler = ruler_of(pair)
    image = FakePictures().image(FakePictures.rows[3])
    scores = ruler.scores([ruler.real["truth"], image])[1]
    seen, truth = judge.embed([image]), judge.embed([ruler.real["truth"]])
    contents = [float(seen.content[0] @ p) for p in judge.content_prototypes]
    better = sum(value > contents[judge.contents.index(pair.truth.content)] for value in contents)
    assert (scores["rank"], scores["top1"]) == (better + 1, float(better == 0))
    styles = {name: float(seen.style[0] @ p) for name, p in zip(judge.styles, judge.style_prototypes, strict=True)}
    nearest = max(styles, key=styles.__getitem__)
    assert scores["style_hit"] == float(nearest == pair.style.style)
    assert scores["style_caught"] == float(nearest == pair.content.style)
    assert scores["content"] == pytest.approx(float(seen.content[0] @ truth.content[0]), abs=1e-5)

    def leaning(embedded: Embedded) -> float:
        old, new = (judge.style_prototypes[judge.styles.index(r.style)] for r in (pair.content, pair.style))
        return float(embedded.style[0] @ (old - new))

    end = judge.embed([ruler.real["content-picture"]])
    expected = (leaning(seen) - leaning(truth)) / (leaning(end) - leaning(truth))
    assert scores["style_leak"] == pytest.approx(expected, abs=1e-3)


def test_a_leak_is_not_measured_where_the_judge_sees_both_ends_as_one() -> None:
    ruler = ruler_of(pairs(1)[0])
    same = Ruler(cast(Any, FakeJudge()), pairs(1)[0], dict.fromkeys(ruler.real, ruler.real["truth"]))
    scores = same.scores([ruler.real["content-picture"]])[0]
    assert scores["style_leak"] is None and scores["content_leak"] is None


# Arms


def prepared(name: str, pair: Pair) -> tuple[Any, list[tuple[str, str, list[str]]]]:
    """Run an arm with a teacher that only writes down what it is asked; gives the wish and the lessons."""
    lessons: list[tuple[str, str, list[str]]] = []

    def teach(recipe: str, name: str, pictures: Any, **options: object) -> Generator[Event, None, Any]:  # noqa: ANN401
        yield from ()
        lessons.append((recipe, name, [caption for _, caption in pictures]))
        trigger = BLora().trigger(name, BLora.options()) if recipe == "blora" else ""
        roles = ("content", "style") if recipe == "blora" else ("concept",)
        return tuple(AdapterFile(Path(name), "sdxl", cast(Any, role), trigger, {}, "", {}) for role in roles)

    work = next(arm for arm in ARMS if arm.name == name).prepare(pair, cast(Any, teach))
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value, lessons


def test_the_prompt_arm_learns_nothing_and_asks_in_words() -> None:
    pair = next(pair for pair in pairs(9) if pair.truth.content == "burrito")
    wish, lessons = prepared("prompt", pair)
    assert (wish.prompt, wish.adapters, lessons) == (f"a burrito, {pair.style.style} style", (), [])


def test_summed_lora_learns_each_picture_alone_with_its_caption() -> None:
    pair = pairs(1)[0]
    wish, lessons = prepared("lora-sum", pair)
    assert [recipe for recipe, _, _ in lessons] == ["lora", "lora"]
    assert [len(captions) for _, _, captions in lessons] == [1, 1]
    assert lessons[0][2][0].endswith(f"{pair.content.content}, {pair.content.style} style")
    assert lessons[1][2][0].endswith(f"{pair.style.content}, {pair.style.style} style")
    assert wish.prompt == pair.prompt and [weight for _, weight in wish.adapters] == [1.0, 1.0]


def test_blora_joins_one_content_half_and_one_style_half_by_their_own_words() -> None:
    pair = pairs(1)[0]
    wish, lessons = prepared("blora", pair)
    (content, _), (style, _) = wish.adapters
    assert (content.role, content.path.name) == ("content", lessons[0][1])
    assert (style.role, style.path.name) == ("style", lessons[1][1])
    assert wish.prompt == f"A {content.trigger} in {style.trigger} style"
    assert [captions for _, _, captions in lessons] == [[""], [""]]


def test_blora_never_calls_both_halves_by_one_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def coarse(recipe: BLora, name: str, options: object) -> str:
        return f"[v{len(name) // 40 + name.count(chr(39)) // 2}]"  # equal for usual names, until two marks were added

    monkeypatch.setattr(BLora, "trigger", coarse)
    wish, _ = prepared("blora", pairs(1)[0])
    (content, _), (style, _) = wish.adapters
    assert content.trigger == "[v0]" and style.trigger == "[v1]"


def test_arms_are_chosen_by_name() -> None:
    assert [arm.name for arm in chosen_arms("")] == ["prompt", "lora-sum", "blora"]
    assert [arm.name for arm in chosen_arms("blora, prompt")] == ["prompt", "blora"]
    with pytest.raises(InputError, match="no arm called blra"):
        chosen_arms("blra")


# The whole bench


def rows_of(place: Place) -> dict[str, dict[str, Any]]:
    """Every record, less what depends on the clock."""
    return {row["key"]: {k: v for k, v in row.items() if k != "training_seconds"} for row in place.records.rows()}


def test_the_bench_trains_draws_scores_and_reports(tiny: Tiny, home: Home, tmp_path: Path) -> None:
    model = load(tiny("sdxl"))
    before, options = snapshot(model), SeparationOptions.parse(SHORT)
    place = placed(home, model, tmp_path / "out", options)
    list(BENCH.run(options, place))
    assert_same(before, snapshot(model))
    drawn = [row for row in place.records.rows("picture") if "seed" in row]
    assert Counter((row["pair"], row["arm"]) for row in drawn) == {
        (pair, arm.name): 2 for pair in (0, 1) for arm in ARMS
    }
    assert len(place.records.rows("picture")) == 2 * 3 * 2 + 2 * 3, "real pictures are scored once per pair"
    assert all(place.path(row["key"]).is_file() for row in place.records.rows("picture"))
    pixels = {place.path(f"000/{arm}-0").read_bytes() for arm in ("prompt", "lora-sum", "blora")}
    assert len(pixels) == 3, "every arm draws something else"

    summary = BENCH.summarise(options, placed(home, model, tmp_path / "out", options))
    assert [row[0] for row in summary.tables[0].rows][:1] == ["The true picture itself"]
    assert len(summary.tables[0].rows) == 3 + 3
    assert (summary.figures["pairs"], summary.figures["pictures"]) == (2, 12)
    means = [
        sum(row["content"] for row in drawn if (row["pair"], row["arm"]) == (pair, "blora")) / 2 for pair in (0, 1)
    ]
    assert summary.figures["content, blora"] == pytest.approx(sum(means) / 2, abs=1e-4)
    assert summary.figures["content, blora, deviation"] == pytest.approx(abs(means[0] - means[1]) / 2**0.5, abs=1e-4)
    assert any("sketch" in note for note in summary.notes)
    assert summary.sheets[0].across == 6 and len(summary.sheets[0].paths) == 12
    assert all(path.is_file() for path in summary.sheets[0].paths)


def test_a_bench_cut_anywhere_goes_on_to_the_same_records(tiny: Tiny, home: Home, tmp_path: Path) -> None:
    model, options = load(tiny("sdxl")), SeparationOptions.parse({**SHORT, "pairs": 1, "arms": "prompt,blora"})
    whole = placed(Home(tmp_path / "other"), model, tmp_path / "whole", options)
    events = list(BENCH.run(options, whole))
    for cut in (1, len(events) // 3, len(events) - 2):
        token, out = CancelToken(), tmp_path / f"cut-{cut}"
        with pytest.raises(Cancelled):
            for number, _ in enumerate(BENCH.run(options, placed(Home(out / "home"), model, out, options, token))):
                if number >= cut:
                    token.cancel()
        resumed = placed(Home(out / "home"), model, out, options)
        list(BENCH.run(options, resumed))
        assert rows_of(resumed) == rows_of(whole)


def test_a_finished_bench_measures_nothing_again(tiny: Tiny, home: Home, tmp_path: Path) -> None:
    model, options = load(tiny("sdxl")), SeparationOptions.parse({**SHORT, "pairs": 1})
    list(BENCH.run(options, placed(home, model, tmp_path / "out", options)))
    before = (tmp_path / "out" / "records.jsonl").read_bytes()
    again = list(BENCH.run(options, placed(home, model, tmp_path / "out", options)))
    assert [event.type for event in again] == ["notice"] and "sketch" in str(again[0])
    assert (tmp_path / "out" / "records.jsonl").read_bytes() == before


def test_a_missing_instrument_is_told_before_anything_is_trained(
    tiny: Tiny, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(pictures: object) -> None:
        raise InputError("not installed", 'pip install "intarsia[evaluate]"')

    monkeypatch.setattr(instruments, "lite0", missing)
    options = SeparationOptions.parse(SHORT)
    place = placed(home, load(tiny("sdxl")), tmp_path / "out", options)
    with pytest.raises(InputError, match="not installed"):
        list(BENCH.run(options, place))
    assert not list(home.evaluations.rglob("*.safetensors")) and len(place.records) == 0


def test_quick_asks_less_and_what_is_given_wins() -> None:
    full, quick = SeparationOptions(), SeparationOptions(quick=True)
    assert (full.pair_count, len(full.picture_seeds), full.recipe_options) == (24, 4, {})
    assert (quick.pair_count, len(quick.picture_seeds)) == (2, 2) and quick.recipe_options["steps"] > 0
    given = SeparationOptions(quick=True, pairs=5, seeds=3, training_steps=7, learning_rate=0.01, seed=9)
    assert (given.pair_count, given.picture_seeds) == (5, (9, 10, 11))
    assert given.recipe_options == {"steps": 7, "learning_rate": 0.01}


def test_a_cell_says_its_spread_and_how_many_pairs_it_stands_for() -> None:
    assert cell([0.25, 0.75], 2, 2) == "0.50 ± 0.35"
    assert cell([0.25, 0.75], 2, 3) == "0.50 ± 0.35 (2 pairs)"
    assert (cell([0.5], 1, 1), cell([], 1, 4)) == ("0.5", "–"), "one pair has no spread"


# Cached adapters


def learnt(place: Place, recipe: str = "blora", seed: int = 1, colour: str = "red", **options: Any) -> Any:  # noqa: ANN401
    pictures = [(Image.new("RGB", (64, 64), colour), "a cat")]
    work = adapters.training(place, recipe, "cat", pictures, {"steps": 2, **options}, seed)
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value.adapters


def test_the_same_training_is_done_once(tiny: Tiny, home: Home, tmp_path: Path) -> None:
    place = placed(home, load(tiny("sdxl")), tmp_path / "out", SeparationOptions())
    first = learnt(place)
    assert [adapter.role for adapter in first] == ["content", "style"]
    times = {adapter.path: adapter.path.stat().st_mtime_ns for adapter in first}
    again = learnt(place)
    assert {adapter.path: adapter.path.stat().st_mtime_ns for adapter in again} == times
    assert [a.sha256 for a in again] == [a.sha256 for a in first]
    assert not list(first[0].path.parent.glob("checkpoint")) and not list(home.evaluations.rglob(".*.part"))
    assert len(list((home.evaluations / "adapters" / "pictures").glob("*.png"))) == 1


def test_whatever_changes_the_result_gives_another_adapter(tiny: Tiny, home: Home, tmp_path: Path) -> None:
    place = placed(home, load(tiny("sdxl")), tmp_path / "out", SeparationOptions())
    other = placed(home, load(tiny("sdxl", seed=1)), tmp_path / "out2", SeparationOptions())
    made = [
        learnt(place), learnt(place, seed=2), learnt(place, colour="blue"), learnt(place, steps=3),
        learnt(place, rank=2), learnt(place, learning_rate=0.1), learnt(place, "lora"), learnt(other),
    ]  # fmt: skip
    assert len({files[0].path.parent for files in made}) == len({files[0].sha256 for files in made}) == 8


def cut_training(place: Place, steps: int) -> None:
    """Begin a training of `steps` and stop it near its end."""
    place.token = CancelToken()
    work = adapters.training(place, "blora", "cat", [(Image.new("RGB", (64, 64), "red"), "a cat")], {"steps": steps}, 1)
    with pytest.raises(Cancelled):
        for event in work:
            if event.type == "progress" and event.stage == "train" and event.step == steps - 2:
                place.token.cancel()
    place.token = CancelToken()


def test_a_training_that_was_cut_goes_on_and_gives_the_same_bytes(tiny: Tiny, home: Home, tmp_path: Path) -> None:
    model = load(tiny("sdxl"))
    place = placed(home, model, tmp_path / "out", SeparationOptions())
    cut_training(place, 6)
    (part,) = home.evaluations.rglob(".*.part")
    assert json.loads((part / "checkpoint" / "state.json").read_text())["step"] >= 3
    resumed = learnt(place, steps=6)
    whole = learnt(placed(Home(tmp_path / "other"), model, tmp_path / "out2", SeparationOptions()), steps=6)
    assert [a.sha256 for a in resumed] == [a.sha256 for a in whole]


def test_a_damaged_checkpoint_is_said_and_trained_anew(tiny: Tiny, home: Home, tmp_path: Path) -> None:
    place = placed(home, load(tiny("sdxl")), tmp_path / "out", SeparationOptions())
    cut_training(place, 6)
    (state,) = home.evaluations.rglob("state.json")
    state.write_text("{")
    red = [(Image.new("RGB", (64, 64), "red"), "a cat")]
    events = list(adapters.training(place, "blora", "cat", red, {"steps": 6}, 1))
    assert any(event.type == "notice" and "starts anew" in event.text for event in events)
    assert len(learnt(place, steps=6)) == 2


def test_the_code_of_training_is_part_of_what_an_adapter_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = {adapters.code_hash(f"intarsia.training.recipes.{name}") for name in ("lora", "blora")}
    assert len(hashes) == 2
    import intarsia.training.loop as loop

    monkeypatch.setattr(loop, "__file__", __file__)
    assert adapters.code_hash("intarsia.training.recipes.lora") not in hashes
