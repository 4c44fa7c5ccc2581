"""The page: five tabs, one clock that reads the job store, and what happens across tabs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ...pipelines.errors import InputError
from ...pipelines.events import Failed, Interrupted
from ..studio import JobKind, Studio
from . import compose_form, compose_value, rack, tab_compose, tab_generate, tab_library, tab_runs, tab_train
from .desk import CALM, Desk, Seen, shown, toast, uploaded
from .pieces import MOTIF, esc
from .watch import Watcher

BUSY, IDLE = 0.4, 1.0  # seconds between two looks at the job store
KINDS: tuple[JobKind, ...] = ("generate", "train", "tool", "effect", "compose")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def build(studio: Studio) -> gr.Blocks:
    """Make the whole page for a studio."""
    desk = Desk(studio, Watcher(studio))
    with gr.Blocks(title="Intarsia", fill_width=True, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        seen = gr.State(Seen())
        trouble = gr.State("")
        status = gr.HTML(masthead(desk), elem_id="masthead", apply_default_css=False)
        drop = gr.HTML(
            "",
            elem_id="drop",
            html_template="",
            apply_default_css=False,
            js_on_load="intarsia.dropzone(element, trigger, upload); /* 'drop' */",
        )
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Generate", id="generate"):
                generate = tab_generate.build(desk, seen)
            with gr.Tab("Compose", id="compose"):
                compose = tab_compose.build(desk, seen)
            with gr.Tab("Library", id="library"):
                library = tab_library.build(desk)
            with gr.Tab("Train", id="train"):
                train = tab_train.build(desk, seen)
            with gr.Tab("Runs", id="runs-tab"):
                runs = tab_runs.build(desk, seen)
        tabs = Tabs(generate, compose, library, train, runs)
        tab_library.connect(desk, library, seen, **CALM)
        _connect_use(desk, tabs)
        _connect_drop(desk, tabs, drop, seen)
        _connect_clock(page, desk, tabs, Shared(seen, trouble, status))
    return page


@dataclass(frozen=True)
class Tabs:
    """The five tabs."""

    generate: tab_generate.GenerateTab
    compose: compose_form.ComposeTab
    library: tab_library.LibraryTab
    train: tab_train.TrainTab
    runs: tab_runs.RunsTab


@dataclass(frozen=True)
class Shared:
    """Parts of the page that belong to no tab."""

    seen: gr.State
    trouble: gr.State
    status: gr.HTML


def masthead(desk: Desk) -> str:
    """The name, and in one glance what the studio is doing."""
    jobs = [job for kind in KINDS for job in desk.active(kind)]
    running = sum(job.state == "running" for job in jobs)
    words = f"{running} running" if running else "starting" if jobs else "ready"
    if len(jobs) > running and running:
        words += f", {len(jobs) - running} waiting"
    mood = "busy" if jobs else "idle"
    return (
        f'<header class="masthead"><div class="brand">{MOTIF}<span>Intarsia</span></div>'
        f'<div class="right"><span class="lamp {mood}"><i></i>{esc(words)}</span>'
        '<button type="button" class="icon" data-theme-switch aria-label="Light or dark" title="Light or dark">'
        '<svg viewBox="0 0 20 20" aria-hidden="true"><circle cx="10" cy="10" r="7"/><path d="M10 3a7 7 0 0 1 0 14Z"/>'
        "</svg></button></div></header>"
    )


def _connect_use(desk: Desk, tabs: Tabs) -> None:
    """ "Use in Generate", wherever it stands: the adapter, or both halves of a pair, go into the rack."""

    @shown
    def use(value: rack.Value, event: gr.EventData) -> Any:  # noqa: ANN401 - a value, or "leave as it is"
        if event.act != "use":
            return gr.skip()
        return rack.with_entries(value, rack.group_of(desk, str(event.name)))

    for place in (tabs.library.cards, tabs.train.live, tabs.runs.detail):
        place.act(use, tabs.generate.rack, tabs.generate.rack, **CALM)


def _connect_drop(desk: Desk, tabs: Tabs, drop: gr.HTML, seen: gr.State) -> None:
    """Files dropped anywhere: adapters go into the library, pictures bring settings back or become lessons."""
    generate, compose = tabs.generate, tabs.compose

    @shown
    def dropped(
        sheet: list[dict[str, str]], value: rack.Value, board: compose_value.Board, given: Seen, event: gr.EventData
    ) -> list[Any]:
        files = [_received(file) for file in event.files]
        composed: list[Any] = [gr.skip() for _ in compose.filled]
        if any(compose_value.is_layout(name) for name, _ in files):
            composed = compose_form.open_layout(desk, compose, files)
            files = []
        pictures, others = _sorted(files, training=event.tab == "Train")
        filled: list[Any] = [gr.skip() for _ in generate.filled]
        library: list[Any] = [gr.skip() for _ in tabs.library.live]
        if others:
            entries = tab_library.take_in(desk, others)
            library = tab_library.refresh(desk, tabs.library, given)
            use = entries if event.tab == "Generate" else []
            filled[generate.filled.index(generate.rack)] = rack.with_entries(value, use) if use else gr.skip()
            if event.spot and entries:
                changed = compose_value.with_entries(board, entries, dict(event.spot))
                composed[compose.filled.index(compose.board)] = changed
        if pictures and event.tab == "Train":
            sheet = tab_train.take_in(desk, pictures, sheet)
        elif pictures and event.tab == "Compose":
            composed = compose_form.restore(desk, compose, pictures[0][0], uploaded(pictures[0][1]))
        elif pictures:
            filled = tab_generate.restore(desk, generate, uploaded(pictures[0][1]))
        return [sheet, *library, *filled, *composed]

    drop.drop(
        dropped,
        [tabs.train.pictures, generate.rack, compose.board, seen],
        [tabs.train.pictures, *tabs.library.live, *generate.filled, *compose.filled],
        **CALM,
    )


def _received(file: dict[str, str]) -> tuple[str, str]:
    if not file.get("path"):
        raise InputError(f"{file.get('name', 'The file')} could not be taken in.", file.get("reason", ""))
    return file["name"], file["path"]


def _sorted(files: list[tuple[str, str]], training: bool) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Part what is meant as pictures from what is meant as an adapter (or refused as one, with the reason)."""
    kinds = tab_train.PICTURE_TYPES if training else PICTURES
    pictures = [file for file in files if file[0].lower().endswith(kinds)]
    return pictures, [file for file in files if file not in pictures]


