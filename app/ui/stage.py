"""The big picture and the gallery beneath it, as HTML made from the job store alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...pipelines.events import Artifact, Failed, Interrupted, Stopped
from ...pipelines.requests import AdapterUse, GenerateRequest
from ..present import STAGES, duration, rate
from ..studio import Job
from .desk import Desk, Seen
from .pieces import button, chip, empty, esc, file_url, image, progress
from .watch import Watch, pictures_of

GALLERY = 60  # pictures shown


def stage_words(watch: Watch) -> str:
    """Say what a job is doing."""
    words = STAGES.get(watch.stage, watch.stage.replace("_", " ").capitalize() or "Starting")
    return f"{words}, step {watch.step} of {watch.total}" if watch.total else words


def status_line(job: Job, watch: Watch, waiting: int = 0, brief: bool = False) -> str:
    """The line under a running job: what it does, how fast, how long still; `brief` leaves the figures out."""
    if job.cancelling and job.state == "running":
        words = "Stopping"
    elif job.state == "queued":
        words = "Waiting for its turn"
    else:
        words = stage_words(watch)
    parts = [f'<span class="what">{esc(words)}</span>']
    if watch.total and watch.rate and not brief:
        parts.append(f'<span class="num">{esc(rate(watch.rate))}</span>')
        if watch.left is not None and watch.step < watch.total:
            parts.append(f'<span class="num">{duration(watch.left)} left</span>')
    if waiting:
        parts.append(f'<span class="num">{waiting} more waiting</span>')
    busy = not watch.total
    return f'<div class="status">{progress(watch.fraction, busy)}<div class="line">{"".join(parts)}</div></div>'


def stage(desk: Desk, seen: Seen) -> str:
    """The big picture: the chosen one, the run that is going on, else the newest result."""
    active = desk.active("generate")
    line = status_line(active[0], desk.look(active[0]), len(active) - 1) if active else ""
    if seen.picture:
        chosen = _picture(desk, *seen.picture)
        if chosen:
            return _frame(chosen + line, "showing", active[0] if active else None)
        seen.picture = None
    if active:
        return _frame(_live(active[0], desk.look(active[0])) + line, "live", active[0])
    jobs = desk.studio.jobs(limit=1, kind="generate")
    if jobs and (trouble := _trouble(jobs[0], desk.look(jobs[0]))):
        return _frame(trouble, "ended", jobs[0])
    for job, number, _ in gallery_pictures(desk, 1):
        return _frame(_picture(desk, job.id, number), "showing", job)
    return _frame(
        empty(
            "Describe a picture, press Generate",
            "Or drop something here: a picture made in the studio brings its settings back, "
            "a .safetensors adapter goes into your library.",
        ),
        "hollow",
        None,
    )


def _frame(inner: str, mode: str, job: Job | None) -> str:
    state = f' data-job="{esc(job.id)}" data-state="{job.state}"' if job else ""
    return f'<section class="stage {mode}"{state} aria-live="polite">{inner}</section>'


def _live(job: Job, watch: Watch) -> str:
    if watch.preview:
        path, step = watch.preview
        return f'<div class="canvas">{image(path, "Preview of the picture", step + 1, "preview")}</div>'
    return '<div class="canvas"><div class="blank shimmer"></div></div>'


def _trouble(job: Job, watch: Watch) -> str:
    """What the stage says of a newest job that gave no picture."""
    if pictures_of(watch):
        return ""
    again = button("Use its settings again", "again", job=job.id)
    match watch.ended:
        case Failed(message=message, hint=hint):
            return _note("This run failed", f"{message} {hint}", again, "bad")
        case Interrupted():
            text = "The process that drew this picture ended before it was done. Nothing else was lost."
            return _note("Interrupted", text, again, "bad")
        case Stopped():
            text = f"Stopped at step {watch.step} of {watch.total}." if watch.total else "Stopped before it began."
            picture = _live(job, watch) if watch.preview and Path(watch.preview[0]).is_file() else ""
            return f'{picture}<div class="caption"><div class="words"><b>{esc(text)}</b></div>{again}</div>'
        case _:
            return ""


def _note(title: str, text: str, extra: str, mood: str) -> str:
    return f'<div class="note-card {mood}"><h3>{esc(title)}</h3><p>{esc(text)}</p>{extra}</div>'


def _picture(desk: Desk, job_id: str, number: int) -> str:
    job = desk.studio.job(job_id)
    watch = desk.look(job)
    found = pictures_of(watch)
    if not 0 <= number < len(found) or not isinstance(job.request, GenerateRequest):
        return ""
    path = found[number].path
    request = job.request
    words = [f"seed {request.seed + number}", f"{request.steps} steps", f"guidance {request.guidance:g}"]
    if request.scheduler != "default":
        words.append(request.scheduler.replace("_", " "))
    if watch.seconds:
        words.append(duration(watch.seconds))
    chips = "".join(chip(_use_words(use), "adapter", use.spelled) for use in request.adapters)
    notes = "".join(f'<p class="notice">{esc(text)}</p>' for text in watch.notices)
    url = file_url(path)
    tools = (
        button("Use settings", "restore", job=job_id, index=number)
        + button("Use seed", "seed", job=job_id, index=number)
        + f'<a class="btn" href="{url}" target="_blank" rel="noopener">Open</a>'
        + f'<a class="btn" href="{url}" download="{esc(Path(path).name)}">Download</a>'
    )
    return (
        f'<div class="canvas">{image(path, request.prompt or "Picture", classes="result")}</div>'
        f'<div class="caption"><div class="words">'
        f'<b title="{esc(request.prompt)}">{esc(request.prompt or "No prompt")}</b>'
        f'<span class="num">{esc(" · ".join(words))}</span>{chips}{notes}</div>'
        f'<div class="tools">{tools}</div></div>'
    )


def _use_words(use: AdapterUse) -> str:
    words = [f"{use.adapter} {use.weight:g}"]
    if use.blocks:
        words.append("1 part" if len(use.blocks) == 1 else f"{len(use.blocks)} parts")
    if (use.first, use.last) != (0, 1):
        words.append(f"{use.first:.0%} to {use.last:.0%}")
    return ", ".join(words)


def gallery_pictures(desk: Desk, limit: int = GALLERY) -> Iterator[tuple[Job, int, Artifact]]:
    """Results, newest first: job, the picture's number in it, the artifact."""
    count = 0
    for job in desk.studio.jobs(limit=GALLERY, kind="generate"):
        found = pictures_of(desk.look(job))
        for number in range(len(found) - 1, -1, -1):
            yield job, number, found[number]
            count += 1
            if count == limit:
                return


def gallery(desk: Desk, seen: Seen) -> str:
    """The results so far, newest first; a run in progress has its place already."""
    tiles = [
        f'<button type="button" class="tile pending" data-act="live" aria-label="Running job">'
        f'<i style="height:{100 * desk.look(job).fraction:.0f}%"></i></button>'
        for job in reversed(desk.active("generate"))
    ]
    for job, number, artifact in gallery_pictures(desk):
        assert isinstance(job.request, GenerateRequest)  # the store was asked for this kind
        prompt = esc(job.request.prompt)
        chosen = " chosen" if seen.picture == (job.id, number) else ""
        tiles.append(
            f'<button type="button" class="tile{chosen}" data-act="select" data-job="{esc(job.id)}"'
            f' data-index="{number}" title="{prompt}">'
            f'<img src="{file_url(artifact.path)}" alt="{prompt or "Picture"}" loading="lazy"></button>'
        )
    if not tiles:
        return ""
    return f'<div class="gallery-head"><h4>Pictures</h4></div><div class="tiles">{"".join(tiles)}</div>'
