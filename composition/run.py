"""A composition job: every method and seed of a layout drawn, measured, scored, and told as events."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ..pipelines import schedule
from ..pipelines.atomic import replacing
from ..pipelines.events import Artifact, Event, Metric, Notice, Stage
from ..pipelines.image import Watch, notices, save
from ..pipelines.requests import GenerateRequest
from .composition import Composition, Concept
from .draw import moments, prepared, render
from .layout import ComposeRequest
from .meter import metered
from .method import CompositionMethod, Drawing, methods
from .score import score

if TYPE_CHECKING:
    from ..pipelines.boxes import Box
    from ..pipelines.judge import Judge

REPORT = "comparison.json"
VERSION = 1


@dataclass
class Comparison:
    """The report of a job, rewritten after every picture.

    Args:
        path: Of the file.
        layout: The request.
        rows: One per picture.
    """

    path: Path
    layout: Mapping[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    spectrum: Mapping[str, Any] | None = None

    def write(self) -> Artifact:
        value = {"version": VERSION, "layout": self.layout, "rows": self.rows, "spectrum": self.spectrum}
        with replacing(self.path) as temporary:
            temporary.write_text(json.dumps(value), "utf-8")
        return Artifact(kind="report", path=str(self.path), label="comparison")


def compose(request: ComposeRequest, composition: Composition, out: Path, folder: Path) -> Iterator[Event]:
    """Draw every seed with every method.

    Args:
        request: Checked, its methods with all their options.
        composition: The same, resolved; seed and memo are set for each picture.
        out: Folder the pictures go to, numbered.
        folder: Of the job: previews, masks and the report.

    Yields:
        Stages, progress over all steps of all pictures, previews, the pictures, and the report after each.

    Raises:
        IntarsiaError: An adapter does not fit, or a method cannot draw this.
        Cancelled: A stop was asked for; pictures that were finished stay.
    """
    model = composition.model
    sampler = schedule.make(request.scheduler, model.components["scheduler"], model.spec)
    schedule.check_steps(sampler, request.steps)
    for text in (*model.notes, *notices(_as_picture(request, composition), model)):
        yield Notice(text=text)
    judge = yield from _judge(request)
    memos: dict[str, dict[str, Any]] = {use.method: {} for use in request.methods}
    report = Comparison(folder / REPORT, request.model_dump(mode="json"))
    total, number = len(request.seeds) * len(request.methods), 0
    for seed in request.seeds:
        alone: list[Image.Image] | None = None
        for use in request.methods:
            composition.token.check()
            method = methods()[use.method]
            one = replace(composition, seed=seed, memo=memos[use.method])
            yield Stage(name="denoise", detail=f"{method.title}, seed {seed}")
            options = method.options.parse(use.options)
            with metered(model) as meter, prepared(one, method, options) as drawing:
                watch = Watch(model, drawing.work, one.size, folder, number, total, f"{use.method}, seed {seed}")
                yield from (Notice(text=text) for text in drawing.notices)
                facts: dict[str, list[float]] = {}
                latents = drawing.work.latents
                for moment in moments(one, drawing):
                    latents = moment.stepped.latents
                    yield from watch.events(moment.stepped, model.colours)
                    for name, value in drawing.facts().items():
                        facts.setdefault(name, []).append(value)
                        yield Metric(name=name, value=value, step=moment.stepped.index)
                masks = _save_masks(drawing, folder / f"masks-{number:03d}")
            with torch.no_grad():
                image = model.engine.decode(latents, one.size)[0]
            path = save(image, out, _as_picture(request, one), {"composition": _single(request, use.method, seed)})
            yield Artifact(kind="picture", path=str(path), label=f"{use.method}, seed {seed}", step=number)
            if judge is not None and alone is None:
                yield Stage(name="score", detail="each concept alone, as a yardstick")
                alone = [_drawn_alone(one, concept) for concept in one.concepts]
            report.rows.append({
                "method": use.method, "title": method.title, "seed": seed, "picture": str(path),
                "seconds": round(meter.seconds, 3), "passes": meter.rows, "memory": meter.memory, "facts": facts,
                "masks": masks,
                "scores": asdict(score(judge, image, one.names, boxes_of(one.concepts), alone))
                if judge is not None and alone is not None else None,
            })  # fmt: skip
            report.spectrum = one.memo.get("cmlora", {}).get("spectrum") or report.spectrum
            yield report.write()
            number += 1


def boxes_of(concepts: Sequence[Concept]) -> list[Box]:
    """Where to look for each concept: its box, the box around its mask, or the whole canvas."""
    found: list[Box] = []
    for concept in concepts:
        if concept.mask is not None:
            rows, columns = concept.mask.amax(1) > 0.5, concept.mask.amax(0) > 0.5
            (top, bottom), (left, right) = _extent(rows), _extent(columns)
            found.append((left, top, right, bottom))
        else:
            found.append(concept.box or (0.0, 0.0, 1.0, 1.0))
    return found


def _extent(line: torch.Tensor) -> tuple[float, float]:
    at = line.nonzero()[:, 0].tolist() or [0, len(line) - 1]
    return at[0] / len(line), (at[-1] + 1) / len(line)


def _judge(request: ComposeRequest) -> Generator[Event, None, Judge | None]:
    if not request.score:
        return None
    from ..pipelines.judge import Judge

    yield Stage(name="judge", detail="reading the judge")
    yield Notice(text="The judge was taught on drawn pictures; of photographs its scores say less.")
    return Judge.load()


def _drawn_alone(composition: Composition, concept: Concept) -> Image.Image:
    merge: CompositionMethod[Any] = methods()["merge"]
    whole = replace(concept, box=None, mask=None)
    one = replace(composition, concepts=(whole,), prompt=concept.prompt or composition.prompt, memo={})
    return render(one, merge, merge.options())


def _save_masks(drawing: Drawing, folder: Path) -> list[dict[str, str]]:
    """Write each concept's mask as a small grey picture."""
    kept: list[dict[str, str]] = []
    for index, (name, mask) in enumerate(drawing.masks().items()):
        folder.mkdir(exist_ok=True)
        grey = (mask.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        path = folder / f"{index}.png"
        with replacing(path) as temporary:
            Image.fromarray(grey).save(temporary, "PNG")
        kept.append({"concept": name, "path": str(path)})
    return kept


def _single(request: ComposeRequest, method: str, seed: int) -> dict[str, Any]:
    """The layout of one picture alone."""
    use = tuple(use for use in request.methods if use.method == method)
    return request.model_copy(update={"methods": use, "seeds": (seed,)}).model_dump(mode="json")


def _as_picture(request: ComposeRequest, composition: Composition) -> GenerateRequest:
    """The nearest request for a plain picture: what other programs read from the file."""
    names = set(GenerateRequest.model_fields) & set(ComposeRequest.model_fields) - {"kind"}
    width, height = composition.size
    values = request.model_dump(include=names) | {"prompt": composition.prompt, "seed": composition.seed}
    uses = tuple(use.plain for use in (*request.concepts, *request.styles_named()))
    return GenerateRequest.parse(values | {"width": width, "height": height, "adapters": uses})
