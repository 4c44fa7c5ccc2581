"""The Compose tab: boxes on a canvas, each with an adapter; methods to compose them, side by side on a sheet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import gradio as gr
from gradio.blocks import Block
from gradio.components import Component

from ...composition.layout import ComposeRequest, write_layout
from ...pipelines.errors import InputError, IntarsiaError
from ..studio import Query
from . import compose_value, rack
from .compose_export import export_html, export_json
from .compose_form import ComposeTab, fill, open_layout, request_of
from .compose_view import behind_html, caption, history_html, sheet_html, shown_now, under_html
from .desk import CALM, Desk, Seen, shown
from .forms import Form, FormBuilder, simple_form
from .pieces import esc, file_url
from .tab_generate import model_chooser

if TYPE_CHECKING:
    from ..library_entry import Entry

ACT = "intarsia.actions(element, trigger); /* 'act' */"
OFFERED = 24  # rows of the tab's own list of the library
FIRST_METHOD = "region"
COMPARED = ("merge", "region")  # methods ticked at first
FAMILY_SIDE = 512  # pixels; shape of the canvas while the model is not known


def build(desk: Desk, seen: gr.State) -> ComposeTab:
    """Lay the tab out and connect what happens inside it."""
    form = FormBuilder(ComposeRequest, "compose-")
    with gr.Row(elem_classes="compose"):
        with gr.Column(elem_classes="ask"):
            form.put("prompt", _text(form, "prompt", "the whole picture; empty: the boxes' prompts, joined", 2))
            form.put("negative", _text(form, "negative", "what to keep out, may be empty", 1))
            with gr.Row(elem_classes="go"):
                go = gr.Button("Draw", variant="primary", elem_id="compose-go", scale=3)
                stop = gr.Button("Stop", elem_id="compose-stop", interactive=False, scale=1, min_width=80)
            message = gr.HTML("", elem_id="compose-message", elem_classes="message")
        with gr.Column(elem_classes="show"):
            board = gr.HTML(
                value=compose_value.empty_board(),
                html_template='<div class="board"></div>',
                js_on_load="intarsia.board(element, props, trigger, watch, upload); /* 'save' 'open' */",
                apply_default_css=False,
                elem_id="compose-board",
            )
            words = gr.HTML(elem_id="compose-caption", apply_default_css=False, js_on_load=ACT)
        with gr.Column(elem_classes="cast"):
            gr.HTML("", html_template="<span></span>", elem_id="compose-cast", apply_default_css=False,
                    js_on_load="intarsia.cast(element);")  # fmt: skip
            offers = rack.offers("cast")
        with gr.Column(elem_classes="settings"):
            method, forms, methods = _method(desk)
            gr.HTML("<h4>Settings</h4>", apply_default_css=False)
            seeds, random = _settings(desk, form)
            gr.HTML("<h4>Styles, over the whole picture</h4>", apply_default_css=False)
            styles = rack.component("compose-styles")
    with gr.Column(elem_classes="compare"):
        compared, compare = _compare(desk, form)
        with gr.Row(elem_classes="result"):
            sheet = gr.HTML(elem_id="compose-sheet", apply_default_css=False, js_on_load=ACT)
            behind = gr.HTML(elem_id="compose-behind", apply_default_css=False)
        history = gr.HTML(elem_id="compose-history", apply_default_css=False, js_on_load=ACT)
    tab = ComposeTab(
        form.build(), board, styles, seeds, method, methods, compared, message, *_hidden(desk), words, sheet, behind,
        history, offers, _file(), stop,
    )  # fmt: skip
    _connect(desk, tab, seen, go, compare)
    _connect_settings(desk, tab, seen, random, forms)
    return tab


def _text(form: FormBuilder, name: str, hint: str, lines: int) -> gr.Textbox:
    info = form.info(name)
    return gr.Textbox(label=info.label, placeholder=hint, lines=lines, max_lines=8, elem_id=f"compose-{name}")


def _method(desk: Desk) -> tuple[gr.Dropdown, list[gr.Column], dict[str, Form]]:
    """The method, and the form of each; only the chosen one's is in view."""
    known = desk.studio.methods()
    first = FIRST_METHOD if FIRST_METHOD in known else next(iter(known))
    choices = [(method.title, name) for name, method in known.items()]
    chosen = gr.Dropdown(choices, value=first, label="Method", filterable=False, elem_id="compose-method")
    groups: list[gr.Column] = []
    forms: dict[str, Form] = {}
    for name, method in known.items():
        with gr.Column(visible=name == first, elem_classes="method") as group:
            paper = f' <span class="paper">{esc(method.paper)}</span>' if method.paper else ""
            gr.HTML(f'<p class="soft">{esc(method.help)}{paper}</p>', apply_default_css=False)
            forms[name] = simple_form(method.options, f"compose-{name}-")
        groups.append(group)
    return chosen, groups, forms


