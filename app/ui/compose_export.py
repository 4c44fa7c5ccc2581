"""The sheet as files for others: one HTML file with its pictures in it, and JSON."""

from __future__ import annotations

import base64
import time
from pathlib import Path

from ...composition.layout import ComposeRequest
from ...pipelines.atomic import replacing
from ...pipelines.errors import InputError
from ..studio import Job
from .compose_panels import spectrum_html
from .compose_sheet import Plan, Sheet, Shot, sheet_json, sheet_table
from .compose_view import Shown, key, plan_of
from .desk import Desk
from .pieces import MOTIF, esc, facts
from .theme import styles

MAP = 200  # units of the little map's width


def export_html(desk: Desk, shown: Shown) -> Path:
    """Write the sheet as one HTML file beside the job; gives its path.

    Raises:
        InputError: Nothing was drawn yet.
    """
    return _written(shown.job, "html", sheet_page(shown.request, _drawn(shown), plan_of(desk, shown), shown.job))


def export_json(shown: Shown) -> Path:
    """Write the sheet as JSON beside the job; gives its path.

    Raises:
        InputError: Nothing was drawn yet.
    """
    return _written(shown.job, "json", sheet_json(_drawn(shown)))


def _drawn(shown: Shown) -> Sheet:
    if not shown.sheet.shots:
        raise InputError("There is no picture to export yet.", "Wait for the first one.")
    return shown.sheet


def _written(job: Job, suffix: str, text: str) -> Path:
    path = job.folder / f"intarsia-{job.id}.{suffix}"
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")
    return path


def sheet_page(request: ComposeRequest, sheet: Sheet, plan: Plan, job: Job) -> str:
    """The whole page: layout, settings, table and spectrum, with every picture inside."""
    said = esc(request.said or "Composition")
    table = sheet_table(sheet, Plan(plan.methods, plan.seeds), _embedded)
    spectrum = spectrum_html(sheet.spectrum) if sheet.spectrum else ""
    size = f"{request.width or 'own'} x {request.height or 'own'}" if request.width or request.height else ""
    settings = facts(
        (
            ("Model", Path(request.model).name),
            ("Size", size),
            ("Steps", request.steps),
            ("Guidance", f"{request.guidance:g}"),
            ("Scheduler", request.scheduler.replace("_", " ")),
            ("Negative prompt", request.negative),
            ("Styles", ", ".join(f"{Path(use.adapter).stem} {use.weight:g}" for use in request.styles)),
            ("Drawn", time.strftime("%d %b %Y, %H:%M", time.localtime(job.created))),
            ("Options", _options(request)),
        )
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{said}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{styles()}</style></head><body>"
        '<script>document.body.classList.toggle("dark",matchMedia("(prefers-color-scheme: dark)").matches)</script>'
        f'<main class="exported gradio-container"><header><div class="brand">{MOTIF}<span>Intarsia</span></div>'
        f'<h1>{said}</h1></header><section class="exported-plan">{layout_map(request)}'
        f"<div>{key(sheet.concepts)}{_cast(request)}{settings}</div></section>"
        f'<section class="sheet">{table}</section><section class="behind">{spectrum}</section></main></body></html>'
    )


def _embedded(_: int, shot: Shot) -> str:
    data = base64.b64encode(Path(shot.picture).read_bytes()).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{esc(shot.title)}, seed {shot.seed}">'


def _cast(request: ComposeRequest) -> str:
    rows = "".join(
        f'<li class="c{index}"><i></i><b>{esc(use.called)}</b> {esc(Path(use.adapter).stem)} at {use.weight:g}'
        f"{f': {esc(use.prompt)}' if use.prompt else ''}</li>"
        for index, use in enumerate(request.concepts)
    )
    return f'<ul class="cast-words">{rows}</ul>'


def _options(request: ComposeRequest) -> str:
    told = [
        f"{use.method}: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in use.options.items())
        for use in request.methods
        if use.options
    ]
    return "; ".join(told)


def layout_map(request: ComposeRequest) -> str:
    """A small drawing of the boxes; what has a mask or no place is left to the words."""
    height = MAP * (request.height or 1) / (request.width or 1) if request.width and request.height else MAP
    boxes: list[str] = []
    for index, use in sorted(enumerate(request.concepts), key=lambda pair: pair[1].order):
        if use.box is None:
            continue
        left, top, right, bottom = use.box
        boxes.append(
            f'<rect class="c{index}" x="{left * MAP:.1f}" y="{top * height:.1f}" width="{(right - left) * MAP:.1f}"'
            f' height="{(bottom - top) * height:.1f}" rx="2"/>'
        )
    return (
        f'<svg class="layout-map" viewBox="0 0 {MAP} {height:.0f}" role="img" aria-label="Layout">'
        f'<rect class="ground" width="{MAP}" height="{height:.0f}"/>{"".join(boxes)}</svg>'
    )
