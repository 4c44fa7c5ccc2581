"""How a training run looks: numbers, loss plot, sample pictures beside the base, results. HTML from the store."""

from __future__ import annotations

from pathlib import Path

from ...pipelines.events import Artifact, Failed, Interrupted, Stopped
from ...pipelines.requests import TrainRequest
from ..present import STATES, duration, rate, size
from ..studio import Job
from .desk import Desk, Seen
from .pieces import button, empty, esc, image, loss_plot
from .stage import status_line
from .watch import Watch

SAMPLES_SHOWN = 12


def current(desk: Desk, seen: Seen) -> Job | None:
    """The run this tab follows: the one it started, else one that is going on, else the newest."""
    jobs = desk.studio.jobs(limit=20, kind="train")
    chosen = next((job for job in jobs if job.id == seen.training), None)
    if chosen is not None and not chosen.finished_already:
        return chosen
    going = next((job for job in reversed(jobs) if not job.finished_already), None)
    return going or chosen or next(iter(jobs), None)


def live(desk: Desk, job: Job | None) -> str:
    """Everything about one run."""
    if job is None:
        return '<section class="stage hollow">' + empty(
            "Teach the studio something of yours",
            "One picture is enough for a B-LoRA: it learns what is shown and how it is drawn, apart from each other. "
            "Drop a picture, give it a name, start.",
        ) + "</section>"  # fmt: skip
    watch = desk.look(job)
    name = job.request.name if isinstance(job.request, TrainRequest) else ""
    parts = [
        f'<header class="run-head"><h3>{esc(name)}</h3>{state_chip(job)}</header>',
        numbers(job, watch),
        "" if job.finished_already else status_line(job, watch, brief=True),
        ending(job, watch),
        results(desk, watch),
        samples(watch),
        loss_plot(watch.losses, watch.reached.get("train", (0, 0))[1]),
    ]
    return f'<section class="run" data-job="{esc(job.id)}" data-state="{job.state}">{"".join(parts)}</section>'


def state_chip(job: Job) -> str:
    words = "stopping" if job.cancelling and job.state == "running" else STATES[job.state]
    return f'<span class="state {job.state}"><i></i>{esc(words)}</span>'


def numbers(job: Job, watch: Watch) -> str:
    """Step, rate, time left, loss, memory as a row of figures."""
    cells: list[tuple[str, str]] = []
    step, total = watch.reached.get("train", (0, 0))
    if total:
        cells.append(("Step", f"{step} / {total}"))
    if watch.rate:
        cells.append(("Speed", rate(watch.rate)))
    if watch.rate and step and not job.finished_already:
        cells.append(("Time left", duration((total - step) / watch.rate)))
    if job.finished_already and job.started and job.finished:
        cells.append(("Took", duration(job.finished - job.started)))
    if watch.losses:
        cells.append(("Loss", f"{watch.losses[-1][1]:.4f}"))
    if watch.memory:
        cells.append(("Memory", size(watch.memory)))
    inner = "".join(f"<div><span>{label}</span><b>{esc(value)}</b></div>" for label, value in cells)
    return f'<div class="numbers">{inner}</div>' if cells else ""


def ending(job: Job, watch: Watch) -> str:
    """What became of a run that did not simply finish, and the way on."""
    resume = button("Resume", "resume", "primary", job=job.id) if job.resumable else ""
    match watch.ended:
        case Failed(message=message, hint=hint):
            return f'<div class="note-card bad"><h3>Failed</h3><p>{esc(message)} {esc(hint)}</p></div>'
        case Interrupted():
            way = "Its last checkpoint is kept." if job.resumable else "No checkpoint was written yet."
            text = f"The process that did this work ended before it was done. {way}"
            return f'<div class="note-card bad"><h3>Interrupted</h3><p>{text}</p>{resume}</div>'
        case Stopped():
            text = "A checkpoint is kept: it goes on exactly from there." if job.resumable else ""
            return f'<div class="note-card"><h3>Stopped</h3><p>{text}</p>{resume}</div>'
        case _:
            return "".join(f'<p class="notice">{esc(text)}</p>' for text in watch.notices[-3:])


def results(desk: Desk, watch: Watch) -> str:
    """A card per adapter that came out, with one button that puts all of them into use."""
    if not watch.adapters:
        return ""
    known = {entry.name: entry for entry in desk.studio.shelf.entries()}
    cards = ""
    for artifact in watch.adapters:
        entry = known.get(artifact.label)
        what = f"{entry.role} · rank {entry.rank} · {entry.modules} modules" if entry else "no longer in the library"
        cards += f'<div class="made"><b>{esc(artifact.label)}</b><span>{esc(what)}</span></div>'
    names = [artifact.label for artifact in watch.adapters if artifact.label in known]
    use = button("Use in Generate", "use", "primary", name=names[0], tab="Generate") if names else ""
    return f'<div class="results"><h4>In your library</h4><div class="result-row">{cards}{use}</div></div>'


def samples(watch: Watch) -> str:
    """Sample pictures at the fixed seed, one row per prompt; the base model's picture comes first."""
    rows: dict[str, list[Artifact]] = {}
    for artifact in watch.samples:
        if Path(artifact.path).is_file():
            rows.setdefault(artifact.label, []).append(artifact)
    if not rows:
        return ""
    html = ""
    for label, row in rows.items():
        kept = row if len(row) <= SAMPLES_SHOWN else [row[0], *row[-SAMPLES_SHOWN + 1 :]]
        figures = "".join(_sample(artifact) for artifact in kept)
        title = f"<figcaption>{esc(label)}</figcaption>" if label else ""
        html += f'<div class="sample-row">{title}<div class="strip">{figures}</div></div>'
    return f'<div class="samples"><h4>Samples, same seed</h4>{html}</div>'


def _sample(artifact: Artifact) -> str:
    words = f"step {artifact.step}" if artifact.step else "base"
    return f'<figure>{image(artifact.path, words)}<span class="num">{words}</span></figure>'