def _settings(desk: Desk, form: FormBuilder) -> tuple[gr.Textbox, gr.Button]:
    info = form.info("model")
    form.put("model", model_chooser(desk, info.label, info.help, "compose-model"))
    with gr.Row(elem_classes="tight"):
        seeds = gr.Textbox(
            "0", label="Seeds", info="One picture each, such as 1, 2, 5-8.", max_lines=1, elem_id="compose-seeds"
        )
        random = gr.Button("Random", size="sm", elem_id="compose-random", elem_classes="mini", min_width=64)
    form.place("steps", "guidance")
    with gr.Row(elem_classes="tight"):
        form.place("width", "height")
    form.place("scheduler")
    with gr.Accordion("More settings", open=False, elem_classes="quiet"):
        form.place("together")
    return seeds, random


def _compare(desk: Desk, form: FormBuilder) -> tuple[gr.CheckboxGroup, gr.Button]:
    known = desk.studio.methods()
    gr.HTML(
        "<h3>Compare</h3><p>Every ticked method draws every seed, each with its own settings.</p>",
        apply_default_css=False,
        elem_classes="compare-head",
    )
    with gr.Row(elem_classes="compare-bar"):
        compared = gr.CheckboxGroup(
            [(method.title, name) for name, method in known.items()],
            value=[name for name in COMPARED if name in known],
            show_label=False,
            label="Methods",
            elem_id="compose-compared",
            scale=5,
        )
        form.place("score")
        button = gr.Button("Compare", elem_id="compose-compare", scale=0, min_width=130)
    return compared, button


def _hidden(desk: Desk) -> tuple[gr.HTML, gr.HTML]:
    """What the board is told from here: its shape, and the picture beneath it."""
    frame = gr.HTML(
        value=_shape(desk, "mini", "", ""),
        html_template="<span></span>",
        elem_classes="shelf-of",
        apply_default_css=False,
        js_on_load="intarsia.told('frame', props, watch);",
    )
    under = gr.HTML(
        value={"src": "", "live": False},
        html_template="<span></span>",
        elem_classes="shelf-of",
        apply_default_css=False,
        js_on_load="intarsia.told('under', props, watch);",
    )
    return frame, under


def _file() -> gr.HTML:
    """What a person saves: the browser downloads whatever this is set to."""
    return gr.HTML(
        value={},
        html_template="<span></span>",
        elem_classes="shelf-of",
        apply_default_css=False,
        js_on_load="intarsia.download(props, watch);",
    )


def _connect(desk: Desk, tab: ComposeTab, seen: gr.State, go: gr.Button, compare: gr.Button) -> None:
    inputs: set[Block] = {*tab.asked, seen}

    def start(values: Mapping[Component, Any], names: list[str]) -> list[Any]:
        given: Seen = values[seen]
        job = desk.studio.submit(request_of(desk, tab, values, names))
        given.composition = None
        given.unfinished.add(job.id)
        return refresh(desk, given)

    @shown
    def draw(values: Mapping[Component, Any]) -> list[Any]:
        return start(values, [str(values[tab.method])])

    @shown
    def compared(values: Mapping[Component, Any]) -> list[Any]:
        names = [name for name in tab.methods if name in values[tab.compared]]  # in the order of the list
        if not names:
            raise InputError("No method is ticked.", "Tick the methods to compare.")
        return start(values, names)

    @shown
    def stop(given: Seen) -> list[Any]:
        given.composition = None
        for job in desk.active("compose")[:1]:
            desk.studio.cancel(job.id)
            desk.await_end(job.id)
        return refresh(desk, given)

    @shown
    def save(values: Mapping[Component, Any]) -> dict[str, Any]:
        request = request_of(desk, tab, values, [str(values[tab.method])])
        return {"name": "layout.yaml", "text": write_layout(request)}

    @shown
    def act(given: Seen, event: gr.EventData) -> list[Any]:
        file, filled = _act(desk, tab, given, event)
        return [file, *filled, *refresh(desk, given)]

    go.click(draw, inputs, tab.live, **CALM)
    compare.click(compared, inputs, tab.live, **CALM)
    tab.stop.click(stop, seen, tab.live, **CALM)
    tab.board.save(save, inputs, tab.file, **CALM)
    for place in (tab.caption, tab.sheet, tab.history):
        place.act(act, seen, [tab.file, *tab.filled, *tab.live], **CALM)


