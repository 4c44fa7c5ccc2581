"""Report card of a base model: does it draw what is asked, in the style asked, in the place asked; new, and varied."""

from __future__ import annotations

import random
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import combinations
from typing import TYPE_CHECKING

from ....pipelines.errors import InputError
from ....pipelines.events import Event, Notice, Progress, Stage
from ....pipelines.options import option
from ....pipelines.requests import SCHEDULERS, AdapterUse
from .. import base_report, instruments
from ..bench import Place, Summary
from ..layouts import pasted
from ..options import EvaluationOptions
from ..presence import Finder, calibrate, measure
from ..prompts import STYLES, TWINS, Asked, scenes, singles, taught

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ....training.corpus import Captioned

THRESHOLD, ADAPTER = "threshold", "adapter"
CHUNK = 16  # pictures drawn at a time, and the most that a stop can cost


class BaseOptions(EvaluationOptions):
    """How much is drawn, and how."""

    held_in: int = option(200, label="Held-in prompts", help="Contents the model was taught.", low=2, high=10_000)
    held_out: int = option(600, label="Held-out prompts", help="Contents no training saw.", low=0, high=10_000)
    scenes: int = option(200, label="Scenes", help="Two objects with a stated relation.", low=0, high=10_000)
    steps: int = option(20, label="Steps", help="Denoising steps.", low=1, high=200, unit="steps")
    guidance: float = option(5.0, label="Guidance", help="How strictly to follow the prompt.", low=0, high=30)
    scheduler: SCHEDULERS = option("default", label="Scheduler", help="Sampler; default is the model's own.")
    adapter: str = option("", label="Adapter", help="Library name or file to draw with, with :WEIGHT if not 1.")

    def asked(self, many: int) -> int:
        """A fifth of `many` if quick, at most forty."""
        return min(many, 40) if self.quick else many


class Base:
    """Draw from the prompt alone and let the judge and two independent instruments look."""

    name = "base"
    title = "Report card"
    options = BaseOptions

    def run(self, options: BaseOptions, place: Place) -> Iterator[Event]:
        hidden = tuple(sorted({row.content for row in place.pictures.of(split="held-out")}))
        known = [content for content in place.judge.contents if content not in set(hidden)]
        held_in = taught(place.model.source, known)
        yield Notice(text=f"{len(held_in)} contents were taught, {len(hidden)} are held out.")
        parts = (
            singles("held-in", held_in, options.asked(options.held_in), options.seed),
            singles("held-out", hidden, options.asked(options.held_out), options.seed),
            scenes(held_in, options.asked(options.scenes), options.seed),
            varied(held_in, 4 if options.quick else 20, 4, options.seed),
        )
        yield from _calibrated(sorted({row.content for row in place.pictures.rows}), 80, options, place)
        with _adapted(options, place):
            for asked in parts:
                yield from _draw(asked, options, place)
            yield from _speed(parts[0], options, place)
        _real(parts[0], place)
        yield from _variety(parts[3], place)
        yield from _memory(parts[0] + parts[1], place, 20 if options.quick else 100)
        yield from _distance(parts[1], place)

    def summarise(self, options: BaseOptions, place: Place) -> Summary:
        return base_report.summary(place)


def varied(contents: Sequence[str], prompts: int, seeds: int, seed: int) -> list[Asked]:
    """The same prompt with several seeds."""
    return [
        Asked(f"variety/{i:02d}-{number}", one.prompt, one.contents, one.style, (one.seed + number) % 2**31)
        for i, one in enumerate(singles("variety", contents, prompts, seed))
        for number in range(seeds)
    ]


@contextmanager
def _adapted(options: BaseOptions, place: Place) -> Generator[None]:
    """Hold the model with the adapter that is to be measured with it, if any.

    Raises:
        IntarsiaError: It is not there or does not fit, or the records were made with another file of this name.
    """
    from ....pipelines.adapter_file import read_adapter
    from ....pipelines.attach import Attachment, attached
    from ....pipelines.sources import unet_shapes
    from ...shelf import Shelf

    hung: list[Attachment] = []
    if options.adapter:
        use = AdapterUse.read(options.adapter)
        entry = Shelf(place.home).find(use.adapter)
        adapter = read_adapter(entry.path, unet_shapes(place.model.source))
        if not place.records.has(ADAPTER):
            place.records.add(ADAPTER, kind=ADAPTER, sha256=adapter.sha256)
        elif place.records[ADAPTER]["sha256"] != adapter.sha256:
            raise InputError(f"{entry.name} is not the file these records were made with.", "Name another --out.")
        hung.append(Attachment(entry.name, adapter, use.weight))
    with attached(place.model.components, hung):
        yield


