"""Separation: the content of one picture in the style of another, compared with the real picture of both.

A pair is a held-out content drawn in a known style, and a picture in a held-out style; the corpus holds that content
in that style too, so the right answer is known. Every arm (`arms.py`) learns from the two pictures and draws; real
pictures are scored beside the drawn ones, so that every score can be read between its worst and its best.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....pipelines.events import Event, Notice, Stage
from ....pipelines.options import option
from ..arms import ARMS, CONTROLS, Arm, Pair, choose_pairs, chosen_arms, without_truth
from ..bench import Figure, Place, Sheet, Summary, Table
from ..options import EvaluationOptions
from ..ruler import Ruler
from ..statistics import deviation, mean_spread
from ..training import training

if TYPE_CHECKING:
    from ....pipelines.adapter_types import AdapterFile
    from ....training.corpus import Captioned

PICTURE, PAIR = "picture", "pair"  # kinds of records
ROWS = 12  # pairs shown on the contact sheet


@dataclass(frozen=True)
class Score:
    """One column: its key in the records, its heading, and which way is better."""

    key: str
    heading: str
    digits: int = 2


NEARNESS = (
    Score("content", "content ↑"),
    Score("top1", "right content ↑"),
    Score("rank", "rank of content ↓", 0),
    Score("lite0", "Lite0 ↑"),
    Score("style", "style ↑"),
    Score("style_hit", "right style ↑"),
    Score("st_lpips", "ST-LPIPS ↓"),
)
LEAKAGE = (
    Score("style_leak", "of the old style ↓"),
    Score("style_caught", "taken for the old style ↓"),
    Score("content_leak", "of the style picture's content ↓"),
    Score("training_seconds", "training, seconds", 0),
)
SCORES = (*NEARNESS, *LEAKAGE)
NEAR_NOTE = (
    "Cosines to the true picture: content and style by the judge, Lite0 by a network nobody here trained; ST-LPIPS is "
    "a distance. Right: nearest among all contents (styles) the judge knows."
)
LEAK_NOTE = (
    "Shares of a way in the judge's embeddings: 0 is the true picture; 1 is the style of the content picture, or the "
    "content of the style picture. A picture in neither style lies between, about at one half."
)


class SeparationOptions(EvaluationOptions):
    """How many pairs, and how the arms train and draw."""

    pairs: int | None = option(None, label="Pairs", help="Empty: 24, with quick 2.", low=1, high=500)
    seeds: int | None = option(
        None, label="Seeds", help="Pictures per pair and arm. Empty: 4, with quick 2.", low=1, high=64
    )
    training_steps: int | None = option(
        None, label="Training steps", help="Of every adapter. Empty: the recipe's own, with quick 200.", low=1,
        high=100_000, unit="steps",
    )  # fmt: skip
    learning_rate: float | None = option(
        None, label="Learning rate", help="Of every adapter. Empty: the recipe's own.", low=1e-8, high=1
    )
    steps: int = option(20, label="Steps", help="Denoising steps per picture.", low=1, high=200, unit="steps")
    guidance: float = option(5.0, label="Guidance", help="How strictly to follow the prompt.", low=0, high=30)
    arms: str = option("", label="Arms", help="Which to compare, with commas between. Empty: all.", high=400)

    @property
    def pair_count(self) -> int:
        return self.pairs or (2 if self.quick else 24)

    @property
    def picture_seeds(self) -> tuple[int, ...]:
        """The same for every pair and arm, so that arms differ by what they learned alone."""
        return tuple(range(self.seed, self.seed + (self.seeds or (2 if self.quick else 4))))

    @property
    def recipe_options(self) -> dict[str, Any]:
        steps = self.training_steps or (200 if self.quick else None)
        given = {"steps": steps, "learning_rate": self.learning_rate}
        return {key: value for key, value in given.items() if value is not None}


class Separation:
    """The bench."""

    name = "separation"
    title = "Separation: the content of one picture in the style of another"
    options = SeparationOptions

    def run(self, options: SeparationOptions, place: Place) -> Iterator[Event]:
        """Choose pairs, score their real pictures, then train, draw and score arm by arm."""
        arms = chosen_arms(options.arms)
        rows, judge = place.pictures.rows, place.judge
        pairs = choose_pairs(rows, options.pair_count, options.seed, set(judge.contents), set(judge.styles))
        if len(pairs) < options.pair_count:
            yield Notice(text=f"These pictures give {len(pairs)} pairs, not {options.pair_count}.")
        for style in without_truth(rows):
            yield Notice(text=f"No pair has the style {style}: no held-out content is drawn in it.")
        for pair in pairs:
            place.token.check()
            ruler = _ruled(pair, place)
            for arm in arms:
                missing = [seed for seed in options.picture_seeds if not place.records.has(_key(pair, arm.name, seed))]
                if not missing:
                    continue
                what = f"{pair.truth.content} from {pair.content.style} to {pair.style.style}"
                yield Stage(name="separate", detail=f"pair {pair.number + 1} of {len(pairs)}, {arm.name}: {what}")
                yield from _measured(pair, arm, ruler, missing, options, place)

    def summarise(self, options: SeparationOptions, place: Place) -> Summary:
        """Tables of means over pairs, and a sheet."""
        found = Found.of(place)
        sizes = f"{len(found.pairs)} pairs, {len(options.picture_seeds)} pictures per pair and arm"
        training = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in options.recipe_options.items())
        notes = (
            f"{sizes}. Training: {training or 'as each recipe chooses'}. Drawing: {options.steps} steps, "
            f"guidance {options.guidance:g}. Seed {options.seed}.",
            "The three real pictures are scored like drawn ones: they show what the instruments give for the right "
            "answer, and for the content or the style alone.",
            *(
                f"{style} is in no pair: no held-out content is drawn in it."
                for style in without_truth(place.pictures.rows)
            ),
        )
        spread = f"Mean ± standard deviation over {sizes}."
        near = (
            f"{spread} {NEAR_NOTE} It knows {len(place.judge.contents)} contents and {len(place.judge.styles)} styles."
        )
        tables = (
            _table("How near to the true picture", found, NEARNESS, near),
            _table("What came along", found, LEAKAGE, f"{spread} {LEAK_NOTE}"),
        )
        return Summary(self.title, tables, _sheets(found, options, place), notes, _figures(found))


def _key(pair: Pair, arm: str, seed: int | None = None) -> str:
    """Name of a record, and of the picture it is about."""
    return f"{pair.number:03d}/{arm}" if seed is None else f"{pair.number:03d}/{arm}-{seed}"


def _ruled(pair: Pair, place: Place) -> Ruler:
    """Make the ruler of a pair; keep and score its real pictures if that was not done."""
    side = min(place.model.native_size)
    real = {name: place.pictures.image(row(pair), side) for name, (_, row) in CONTROLS.items()}
    ruler = Ruler(place.judge, pair, real)
    if not place.records.has(f"{pair.number:03d}"):
        missing = [name for name in real if not place.records.has(_key(pair, name))]
        for name, scores in zip(missing, ruler.scores([real[name] for name in missing]), strict=True):
            place.keep(_key(pair, name), real[name])
            place.records.add(_key(pair, name), kind=PICTURE, pair=pair.number, arm=name, **scores)
        rows = {name: f"{row(pair).content}, {row(pair).style}" for name, (_, row) in CONTROLS.items()}
        place.records.add(f"{pair.number:03d}", kind=PAIR, pair=pair.number, group=pair.truth.group, rows=rows)
    return ruler


def _measured(
    pair: Pair, arm: Arm, ruler: Ruler, seeds: Sequence[int], options: SeparationOptions, place: Place
) -> Generator[Event]:
    """Train what an arm needs for a pair, draw the pictures of `seeds`, keep and score them."""
    from ....pipelines.attach import Attachment, attached
    from ....pipelines.batch import render_many

    teacher = _Trainer(options, place)
    wish = yield from arm.prepare(pair, teacher)
    hung = [Attachment(f"{index}", adapter, weight) for index, (adapter, weight) in enumerate(wish.adapters)]
    yield Stage(name="draw", detail=f"{len(seeds)} pictures: {wish.prompt}")
    with attached(place.model.components, hung):
        images = list(
            render_many(
                place.model, [wish.prompt] * len(seeds), seeds, steps=options.steps, guidance=options.guidance,
                token=place.token,
            )
        )  # fmt: skip
    for seed, image, scores in zip(seeds, images, ruler.scores(images), strict=True):
        key = _key(pair, arm.name, seed)
        place.keep(key, image)
        place.records.add(
            key, kind=PICTURE, pair=pair.number, arm=arm.name, seed=seed, prompt=wish.prompt,
            training_seconds=round(teacher.seconds, 2), **scores,
        )  # fmt: skip


@dataclass
class _Trainer:
    """The teacher the arms get: trains with the bench's settings and adds up what that took."""

    options: SeparationOptions
    place: Place
    seconds: float = 0.0

    def __call__(
        self, recipe: str, name: str, pictures: Sequence[tuple[Captioned, str]], **options: object
    ) -> Generator[Event, None, tuple[AdapterFile, ...]]:
        side = min(self.place.model.native_size)
        shown = [(self.place.pictures.image(row, side), caption) for row, caption in pictures]
        given = {**self.options.recipe_options, **options}
        made = yield from training(self.place, recipe, name, shown, given, self.options.seed)
        self.seconds += made.seconds
        return made.adapters