def _act(desk: Desk, tab: ComposeTab, seen: Seen, event: gr.EventData) -> tuple[Any, list[Any]]:
    """Answer a click beneath the canvas: a file to download, and new values for `tab.filled`."""
    filled: list[Any] = [gr.skip() for _ in tab.filled]
    match event.act:
        case "select":
            seen.composition = (str(event.job), int(event.index))
        case "live":
            seen.composition = None
        case "recall" | "layout":
            job = desk.studio.job(str(event.job))
            if event.act == "recall":
                seen.composition = (job.id, None)
            if isinstance(job.request, ComposeRequest):
                filled = fill(desk, tab, job.request, [])
        case "export-html" | "export-json":
            seen_now = shown_now(desk, Seen(composition=(str(event.job), None)))
            if seen_now:
                path = export_html(desk, seen_now) if event.act == "export-html" else export_json(seen_now)
                return _download(path), filled
        case _:
            pass
    return gr.skip(), filled


def _download(path: Path) -> dict[str, Any]:
    return {"name": path.name, "url": file_url(path, path.stat().st_mtime_ns)}


def _connect_settings(desk: Desk, tab: ComposeTab, seen: gr.State, random: gr.Button, groups: list[gr.Column]) -> None:
    names = list(tab.methods)

    def choose_form(chosen: str) -> list[dict[str, Any]]:
        return [gr.update(visible=name == chosen) for name in names]

    @shown
    def opened(event: gr.EventData) -> list[Any]:
        return open_layout(desk, tab, [(str(file["name"]), str(file["path"])) for file in event.files])

    @shown
    def find(given: Seen, event: gr.EventData) -> rack.Value:
        given.cast_wanted = str(event.text)[: rack.MAX_TEXT]
        return cast_offers(desk, given)

    def shape(model: str, width: str, height: str) -> dict[str, int]:
        return _shape(desk, model, width, height)

    controls = tab.form.controls
    size = [cast(gr.Textbox, controls[name]) for name in ("model", "width", "height")]
    gr.on([part.change for part in size], shape, size, tab.frame, trigger_mode="always_last", **CALM)
    tab.method.change(choose_form, tab.method, groups, **CALM)
    tab.board.open(opened, None, tab.filled, **CALM)
    tab.offers.find(find, seen, tab.offers, trigger_mode="always_last", **CALM)
    random.click(lambda: str(compose_value.a_seed()), None, tab.seeds, **CALM)
    rack.connect_rows(desk, tab.styles)


def _shape(desk: Desk, model: str, width: str, height: str) -> dict[str, int]:
    """The picture's size in pixels; the model's own, or square, where nothing else can be known."""
    try:
        known = desk.studio.model(model)
        own = known.width, known.height
    except IntarsiaError:
        own = FAMILY_SIDE, FAMILY_SIDE  # a half-typed name: submitting it says what is wrong
    given = [int(text) if str(text or "").strip().isdigit() else 0 for text in (width, height)]
    return {"width": given[0] or own[0], "height": given[1] or own[1]}


def cast_offers(desk: Desk, seen: Seen) -> rack.Value:
    """The tab's own list of the library: what fits what a person looks for, with small pictures."""
    entries = desk.studio.shelf.page(Query(text=seen.cast_wanted, limit=OFFERED)).entries
    return {"text": seen.cast_wanted, "rows": [{**rack.row(entry), "face": _face(desk, entry)} for entry in entries]}


def _face(desk: Desk, entry: Entry) -> str:
    picture = entry.thumbnail
    return file_url(picture) if picture is not None and picture.parent == desk.studio.home.thumbnails else ""


def refresh(desk: Desk, seen: Seen) -> list[Any]:
    """Values for `tab.live`, unchanged ones left alone."""
    now = shown_now(desk, seen)
    return [
        seen.fresh("compose-under", under_html(desk, now)),
        seen.fresh("compose-caption", caption(desk, now)),
        seen.fresh("compose-sheet", sheet_html(desk, now)),
        seen.fresh("compose-behind", behind_html(now)),
        seen.fresh("compose-history", history_html(desk, now)),
        seen.fresh("compose-stop", gr.update(interactive=bool(desk.active("compose")))),
    ]