def _draw(asked: Sequence[Asked], options: BaseOptions, place: Place) -> Iterator[Event]:
    """Draw what has no record yet, and record what the judge sees."""
    from ....pipelines.batch import render_many

    missing = [one for one in asked if not place.records.has(one.key)]
    if not missing:
        return
    kind = missing[0].key.split("/")[0]
    yield Stage(name="draw", detail=f"{kind}: {len(missing)} pictures")
    for start in range(0, len(missing), CHUNK):
        chunk = missing[start : start + CHUNK]
        prompts, seeds = [one.prompt for one in chunk], [one.seed for one in chunk]
        drawn = list(
            render_many(
                place.model, prompts, seeds, steps=options.steps, guidance=options.guidance,
                scheduler=options.scheduler, batch=CHUNK, token=place.token,
            )
        )  # fmt: skip
        for one, picture in zip(chunk, drawn, strict=True):
            place.keep(one.key, picture)
        rows = _in_scenes(chunk, drawn, place) if chunk[0].scene else _alone(chunk, drawn, place)
        for one, row in zip(chunk, rows, strict=True):
            place.records.add(one.key, kind=kind, prompt=one.prompt, style=one.style, contents=one.contents, **row)
        yield Progress(stage="draw", step=start + len(chunk), total=len(missing))


def _alone(chunk: Sequence[Asked], drawn: Sequence[Image.Image], place: Place) -> list[dict[str, object]]:
    seen = place.judge.embed(drawn)
    contents, styles = place.judge.content_scores(seen), place.judge.style_scores(seen)
    rows: list[dict[str, object]] = []
    for i, one in enumerate(chunk):
        right = place.judge.contents.index(one.contents[0])
        rows.append(
            {
                "rank": rank(contents[i], right),
                "content": float(contents[i, right]),
                "taken_for": place.judge.contents[int(contents[i].argmax())],
                "style_right": is_style(styles[i], one.style, place),
            }
        )
    return rows


def _real(asked: Sequence[Asked], place: Place) -> None:
    """Judge the real pictures of the same prompts, where there are any: what full marks are worth."""
    there = [(one, found[0]) for one in asked if (found := place.pictures.of(one.contents[0], one.style))]
    there = [(replace(one, key=f"real/{one.key}"), row) for one, row in there]
    there = [(one, row) for one, row in there if not place.records.has(one.key)]
    for start in range(0, len(there), CHUNK):
        place.token.check()
        chunk = there[start : start + CHUNK]
        rows = _alone([one for one, _ in chunk], [place.pictures.image(row) for _, row in chunk], place)
        for (one, _), row in zip(chunk, rows, strict=True):
            place.records.add(one.key, kind="real", prompt=one.prompt, style=one.style, contents=one.contents, **row)


def _in_scenes(chunk: Sequence[Asked], drawn: Sequence[Image.Image], place: Place) -> list[dict[str, object]]:
    finder = Finder(place.judge, place.records[THRESHOLD]["threshold"])
    rows: list[dict[str, object]] = []
    for one, picture in zip(chunk, drawn, strict=True):
        assert one.scene
        sight = finder.look(picture, one.scene.boxes)
        styles = place.judge.style_scores(sight.seen)
        right = [is_style(row, one.style, place) for row in styles]
        found = measure(finder, sight, one.scene, ())
        rows.append({"present": found["present"], "placed": found["placed"], "styles_right": right})
    return rows


def _calibrated(contents: Sequence[str], count: int, options: BaseOptions, place: Place) -> Iterator[Event]:
    """Choose from when on a content counts as found, on scenes pasted from real pictures; and score those as drawn."""
    if place.records.has(THRESHOLD):
        return
    yield Stage(name="calibrate", detail="scenes pasted from real pictures")
    real = {(row.content, row.style): row for row in place.pictures.rows}
    asked = [
        one for one in scenes(contents, 4 * count, options.seed + 1)
        if all((content, one.style) in real for content in one.contents)
    ][:count]  # fmt: skip
    pictures: list[Image.Image] = []
    for one in asked:
        parts = [place.pictures.image(real[content, one.style]) for content in one.contents]
        assert one.scene
        pictures.append(pasted(parts, one.scene.boxes, place.model.native_size, one.seed))
    half = len(asked) // 2
    found = calibrate(
        place.judge, [(a.scene, p) for a, p in zip(asked[:half], pictures[:half], strict=True) if a.scene]
    )
    place.records.add(THRESHOLD, kind="threshold", **asdict(found))
    for one, picture, row in zip(
        asked[half:], pictures[half:], _in_scenes(asked[half:], pictures[half:], place), strict=True
    ):
        key = one.key.replace("scene", "pasted")
        place.keep(key, picture)
        place.records.add(key, kind="pasted", prompt=one.prompt, style=one.style, contents=one.contents, **row)


def rank(scores: torch.Tensor, right: int) -> int:
    """Place of `right` among the scores, from 1."""
    return int((scores > scores[right]).sum()) + 1


def is_style(scores: torch.Tensor, wanted: str, place: Place) -> bool:
    """Whether this is the nearest of the ten base styles: only they can be asked for by name."""
    nearest = max(STYLES, key=lambda style: float(scores[place.judge.styles.index(style)]))
    return TWINS.get(nearest, nearest) == TWINS.get(wanted, wanted)


