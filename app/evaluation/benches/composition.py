"""Composition: several taught contents in one picture, each in its own box."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ....pipelines.errors import InputError
from ....pipelines.events import Artifact, Event, Progress, Stage
from ....pipelines.options import option
from ..bench import Place, Summary
from ..composed import ARMS, Arm, Kit
from ..layouts import ARRANGEMENTS, Scene, choose, draw_scenes, outlined, pasted
from ..options import EvaluationOptions
from ..presence import Finder, calibrate, measure

if TYPE_CHECKING:
    from PIL import Image

    from ....pipelines.adapter_types import AdapterFile
    from ....pipelines.judge import Embedded

FEWEST_STYLES = 9  # a held-out content must be drawn in, to be taught


class CompositionOptions(EvaluationOptions):
    """Options of the composition bench. What is left empty differs between a quick and a full run."""

    contents: int | None = option(None, label="Taught contents", help="Empty: 8, quick 4.", low=2, high=40)
    scenes: int | None = option(
        None, label="Scenes", help="Per number of contents (2, 3, 4). Empty: 8, quick 2.", low=1, high=200
    )
    seeds: int | None = option(None, label="Seeds", help="Pictures per scene. Empty: 4, quick 2.", low=1, high=100)
    styles: str = option(
        "", label="Styles", help="With commas. Empty: noto, twemoji, fluent-3d; quick the first and the last.", high=200
    )
    arms: str = option("", label="Arms", help="What is compared, with commas. Empty: everything.", high=200)
    train_steps: int | None = option(
        None, label="Training steps", help="Per content. Empty: 1200, quick 600.", low=1, high=10_000, unit="steps"
    )
    rank: int = option(16, label="Rank", help="Of the adapters.", low=1, high=512)
    weight: float = option(1.0, label="Weight", help="Of every adapter.", low=-7, high=7)
    steps: int = option(20, label="Steps", help="Denoising steps.", low=1, high=200, unit="steps")
    guidance: float = option(5.0, label="Guidance", help="How strictly to follow the prompt.", low=0, high=30)
    size: int | None = option(
        None, label="Size", help="Side of a picture. Empty: the model's own.", low=64, high=2048, multiple_of=8,
        unit="pixels",
    )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Everything a run does.

    Args:
        contents: To be taught, with the styles each is drawn in.
        strangers: Held out and not taught, with theirs.
        scenes: To be drawn.
        rehearsals: Scenes of other held-out contents, for the calibration.
        arms: To be compared.
        seeds: Of every scene.
        train_steps: Per content.
    """

    contents: Mapping[str, tuple[str, ...]]
    strangers: Mapping[str, tuple[str, ...]]
    scenes: tuple[Scene, ...]
    rehearsals: tuple[Scene, ...]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    train_steps: int


def plan(options: CompositionOptions, place: Place) -> Plan:
    """Fill in what was left empty, and choose contents and scenes.

    Raises:
        InputError: Too few pictures, or an unknown arm or style.
    """
    quick = options.quick
    names = _listed(options.arms) or list(ARMS)
    if unknown := [name for name in names if name not in ARMS]:
        raise InputError(f"There is no arm {unknown[0]}.", f"Arms: {', '.join(ARMS)}.")
    drawn, groups = _held_out(place)
    enough = {content: group for content, group in groups.items() if len(drawn[content]) >= FEWEST_STYLES}
    taught = choose(enough, options.contents or (4 if quick else 8))
    others = {content: styles for content, styles in drawn.items() if content not in taught}
    styles = _listed(options.styles) or (["noto", "fluent-3d"] if quick else ["noto", "twemoji", "fluent-3d"])
    known = {style for found in drawn.values() for style in found} & set(place.judge.styles)
    if strange := [style for style in styles if style not in known]:
        raise InputError(
            f"No held-out content is drawn in a style {strange[0]} that the judge knows.",
            f"Styles: {', '.join(sorted(known))}.",
        )
    shown = {content: drawn[content] for content in taught}
    return Plan(
        contents=shown,
        strangers=others,
        scenes=draw_scenes(shown, styles, options.scenes or (2 if quick else 8), options.seed),
        rehearsals=draw_scenes(others, styles, 4 if quick else 12, options.seed),
        arms=tuple(ARMS[name] for name in names),
        seeds=tuple(options.seed + number for number in range(options.seeds or (2 if quick else 4))),
        train_steps=options.train_steps or (600 if quick else 1200),
    )


