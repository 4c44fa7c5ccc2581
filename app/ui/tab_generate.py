"""The Generate tab: a prompt, its settings, the adapters in use, and a large picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.blocks import Block
from gradio.components import Component

from ...pipelines.errors import InputError
from ...pipelines.requests import GenerateRequest
from . import rack
from .desk import CALM, Desk, Seen, shown
from .forms import Form, FormBuilder
from .pieces import esc
from .stage import gallery, gallery_pictures, stage

PROMPT_HINT = "a red apple, twemoji style"


@dataclass(frozen=True)
class GenerateTab:
    """The parts of the tab that others read or fill."""

    form: Form
    rack: gr.HTML
    offers: gr.HTML
    stage: gr.HTML
    gallery: gr.HTML
    message: gr.HTML
    stop: gr.Button

    @property
    def live(self) -> list[Component]:
        """What the page's clock keeps up to date."""
        return [self.stage, self.gallery, self.stop]

    @property
    def filled(self) -> list[Component]:
        """What restoring settings fills."""
        return [*self.form.components, self.rack, self.message]


def build(desk: Desk, seen: gr.State) -> GenerateTab:
    """Lay the tab out and connect what happens inside it."""
    form = FormBuilder(GenerateRequest, "generate-")
    with gr.Row(elem_classes="bench"):
        with gr.Column(elem_classes="ask"):
            form.put("prompt", _text(form, "prompt", PROMPT_HINT, 3))
            form.put("negative", _text(form, "negative", "what to keep out, may be empty", 1))
            with gr.Row(elem_classes="go"):
                go = gr.Button("Generate", variant="primary", elem_id="generate", scale=3)
                stop = gr.Button("Stop", elem_id="stop", interactive=False, scale=1, min_width=80)
            message = gr.HTML("", elem_id="message", elem_classes="message")
        with gr.Column(elem_classes="show"):
            picture = gr.HTML(
                elem_id="stage", apply_default_css=False, js_on_load="intarsia.actions(element, trigger); /* 'act' */"
            )
            results = gr.HTML(
                elem_id="gallery", apply_default_css=False, js_on_load="intarsia.actions(element, trigger); /* 'act' */"
            )
        with gr.Column(elem_classes="settings"):
            gr.HTML("<h4>Adapters</h4>", apply_default_css=False)
            uses, offers = rack.component(), rack.offers()
            gr.HTML("<h4>Settings</h4>", apply_default_css=False)
            random, reuse = _settings(desk, form)
    tab = GenerateTab(form.build(), uses, offers, picture, results, message, stop)
    _connect(desk, tab, seen, go)
    seed = tab.form.controls["seed"]

    @shown
    def drawn() -> int:
        return -1

    @shown
    def used(given: Seen) -> int:
        return last_seed(desk, given)

    random.click(drawn, None, seed, **CALM)
    reuse.click(used, seen, seed, **CALM)
    return tab


def _text(form: FormBuilder, name: str, hint: str, lines: int) -> gr.Textbox:
    info = form.info(name)
    return gr.Textbox(
        label=info.label, placeholder=hint, lines=lines, max_lines=10, elem_id=f"generate-{name}", submit_btn=False
    )


def _settings(desk: Desk, form: FormBuilder) -> tuple[gr.Button, gr.Button]:
    info = form.info("model")
    form.put("model", model_chooser(desk, info.label, info.help, "generate-model"))
    with gr.Row(elem_classes="tight"):
        form.place("seed")
        random = gr.Button("Random", size="sm", elem_id="seed-random", elem_classes="mini", min_width=64)
        reuse = gr.Button("Reuse", size="sm", elem_id="seed-reuse", elem_classes="mini", min_width=64)
    form.place("steps", "guidance")
    with gr.Row(elem_classes="tight"):
        form.place("width", "height")
    form.place("count", "scheduler")
    form.place("merge")
    return random, reuse


def model_chooser(desk: Desk, label: str, help_text: str, elem_id: str) -> gr.Dropdown:
    """A list of the models at hand that also takes a folder, a file or a hub id."""
    names = [model.name for model in desk.studio.models()]
    return gr.Dropdown(
        choices=names,
        value=names[0] if names else "mini",
        allow_custom_value=True,
        label=label,
        info=help_text,
        elem_id=elem_id,
    )