def _variety(asked: Sequence[Asked], place: Place) -> Iterator[Event]:
    """How much pictures of one prompt differ: ST-LPIPS of every two seeds, and of as many pairs of other prompts."""
    by_prompt: dict[str, list[Asked]] = {}
    for one in asked:
        by_prompt.setdefault(one.prompt, []).append(one)
    groups = list(by_prompt.values())
    for i, group in enumerate(groups):
        key = f"variety-of/{i:02d}"
        if place.records.has(key):
            continue
        place.token.check()
        pairs = list(combinations(group, 2))
        strangers = groups[(i + 1) % len(groups)]
        same = instruments.st_lpips(_opened([a for a, _ in pairs], place), _opened([b for _, b in pairs], place))
        other = instruments.st_lpips(_opened(group, place), _opened(strangers[: len(group)], place))
        place.records.add(
            key, kind="variety-of", prompt=group[0].prompt, same=float(same.mean()), other=float(other.mean())
        )
        yield Progress(stage="variety", step=i + 1, total=len(groups))


def _opened(asked: Sequence[Asked], place: Place) -> list[Image.Image]:
    from PIL import Image

    return [Image.open(place.path(one.key)).convert("RGB") for one in asked]


def _memory(asked: Sequence[Asked], place: Place, count: int) -> Iterator[Event]:
    """How near pictures come to a training picture: nearest by the judge, distance by ST-LPIPS.

    Real held-out pictures are measured alike: what was never trained on is as far from training as new pictures are.
    """
    training = place.pictures.of(split="train")
    if not training:
        yield Notice(
            text="Memorisation is measured against the training pictures: build them with `intarsia corpus build`."
        )
        return
    rng = random.Random(f"memory {place.records.header['options']['seed']}")
    hidden = place.pictures.of(split="held-out")
    real = rng.sample(hidden, min(count, len(hidden)))
    drawn = {kind: [one for one in asked if one.key.startswith(f"{kind}/")] for kind in ("held-in", "held-out")}
    wanted: list[tuple[str, str, Image.Image]] = []
    for kind, group in drawn.items():
        chosen = rng.sample(group, min(count, len(group)))
        wanted += [
            (f"near/{one.key}", kind, picture) for one, picture in zip(chosen, _opened(chosen, place), strict=True)
        ]
    wanted += [(f"near/real/{row.file}", "real", place.pictures.image(row)) for row in real]
    wanted = [item for item in wanted if not place.records.has(item[0])]
    if not wanted:
        return
    yield Stage(name="memory", detail=f"{len(training)} training pictures")
    bank = _bank(training, place)
    for start in range(0, len(wanted), CHUNK):
        place.token.check()
        chunk = wanted[start : start + CHUNK]
        near = [
            training[i]
            for i in (place.judge.embed([p for _, _, p in chunk], style=False).content @ bank.T).argmax(1).tolist()
        ]
        far = instruments.st_lpips([p for _, _, p in chunk], [place.pictures.image(row) for row in near])
        for (key, kind, _), row, distance in zip(chunk, near, far.tolist(), strict=True):
            place.records.add(key, kind="near", of=kind, file=row.file, distance=distance)
        yield Progress(stage="memory", step=start + len(chunk), total=len(wanted))


def _bank(rows: Sequence[Captioned], place: Place) -> torch.Tensor:
    """Content embeddings of real pictures: `(rows, 96)`."""
    import torch

    made: list[torch.Tensor] = []
    for start in range(0, len(rows), 256):
        place.token.check()
        made.append(
            place.judge.embed([place.pictures.image(row, 64) for row in rows[start : start + 256]], style=False).content
        )
    return torch.cat(made)


def _distance(asked: Sequence[Asked], place: Place) -> Iterator[Event]:
    """Frechet distance of Lite0 features: held-out prompts drawn to real pictures, and real ones to each other."""
    if place.records.has("frechet") or not asked:
        return
    yield Stage(name="distance", detail="Lite0 features")
    rows = place.pictures.of(split="held-out")
    random.Random("frechet").shuffle(rows)
    half = min(len(rows) // 2, len(asked))
    place.token.check()
    first, second = (
        instruments.lite0([place.pictures.image(row) for row in part]) for part in (rows[:half], rows[half : 2 * half])
    )
    drawn = instruments.lite0(_opened(asked[:half], place))
    place.records.add(
        "frechet",
        kind="frechet",
        drawn=instruments.frechet(drawn, first),
        real=instruments.frechet(second, first),
        count=half,
    )


def _speed(asked: Sequence[Asked], options: BaseOptions, place: Place) -> Iterator[Event]:
    """Seconds for one picture alone, as a person waits for it; the first warms up."""
    from ....pipelines.batch import render_many

    if place.records.has("speed"):
        return
    yield Stage(name="speed")
    taken: list[float] = []
    for one in asked[:6]:
        place.token.check()
        begun = time.perf_counter()
        list(
            render_many(
                place.model, [one.prompt], [one.seed], steps=options.steps, guidance=options.guidance,
                scheduler=options.scheduler,
            )
        )  # fmt: skip
        taken.append(time.perf_counter() - begun)
    place.records.add("speed", kind="speed", seconds=taken[1:])


BENCH = Base()