@dataclass(frozen=True)
class Found:
    """What the records hold.

    Args:
        pairs: The rows that describe them.
        arms: Names: real pictures first, then the arms in their order.
        means: Arm to score to the means over its seeds, one per pair that has it.
        pictures: How many were drawn.
    """

    pairs: tuple[dict[str, Any], ...]
    arms: tuple[str, ...]
    means: Mapping[str, Mapping[str, Sequence[float]]]
    pictures: int

    @classmethod
    def of(cls, place: Place) -> Found:
        rows = place.records.rows(PICTURE)
        names = {str(row["arm"]) for row in rows}
        order = [*CONTROLS, *(arm.name for arm in ARMS)]
        arms = tuple(name for name in order if name in names)
        means: dict[str, dict[str, list[float]]] = {arm: {} for arm in arms}
        for arm in arms:
            for number in sorted({int(row["pair"]) for row in rows if row["arm"] == arm}):
                mine = [row for row in rows if row["arm"] == arm and row["pair"] == number]
                for score in SCORES:
                    if values := [float(row[score.key]) for row in mine if row.get(score.key) is not None]:
                        means[arm].setdefault(score.key, []).append(mean_spread(values)[0])
        drawn = sum(row["arm"] not in CONTROLS for row in rows)
        return cls(tuple(place.records.rows(PAIR)), arms, means, drawn)

    def values(self, arm: str, score: str) -> Sequence[float]:
        """One number per pair; empty if the arm has no such score."""
        return self.means[arm].get(score, ())