def _listed(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _held_out(place: Place) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Every held-out content with the base styles it is drawn in, and its group; in the order of their codes."""
    from ....training.corpus import SETS

    base = {icon_set.style for icon_set in SETS}
    rows = [row for row in place.pictures.of(split="held-out") if row.style in base]
    rows.sort(key=lambda row: (row.code, row.style))
    drawn: dict[str, tuple[str, ...]] = {}
    for row in rows:
        drawn[row.content] = (*drawn.get(row.content, ()), row.style)
    return drawn, {row.content: row.group for row in rows}


@dataclass
class Work:
    """A run under way.

    Args:
        singles: Pictures of one content alone, by name: kept while scenes of it are drawn.
        real: Real pictures' embeddings by (content, style): judge's content row and Lite0's features.
    """

    plan: Plan
    kit: Kit
    finder: Finder
    singles: dict[str, Image.Image] = field(default_factory=dict[str, "Image.Image"])
    real: dict[tuple[str, str], tuple[Any, Any]] = field(default_factory=dict[tuple[str, str], tuple[Any, Any]])


class Composition:
    """Measures what of several taught contents is present, in place, itself, and undisturbed by the others."""

    name = "composition"
    title = "Several taught contents in one picture, each in its box"
    options = CompositionOptions

    def run(self, options: CompositionOptions, place: Place) -> Iterator[Event]:
        found = plan(options, place)
        size = (options.size, options.size) if options.size else place.model.native_size
        yield Stage(name="calibrate", detail=f"{len(found.rehearsals)} scenes of real pictures")
        bare = Kit(place, {}, options.weight, options.steps, options.guidance, size)
        finder = Finder(place.judge, _threshold(found, bare))
        family = place.model.family
        able = [(scene, arm) for scene in found.scenes for arm in found.arms if arm.able(scene, family)]
        missing = [(scene, arm) for scene, arm in able if _open(found, place, scene, arm)]
        adapters: dict[str, AdapterFile] = {}
        if any(arm.taught for _, arm in missing):
            adapters = yield from _teach(options, found, place)
        kit = Kit(place, adapters, options.weight, options.steps, options.guidance, size)
        work = Work(found, kit, finder)
        for number, (scene, arm) in enumerate(missing):
            yield Stage(name="draw", detail=f"{arm.title}: {scene.prompt}")
            yield from _measure(work, scene, arm)
            yield Progress(stage="draw", step=number + 1, total=len(missing))

    def summarise(self, options: CompositionOptions, place: Place) -> Summary:
        from ..composition_report import report

        return report(place, options.weight)


def _key(scene: Scene, arm: Arm, seed: int) -> str:
    return f"{scene.name}/{arm.name}-{seed}"


def _open(found: Plan, place: Place, scene: Scene, arm: Arm) -> list[int]:
    """The seeds of a scene that an arm has yet to draw."""
    return [seed for seed in found.seeds if not place.records.has(_key(scene, arm, seed))]


def _threshold(found: Plan, kit: Kit) -> float:
    """Calibrate on scenes of real pictures of contents that are not taught; once."""
    records = kit.place.records
    if not records.has("calibration"):
        truth = ARMS["truth"].draw
        pictures: list[tuple[Scene, Image.Image]] = []
        for scene in found.rehearsals:
            kit.place.token.check()
            pictures.append((scene, truth(kit, scene, found.seeds[:1])[0]))
        made = calibrate(kit.place.judge, pictures, kit.place.token)
        records.add("calibration", kind="calibration", scenes=len(pictures), **vars(made))
    return float(records["calibration"]["threshold"])


def _teach(options: CompositionOptions, found: Plan, place: Place) -> Generator[Event, None, dict[str, AdapterFile]]:
    """Train one adapter per content from its lessons, or take those of an earlier run."""
    from ..training import training

    adapters: dict[str, AdapterFile] = {}
    for content in found.contents:
        place.token.check()
        shown = list(_lessons(content, found, place, random.Random(f"lessons of {content}, {options.seed}")))
        made = yield from training(
            place, "lora", content, shown, {"steps": found.train_steps, "rank": options.rank}, options.seed
        )
        adapters[content] = made.adapters[0]
        if not place.records.has(f"taught/{content}"):
            place.records.add(
                f"taught/{content}", kind="taught", content=content, pictures=len(shown), steps=found.train_steps,
                seconds=made.seconds,
            )  # fmt: skip
    return adapters


def _lessons(content: str, found: Plan, place: Place, rng: random.Random) -> Iterator[tuple[Image.Image, str]]:
    """What a content is taught from: in each style its real picture, and twice beside a content that is not taught.

    Alone it would be learned as a thing that fills the canvas, and no scene could hold it.
    """
    from ....training.scenes import named

    side = max(place.model.native_size)

    def real(name: str, style: str) -> Image.Image:
        return place.pictures.image(place.pictures.of(content=name, style=style)[0], side)

    for style in found.contents[content]:
        yield real(content, style), f"{named(content)}, {style} style"
        beside = [other for other, styles in found.strangers.items() if style in styles]
        for other in rng.sample(beside, min(2, len(beside))):
            members = (content, other) if rng.random() < 0.5 else (other, content)
            scene = Scene(0, rng.choice(ARRANGEMENTS[2]), members, style)
            pictures = [real(member, style) for member in members]
            yield pasted(pictures, scene.boxes, (side, side), rng.randrange(2**32)), scene.prompt


def _measure(work: Work, scene: Scene, arm: Arm) -> Iterator[Event]:
    """Draw a scene with every seed that is open, and write down what is in the pictures."""
    from ....composition.meter import metered

    place, seeds = work.kit.place, _open(work.plan, work.kit.place, scene, arm)
    alone = [_singles(work, ARMS[arm.alone], scene.alone(i), seeds) for i in range(len(scene.contents))]
    place.token.check()
    with metered(place.model) as meter:
        pictures = arm.draw(work.kit, scene, seeds)
    others = [content for content in work.plan.contents if content not in scene.contents]
    for index, (seed, picture) in enumerate(zip(seeds, pictures, strict=True)):
        place.token.check()
        sight = work.finder.look(picture, scene.boxes)
        measured = measure(work.finder, sight, scene, others)
        beside = pasted([singles[index] for singles in alone], scene.boxes, picture.size)
        path = place.keep(_key(scene, arm, seed), picture)
        marks = ["+" if ok else "o" if there else "-" for ok, there in
                 zip(measured["placed"], measured["present"], strict=True)]  # fmt: skip
        place.keep(f"{_key(scene, arm, seed)}-boxes", outlined(picture, scene, marks))
        place.records.add(
            _key(scene, arm, seed),
            kind="picture", scene=scene.name, count=len(scene.contents), contents=scene.contents, style=scene.style,
            prompt=scene.prompt, arm=arm.name, seed=seed, **measured, **_looks(work, scene, picture, sight.seen),
            **{f"{name}_alone": values for name, values in _looks(work, scene, beside).items()},
            seconds=round(meter.seconds / len(seeds), 4), passes=meter.rows / len(seeds), memory=meter.memory,
        )  # fmt: skip
        yield Artifact(kind="picture", path=str(path), label=f"{arm.name}, seed {seed}: {scene.prompt}")


def _singles(work: Work, arm: Arm, scene: Scene, seeds: Sequence[int]) -> list[Image.Image]:
    """Draw one content alone with every seed, as a yardstick; kept, so that a resumed run has it too."""
    from PIL import Image

    place, content = work.kit.place, scene.contents[0]
    names = {seed: f"alone/{content.replace('/', ' ')}-{scene.style}-{arm.name}-{seed}" for seed in seeds}
    for name in names.values():
        if name not in work.singles and place.path(name).is_file():
            with Image.open(place.path(name)) as kept:
                work.singles[name] = kept.convert("RGB")
    missing = [seed for seed, name in names.items() if name not in work.singles]
    for seed, picture in zip(missing, arm.draw(work.kit, scene, missing) if missing else [], strict=True):
        work.singles[names[seed]] = picture
        place.keep(names[seed], picture)
    for seed, name in names.items():
        if not place.records.has(name):
            seen = place.judge.embed([work.singles[name]])
            named = float(work.finder.named(place.judge.content_scores(seen), content)[0]) > -1
            place.records.add(
                name, kind="alone", content=content, style=scene.style, arm=arm.name, seed=seed, named=named,
                **_looks(work, scene, work.singles[name], seen),
            )  # fmt: skip
    return [work.singles[name] for name in names.values()]


def _looks(work: Work, scene: Scene, picture: Image.Image, seen: Embedded | None = None) -> dict[str, list[float]]:
    """Compare the box of every content with its real picture: `identity` by the judge, `lite0`; and its `fidelity`
    to the style of the prompt. `seen` are the judge's embeddings of the boxes, if they are there already."""
    from ..instruments import cosine, lite0

    judge, boxes = work.kit.place.judge, scene.boxes
    seen = judge.embed([picture] * len(boxes), boxes) if seen is None else seen
    width, height = picture.size
    crops = [
        picture.crop((round(x * width), round(y * height), round(right * width), round(bottom * height)))
        for x, y, right, bottom in boxes
    ]
    features = lite0(crops)
    identity: list[float] = []
    likeness: list[float] = []
    for index, content in enumerate(scene.contents):
        content_row, real_features = _real(work, content, scene.style)
        identity.append(round(float((seen.content[index] * content_row).sum()), 4))
        likeness.append(round(float(cosine(features[index : index + 1], real_features)[0]), 4))
    style = judge.style_scores(seen)[:, judge.styles.index(scene.style)]
    return {"identity": identity, "lite0": likeness, "fidelity": [round(value, 4) for value in style.tolist()]}


def _real(work: Work, content: str, style: str) -> tuple[Any, Any]:
    """The real picture of a content in a style, as the judge and as Lite0 see it; looked at once."""
    from ..instruments import lite0

    if (content, style) not in work.real:
        picture = work.kit.real(content, style)
        work.real[content, style] = work.kit.place.judge.embed([picture]).content[0], lite0([picture])
    return work.real[content, style]


BENCH: Any = Composition()
