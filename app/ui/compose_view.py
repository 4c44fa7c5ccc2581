"""What the Compose tab shows of the job store: the picture under the boxes, its words, the sheet, the history."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...composition.layout import ComposeRequest
from ...pipelines.errors import InputError
from ...pipelines.events import Failed, Interrupted, Stopped
from ..present import duration
from ..studio import Job
from .compose_panels import panels_html
from .compose_sheet import Plan, Sheet, Shot, sheet_table
from .desk import Desk, Seen
from .pieces import button, esc, file_url
from .stage import status_line
from .watch import pictures_of

HISTORY = 40  # compositions shown


@dataclass(frozen=True)
class Shown:
    """The composition a person looks at.

    Args:
        job: The newest, or the one that was chosen.
        request: Its layout.
        sheet: What its report says by now.
        index: The picture on the canvas; None while the run itself is followed, or if there is none.
    """

    job: Job
    request: ComposeRequest
    sheet: Sheet
    index: int | None

    @property
    def shot(self) -> Shot | None:
        return None if self.index is None else self.sheet.shots[self.index]

    @property
    def running(self) -> bool:
        return not self.job.finished_already


def shown_now(desk: Desk, seen: Seen) -> Shown | None:
    """Find what there is to look at; None if nothing was composed yet."""
    job, number = _chosen(desk, seen)
    if job is None or not isinstance(job.request, ComposeRequest):
        return None
    sheet = sheet_of(desk, job)
    count = len(sheet.shots)
    if number is None and job.finished_already and count:
        number = count - 1
    return Shown(job, job.request, sheet, number if number is not None and number < count else None)


def _chosen(desk: Desk, seen: Seen) -> tuple[Job | None, int | None]:
    if seen.composition:
        job_id, number = seen.composition
        try:
            return desk.studio.job(job_id), number
        except InputError:
            seen.composition = None
    jobs = desk.studio.jobs(limit=1, kind="compose")
    return (jobs[0] if jobs else None), None


def sheet_of(desk: Desk, job: Job) -> Sheet:
    """Read what the job's report says by now; pictures that are gone are left out."""
    assert isinstance(job.request, ComposeRequest)  # callers asked the store for this kind
    table = desk.studio.comparison(job.id) or {}
    rows = [row for row in table.get("rows", ()) if Path(str(row.get("picture", ""))).is_file()]
    return Sheet.read({**table, "rows": rows}, [use.called for use in job.request.concepts])


def under_html(desk: Desk, shown: Shown | None) -> dict[str, Any]:
    """The picture beneath the boxes, as the board wants it."""
    if shown is None:
        return {"src": "", "live": False}
    if shown.shot:
        return {"src": file_url(shown.shot.picture), "live": False}
    watch = desk.look(shown.job)
    if watch.preview and Path(watch.preview[0]).is_file():
        return {"src": file_url(watch.preview[0], watch.after), "live": shown.running}
    if shown.running and shown.sheet.shots:
        return {"src": file_url(shown.sheet.shots[-1].picture), "live": True}
    return {"src": "", "live": shown.running}


def caption(desk: Desk, shown: Shown | None) -> str:
    """The words under the canvas: what it shows, what the run is doing, what went wrong."""
    if shown is None:
        return ""
    watch = desk.look(shown.job)
    waiting = len(desk.active("compose")) - 1
    line = status_line(shown.job, watch, max(waiting, 0)) if shown.running else ""
    if shown.running and watch.preview_label and not shown.shot:
        line = f'<p class="doing">{esc(_spoken(desk, watch.preview_label))}</p>{line}'
    notes = "".join(f'<p class="notice">{esc(text)}</p>' for text in watch.notices)
    match watch.ended:
        case Failed(message=message, hint=hint):
            line = _ended("This run failed", f"{message} {hint}", "bad")
        case Interrupted():
            line = _ended("Interrupted", "The process that drew ended before it was done.", "bad")
        case Stopped():
            line = _ended("Stopped", f"{len(shown.sheet.shots)} of {_count(shown.request)} pictures were drawn.", "")
        case _:
            pass
    words = _words(shown, notes) if shown.shot else notes
    state = f'data-job="{esc(shown.job.id)}" data-state="{shown.job.state}"'
    return f'<section class="under-board" {state} aria-live="polite">{words}{line}</section>'


def _ended(title: str, text: str, mood: str) -> str:
    return f'<p class="ended {mood}"><b>{esc(title)}.</b> {esc(text)}</p>'


