"""The measured effect of an adapter in its report: ask for it, watch it being drawn, see it by spatial frequency."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipelines.events import Failed, Interrupted, Stopped
from ...pipelines.requests import AdapterUse, EffectRequest
from ..studio import Job
from . import plots
from .desk import Desk
from .library_view import family_title
from .pieces import button, esc, facts, image
from .plots import Line
from .stage import status_line

if TYPE_CHECKING:
    from ..library_entry import Entry

MINI = "mini"
PROMPTS = {MINI: "a red apple, twemoji style"}  # what Mini knows well
PROMPT = "a house by a lake"
PAIRS = 4  # pictures with and without shown
WHAT = "Draws the same seeds with and without the adapter, and tells which spatial frequencies it changes."


def effect_html(desk: Desk, entry: Entry) -> str:
    """What is known of an adapter's effect, and the button that measures it."""
    job = newest(desk, entry)
    if job is not None and not job.finished_already:
        body = status_line(job, desk.look(job)) + button("Stop", "effect-stop", job=job.id)
    elif (model := model_for(desk, entry)) is None:
        return _section(
            f'<p class="soft">No model it fits is at hand: put one for {esc(family_title(entry.family))} into the '
            "studio's models folder, or draw with one once.</p>"
        )
    else:
        body = (effect_of(desk, job) if job else f'<p class="soft">{WHAT}</p>') + _ask(entry, model, job)
    return _section(body)


def start(desk: Desk, name: str, told: Mapping[str, Any]) -> Job:
    """Queue the measurement.

    Raises:
        IntarsiaError: There is no such adapter or model.
    """
    entry = desk.studio.shelf.find(name)
    model = model_for(desk, entry) or MINI
    wish = {"adapter": AdapterUse(adapter=name), "model": model, "prompt": str(told.get("prompt", ""))}
    return desk.studio.submit(EffectRequest.parse(wish))


def newest(desk: Desk, entry: Entry) -> Job | None:
    """The last measurement of an adapter, by its file where that is known, else by its name."""
    for job in desk.studio.jobs(limit=100, kind="effect"):
        assert isinstance(job.request, EffectRequest)  # the store was asked for this kind
        use = job.request.adapter
        if use.sha256 == entry.sha256 or (not use.sha256 and use.adapter == entry.name):
            return job
    return None


def model_for(desk: Desk, entry: Entry) -> str | None:
    """A model at hand that an adapter is for; Mini has widths of its own, so only what was made for it fits."""
    for model in desk.studio.models():
        if model.family == entry.family and (model.name == MINI) == (entry.base.lower() == MINI):
            return model.name
    return None


def effect_of(desk: Desk, job: Job) -> str:
    """What a measurement found, or why it ended without."""
    watch = desk.look(job)
    found = next((Path(report.path) for report in watch.reports if Path(report.path).is_file()), None)
    if found is not None:
        return _found(json.loads(found.read_text(encoding="utf-8")))
    match watch.ended:
        case Failed(message=message, hint=hint):
            return f'<p class="warning">{esc(message)} {esc(hint)}</p>'
        case Stopped():
            return '<p class="soft">Stopped before it was done.</p>'
        case Interrupted():
            return '<p class="warning">The process that drew the pictures ended before it was done.</p>'
        case _:
            return '<p class="soft">Its figures are gone.</p>'


def _found(effect: dict[str, Any]) -> str:
    edges: list[float] = effect["edges"]
    middles = [(low + high) / 2 for low, high in pairwise(edges)]
    chart = plots.lines(
        "Power by spatial frequency",
        "mean square of pixel values, 0 to 1",
        "cycles per pixel",
        middles,
        (Line("pictures without it", "base", effect["base"]), Line("what it changes", "change", effect["change"])),
        right=edges[-1],
    )
    low, base = effect["low"], effect["base_low"]
    changes, has = "of what it changes", "of the pictures"
    shares = facts(
        (
            (f"Low, below {effect['cut']:.2f}", f"{low:.1%} {changes}, {base:.1%} {has}"),
            ("High, above", f"{1 - low:.1%} {changes}, {1 - base:.1%} {has}"),
        )
    )
    pairs = "".join(
        f'<figure class="pair">{image(without, "Without the adapter")}{image(with_it, "With the adapter")}'
        f'<figcaption class="num">seed {seed}: without, with</figcaption></figure>'
        for without, with_it, seed in effect["pairs"][:PAIRS]
        if Path(without).is_file() and Path(with_it).is_file()
    )
    return f'{chart}{shares}<div class="pairs-row">{pairs}</div>'


def _ask(entry: Entry, model: str, job: Job | None) -> str:
    before = job.request.prompt if job is not None and isinstance(job.request, EffectRequest) else ""
    prompt = before or ", ".join(text for text in (entry.trigger, PROMPTS.get(model, PROMPT)) if text)
    label = "Measure again" if job else "Measure effect"
    return (
        f'<form class="edit" data-name="{esc(entry.name)}"><label>Prompt<input type="text" name="prompt"'
        f' value="{esc(prompt)}" autocomplete="off"></label>'
        f'<div class="tools">{button(label, "effect", "primary")}<span class="soft">with {esc(Path(model).name)}</span>'
        "</div></form>"
    )


def _section(body: str) -> str:
    return f'<section class="effect" aria-label="Effect on pictures"><h4>Effect on pictures</h4>{body}</section>'