def _figures(found: Found) -> dict[str, Figure]:
    """Every mean and deviation by name; content and style of what was drawn come first, they head the page."""
    drawn = [arm for arm in found.arms if arm not in CONTROLS]
    first = [(score, arm) for score in ("content", "style") for arm in drawn]
    rest = [(score.key, arm) for score in SCORES for arm in found.arms if (score.key, arm) not in first]
    figures: dict[str, Figure] = {}
    for score, arm in (*first, *rest):
        if values := found.values(arm, score):
            figures[f"{score}, {arm}"] = round(mean_spread(values)[0], 4)
    figures |= {"pairs": len(found.pairs), "pictures": found.pictures}
    for score, arm in (*first, *rest):
        if values := found.values(arm, score):
            figures[f"{score}, {arm}, deviation"] = round(deviation(values), 4)
    return figures


def _table(title: str, found: Found, scores: Sequence[Score], note: str) -> Table:
    titles = {name: title for name, (title, _) in CONTROLS.items()} | {arm.name: arm.title for arm in ARMS}
    count = len(found.pairs)
    rows = tuple(
        (titles[arm], *(cell(found.values(arm, s.key), s.digits, count) for s in scores)) for arm in found.arms
    )
    return Table(title, ("", *(score.heading for score in scores)), rows, note)


def cell(values: Sequence[float], digits: int, count: int) -> str:
    """Write mean and deviation; a single value has none, and a score that some of `count` pairs lack says how many."""
    if not values:
        return "–"
    spread = f" ± {deviation(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean_spread(values)[0]:.{digits}f}{spread}{'' if len(values) == count else f' ({len(values)} pairs)'}"


def _sheets(found: Found, options: SeparationOptions, place: Place) -> tuple[Sheet, ...]:
    """One row per pair: content picture, style picture, truth, then the first picture of every arm."""
    real = ("content-picture", "style-picture", "truth")
    arms = [arm for arm in found.arms if arm not in CONTROLS]
    paths: list[Path] = []
    captions: list[str] = []
    for row in found.pairs[:ROWS]:
        drawn = (f"{arm}-{options.picture_seeds[0]}" for arm in arms)
        names = [f"{row['pair']:03d}/{name}" for name in (*real, *drawn)]
        if all(place.records.has(name) for name in names):  # of the last pair of a run that was cut some are missing
            paths += [place.path(name) for name in names]
            captions += [row["rows"][name] for name in real[:2]] + [f"true: {row['rows']['truth']}", *arms]
    if not paths:
        return ()
    note = "Content of the first picture, style of the second; the third is the right answer."
    return (Sheet("Pairs", tuple(paths), tuple(captions), len(real) + len(arms), note),)


BENCH = Separation()