def _words(shown: Shown, notes: str) -> str:
    shot = shown.shot
    assert shot is not None and shown.index is not None  # asked by the caller
    request = shown.request
    parts = [f"seed {shot.seed}", f"{request.steps} steps", f"guidance {request.guidance:g}", duration(shot.seconds)]
    parts += [f"{shot.passes:,} passes"] if shot.passes else []
    url = file_url(shot.picture)
    live = button("Back to the run", "live", "primary") if shown.running else ""
    tools = (
        live
        + button("Use layout", "layout", job=shown.job.id, index=shown.index)
        + f'<a class="btn" href="{url}" target="_blank" rel="noopener">Open</a>'
        + f'<a class="btn" href="{url}" download="{esc(Path(shot.picture).name)}">Download</a>'
    )
    return (
        f'<div class="caption"><div class="words"><b title="{esc(request.said)}">{esc(shot.title)}: '
        f'{esc(request.said or "no prompt")}</b><span class="num">{esc(" · ".join(parts))}</span>{notes}</div>'
        f'<div class="tools">{tools}</div></div>'
    )


def _spoken(desk: Desk, label: str) -> str:
    """ "region, seed 3" with the method's title."""
    name, comma, rest = label.partition(",")
    method = desk.studio.methods().get(name.strip())
    return f"{method.title}{comma}{rest}" if method else label


def _count(request: ComposeRequest) -> int:
    return len(request.methods) * len(request.seeds)


def plan_of(desk: Desk, shown: Shown) -> Plan:
    """The columns and rows of a composition's sheet, with what is not drawn yet."""
    known = desk.studio.methods()
    titles = {shot.method: shot.title for shot in shown.sheet.shots}
    names = [use.method for use in shown.request.methods]
    methods = [(name, titles.get(name) or (known[name].title if name in known else name)) for name in names]
    shot = shown.shot
    return Plan(methods, shown.request.seeds, (shot.method, shot.seed) if shot else None)


def sheet_html(desk: Desk, shown: Shown | None) -> str:
    """The sheet of what is shown, with its exports; "" while there is nothing."""
    if shown is None or not (shown.sheet.shots or shown.running):
        return ""
    job = shown.job.id
    tools = button("Export HTML", "export-html", job=job) + button("Export JSON", "export-json", job=job)
    table = sheet_table(
        shown.sheet,
        plan_of(desk, shown),
        lambda index, shot: (
            f'<button type="button" class="pick" data-act="select" data-job="{esc(job)}" data-index="{index}"'
            f' aria-label="Show {esc(shot.title)}, seed {shot.seed} on the canvas">'
            f'<img src="{file_url(shot.picture)}" alt="{esc(shot.title)}, seed {shot.seed}" loading="lazy"></button>'
        ),
    )
    count = f"{len(shown.sheet.shots)} of {_count(shown.request)} pictures"
    return (
        f'<section class="sheet" data-job="{esc(job)}" data-pictures="{len(shown.sheet.shots)}">'
        f'<header class="sheet-head"><h3>Sheet</h3><span class="num">{count}</span>{key(shown.sheet.concepts)}'
        f'<div class="tools">{tools if shown.sheet.shots else ""}</div></header>{table}</section>'
    )


def key(concepts: Iterator[str] | list[str] | tuple[str, ...] | Any) -> str:  # noqa: ANN401 - any sequence of names
    """The concepts' names in their colours."""
    items = "".join(f'<li class="c{index}"><i></i>{esc(name)}</li>' for index, name in enumerate(concepts))
    return f'<ul class="concept-key" aria-label="Concepts">{items}</ul>'


def behind_html(shown: Shown | None) -> str:
    """The panels of the picture on the canvas."""
    return panels_html(shown.sheet, shown.index) if shown and shown.index is not None else ""


def history_html(desk: Desk, shown: Shown | None) -> str:
    """Earlier compositions, newest first; each brings its picture and its layout back."""
    tiles: list[str] = []
    for job in desk.studio.jobs(limit=HISTORY, kind="compose"):
        found = pictures_of(desk.look(job))
        if not found or not isinstance(job.request, ComposeRequest):
            continue
        said = job.request.said or "Composition"
        chosen = " chosen" if shown and shown.job.id == job.id else ""
        many = f'<span class="many">{len(found)}</span>' if len(found) > 1 else ""
        tiles.append(
            f'<button type="button" class="tile{chosen}" data-act="recall" data-job="{esc(job.id)}"'
            f' title="{esc(said)}"><img src="{file_url(found[-1].path)}" alt="{esc(said)}" loading="lazy">{many}'
            "</button>"
        )
    if not tiles:
        return ""
    return f'<div class="gallery-head"><h4>Earlier compositions</h4></div><div class="tiles">{"".join(tiles)}</div>'
