"""The Runs tab: every job with its state, and what became of the one that is opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from ...pipelines.requests import EffectRequest, ToolRequest, TrainRequest
from ..present import duration, title
from ..studio import Job, JobKind
from . import training
from .desk import CALM, Desk, Seen, shown
from .library_effect import effect_of
from .pieces import button, clock, empty, esc, facts, image, progress
from .stage import stage_words, status_line
from .watch import Watch, pictures_of

RUNS = 50
KINDS: dict[JobKind, str] = {
    "generate": "Picture",
    "train": "Training",
    "tool": "Tool",
    "effect": "Effect",
    "compose": "Composition",
}


@dataclass(frozen=True)
class RunsTab:
    """The parts of the tab that the page's clock keeps up to date."""

    table: gr.HTML
    detail: gr.HTML

    @property
    def watched(self) -> list[Component]:
        return [self.table, self.detail]


def build(desk: Desk, seen: gr.State) -> RunsTab:
    """Lay the tab out and connect what happens inside it."""
    gr.HTML(
        "<h2>Runs</h2><p>Everything the studio did and is doing. Runs go on when the page is closed.</p>",
        apply_default_css=False,
        elem_classes="tab-head",
    )
    script = "intarsia.actions(element, trigger); /* 'act' */"
    with gr.Row(elem_classes="runs"):
        table = gr.HTML(elem_id="runs", apply_default_css=False, js_on_load=script)
        detail = gr.HTML(elem_id="run-detail", apply_default_css=False, js_on_load=script)
    tab = RunsTab(table, detail)

    @shown
    def act(given: Seen, event: gr.EventData) -> list[Any]:
        job_id = str(event.job) if event.act in ("open", "stop", "resume") else ""
        match event.act:
            case "open":
                given.run = job_id
            case "stop":
                desk.studio.cancel(job_id)
                desk.await_end(job_id)
            case "resume":
                job = desk.studio.resume(job_id)
                given.run = given.training = job.id
                given.unfinished.add(job.id)
            case _:
                pass
        return refresh(desk, given)

    for place in (table, detail):
        place.act(act, seen, tab.watched, **CALM)
    return tab


def refresh(desk: Desk, seen: Seen) -> list[Any]:
    """Values for `tab.watched`, unchanged ones left alone."""
    jobs = desk.studio.jobs(limit=RUNS)
    opened = next((job for job in jobs if job.id == seen.run), jobs[0] if jobs else None)
    return [
        seen.fresh("runs", table_html(desk, jobs, opened)),
        seen.fresh("run-detail", detail_html(desk, opened) if opened else ""),
    ]


def table_html(desk: Desk, jobs: list[Job], opened: Job | None) -> str:
    """All jobs, newest first, as rows to click."""
    if not jobs:
        return empty("Nothing has run yet", "Generate a picture or train an adapter; every run is listed here.")
    rows = "".join(row(job, desk.look(job), opened is not None and opened.id == job.id) for job in jobs)
    return f'<div class="run-list">{rows}</div>'


def row(job: Job, watch: Watch, chosen: bool) -> str:
    """One job in the list: what, how it stands, when, how long."""
    took = duration(job.finished - job.started) if job.finished and job.started else ""
    going = job.state == "running"
    middle = progress(watch.fraction, busy=not watch.total) if going else ""
    said = stage_words(watch) if going else took
    return (
        f'<button type="button" class="run-row{" chosen" if chosen else ""}" data-act="open" data-job="{esc(job.id)}"'
        f' data-state="{job.state}"><span class="kind">{KINDS[job.kind]}</span>'
        f'<span class="title">{esc(title(job.request))}</span>'
        f'{training.state_chip(job)}<span class="num">{esc(said)}</span>'
        f'<span class="num when">{clock(job.created)}</span>{middle}</button>'
    )


def detail_html(desk: Desk, job: Job) -> str:
    """The opened job: its request, what it did, what can be done with it."""
    tools = ""
    if not job.finished_already:
        tools = button("Stop", "stop", job=job.id)
    body = training.live(desk, job) if job.kind == "train" else _pictures(desk, job)
    if job.kind == "effect" and job.state == "done":
        body += effect_of(desk, job)
    wanted = job.request.model_dump(exclude_none=True, exclude={"kind", "adapter", "adapters", "pictures", "options"})
    pairs = [(name.replace("_", " ").capitalize(), value) for name, value in wanted.items()]
    if isinstance(job.request, EffectRequest):
        pairs.append(("Adapter", job.request.adapter.spelled))
    if isinstance(job.request, TrainRequest | ToolRequest):
        pairs += [(name.replace("_", " ").capitalize(), value) for name, value in job.request.options.items()]
    pairs += [("Device", job.device), ("Job", job.id), ("Goes on from", job.parent)]
    return (
        f'<section class="detail" data-job="{esc(job.id)}" data-state="{job.state}"><div class="tools">{tools}</div>'
        f"{body}<details><summary>Settings</summary>{facts(pairs)}</details></section>"
    )


def _pictures(desk: Desk, job: Job) -> str:
    watch = desk.look(job)
    found = "".join(f"<figure>{image(picture.path, 'Result')}</figure>" for picture in pictures_of(watch))
    going = "" if job.finished_already else status_line(job, watch)
    if not found and not job.finished_already and watch.preview and Path(watch.preview[0]).is_file():
        found = f"<figure>{image(watch.preview[0], 'Preview', watch.preview[1] + 1)}</figure>"
    return (
        f'<header class="run-head"><h3>{esc(title(job.request))}</h3>{training.state_chip(job)}</header>{going}'
        f'{training.ending(job, watch)}<div class="strip large">{found}</div>'
    )