def _connect_clock(page: gr.Blocks, desk: Desk, tabs: Tabs, shared: Shared) -> None:
    """Everything live comes from here: a reload, a second tab and a restart show the same, for all read the store."""
    places = [
        *tabs.generate.live,
        *tabs.compose.live,
        *tabs.train.watched,
        *tabs.runs.watched,
        *tabs.library.live,
        shared.status,
    ]

    def tick(seen: Seen) -> list[Any]:
        news = _trouble(desk, seen)
        due = time.monotonic() - seen.library_seen > tab_library.LOOK_EVERY
        offers = seen.fresh("offers", rack.offered(desk, seen)) if due else gr.skip()
        cast = seen.fresh("cast", tab_compose.cast_offers(desk, seen)) if due else gr.skip()
        return [
            *tab_generate.refresh(desk, seen),
            *tab_compose.refresh(desk, seen),
            *tab_train.refresh(desk, seen),
            *tab_runs.refresh(desk, seen),
            *tab_library.refresh(desk, tabs.library, seen, now=False),
            seen.fresh("status", masthead(desk)),
            offers,
            cast,
            news or gr.skip(),
            _pace(seen),
        ]

    def announce(news: str) -> None:
        if news:
            job = desk.studio.job(news.split(" ")[0])
            ended = desk.look(job).ended
            if isinstance(ended, Failed):
                raise toast(InputError(ended.message, ended.hint), "The run failed")
            if isinstance(ended, Interrupted):
                way = "Resume it from its last checkpoint." if job.resumable else "Start it again."
                raise toast(InputError("The process that did the work ended before it was done.", way), "Interrupted")

    timer = gr.Timer(BUSY)
    outputs = [*places, tabs.generate.offers, tabs.compose.offers, shared.trouble, timer]
    gr.on([timer.tick, page.load], tick, shared.seen, outputs, trigger_mode="once", **CALM)
    shared.trouble.change(announce, shared.trouble, None, **CALM)


def _pace(seen: Seen) -> Any:  # noqa: ANN401 - an update, or "leave as it is"
    """Look often while something runs, seldom while nothing does."""
    return seen.fresh("pace", gr.update(value=BUSY if seen.unfinished else IDLE))


def _trouble(desk: Desk, seen: Seen) -> str:
    """Find a job this tab saw at work that ended badly since; each is told once. "" if there is none."""
    active = {job.id for kind in KINDS for job in desk.active(kind)}
    over = sorted(seen.unfinished - active)
    seen.unfinished = active | set(over[1:])
    return f"{over[0]} ended" if over and desk.studio.job(over[0]).state in ("failed", "interrupted") else ""