def _connect(desk: Desk, tab: GenerateTab, seen: gr.State, go: gr.Button) -> None:
    @shown
    def submit(values: Mapping[Component, Any]) -> list[Any]:
        given: Seen = values[seen]
        fields = {**tab.form.read(values), "adapters": rack.requested(values[tab.rack])}
        job = desk.studio.submit(GenerateRequest.parse(fields))
        given.picture = None
        given.unfinished.add(job.id)
        return refresh(desk, given)

    @shown
    def stop(given: Seen) -> list[Any]:
        given.picture = None
        for job in desk.active("generate")[:1]:
            desk.studio.cancel(job.id)
            desk.await_end(job.id)
        return refresh(desk, given)

    @shown
    def act(given: Seen, event: gr.EventData) -> list[Any]:
        return [*_act(desk, tab, given, event), *refresh(desk, given)]

    @shown
    def word(prompt: str, event: gr.EventData) -> str:
        words = str(event.word)
        return prompt if words in prompt else f"{prompt}, {words}".lstrip(", ")

    inputs: set[Block] = {*tab.form.components, tab.rack, seen}
    go.click(submit, inputs, tab.live, **CALM)
    tab.stop.click(stop, seen, tab.live, **CALM)
    for place in (tab.stage, tab.gallery):
        place.act(act, seen, [*tab.filled, *tab.live], **CALM)
    rack.connect(desk, tab.rack, tab.offers, seen)
    tab.rack.word(word, tab.form.controls["prompt"], tab.form.controls["prompt"], **CALM)


def _act(desk: Desk, tab: GenerateTab, seen: Seen, event: gr.EventData) -> list[Any]:
    """Answer a click in the stage or the gallery with new values for `tab.filled`."""
    skipped = [gr.skip() for _ in tab.filled]
    match event.act:
        case "select":
            seen.picture = (str(event.job), int(event.index))
        case "live":
            seen.picture = None
        case "restore":
            return restore(desk, tab, picture_path(desk, str(event.job), int(event.index)))
        case "again":
            request = desk.studio.job(str(event.job)).request
            if isinstance(request, GenerateRequest):
                return fill(desk, tab, request, ())
        case "seed":
            path = picture_path(desk, str(event.job), int(event.index))
            values: dict[str, Any] = dict(zip(tab.form.controls, skipped, strict=False))
            values["seed"] = desk.studio.restore(path).request.seed
            return [*values.values(), gr.skip(), gr.skip()]
        case _:
            pass
    return skipped


def picture_path(desk: Desk, job_id: str, number: int) -> Path:
    """Find a result's file.

    Raises:
        InputError: It was removed since.
    """
    for job, found, artifact in gallery_pictures(desk):
        if (job.id, found) == (job_id, number):
            return Path(artifact.path)
    raise InputError("That picture is no longer there.", "Its file was moved or removed.")


def restore(desk: Desk, tab: GenerateTab, path: Path) -> list[Any]:
    """Read a picture's settings into the form; gives values for `tab.filled`."""
    found = desk.studio.restore(path)
    return fill(desk, tab, found.request, found.notes)


def fill(desk: Desk, tab: GenerateTab, request: GenerateRequest, notes: tuple[str, ...]) -> list[Any]:
    """Show a request in the form, and say what of it could not be restored."""
    uses, missing = rack.restored(desk, request.adapters)
    lines = [*notes, *(f"The adapter {name} is not in the library." for name in missing)]
    said = "".join(f"<li>{esc(line)}</li>" for line in lines)
    title = "Settings restored" + (", except:" if lines else ".")
    html = f'<div class="told"><b>{title}</b>{f"<ul>{said}</ul>" if said else ""}</div>'
    return [*tab.form.show(request), uses, html]


def last_seed(desk: Desk, seen: Seen) -> int:
    """Seed of the picture one looks at.

    Raises:
        InputError: There is no picture yet.
    """
    for job, number, artifact in gallery_pictures(desk):
        if seen.picture in (None, (job.id, number)):
            return desk.studio.restore(Path(artifact.path)).request.seed
    raise InputError("There is no picture yet whose seed could be used again.", "Generate one first.")


def refresh(desk: Desk, seen: Seen) -> list[Any]:
    """Values for `tab.live`, unchanged ones left alone."""
    busy = bool(desk.active("generate"))
    stopping = gr.update(interactive=busy)
    return [
        seen.fresh("stage", stage(desk, seen)),
        seen.fresh("gallery", gallery(desk, seen)),
        seen.fresh("stop", stopping),
    ]
