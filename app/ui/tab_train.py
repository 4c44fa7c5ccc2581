"""The Train tab: choose a recipe, give pictures, watch it learn, use what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.blocks import Block
from gradio.components import Component

from ...pipelines.errors import InputError
from ...pipelines.requests import TrainRequest
from . import training
from .desk import CALM, Desk, Seen, shown, uploaded
from .forms import Form, FormBuilder, simple_form
from .pieces import esc, thumbnail
from .tab_generate import model_chooser

PICTURE_TYPES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".zip")


@dataclass(frozen=True)
class TrainTab:
    """The parts of the tab that others read or fill."""

    base: Form
    recipe: gr.Radio
    forms: Mapping[str, Form]
    pictures: gr.HTML
    live: gr.HTML
    start: gr.Button
    stop: gr.Button

    @property
    def watched(self) -> list[Component]:
        """What the page's clock keeps up to date."""
        return [self.live, self.stop]


def build(desk: Desk, seen: gr.State) -> TrainTab:
    """Lay the tab out and connect what happens inside it."""
    recipes = desk.studio.recipes()
    names = sorted(recipes)  # blora first: one picture is the shortest way to a result
    builder = FormBuilder(TrainRequest, "train-")
    with gr.Row(elem_classes="bench"):
        with gr.Column(elem_classes="ask"):
            choices = [(recipes[name].title, name) for name in names]
            recipe = gr.Radio(choices, value=names[0], label="Recipe", elem_id="train-recipe", elem_classes="recipes")
            gr.HTML("<h4>Pictures</h4>", apply_default_css=False)
            pictures = gr.HTML(
                value=[],
                html_template='<div class="sheet"></div>',
                js_on_load="intarsia.sheet(element, props, trigger, watch); /* 'change' */",
                apply_default_css=False,
                elem_id="train-pictures",
            )
            choose = gr.UploadButton(
                "Choose pictures, or drop them anywhere",
                file_count="multiple",
                elem_id="train-choose",
                elem_classes="dropbox",
            )
            builder.put("name", gr.Textbox(label="Name in the library", placeholder="cat", elem_id="train-name"))
            with gr.Row(elem_classes="go"):
                start = gr.Button("Start training", variant="primary", elem_id="train-start", scale=3)
                stop = gr.Button("Stop", elem_id="train-stop", interactive=False, scale=1, min_width=80)
        with gr.Column(elem_classes="show"):
            live = gr.HTML(
                elem_id="train-live",
                apply_default_css=False,
                js_on_load="intarsia.actions(element, trigger); /* 'act' */",
            )
        with gr.Column(elem_classes="settings"):
            gr.HTML("<h4>Settings</h4>", apply_default_css=False)
            info = builder.info("model")
            builder.put("model", model_chooser(desk, info.label, info.help, "train-model"))
            groups, forms = _recipe_forms(recipes, names)
            builder.place("seed", "licence")
    tab = TrainTab(builder.build(), recipe, forms, pictures, live, start, stop)

    def choose_form(chosen: str) -> list[dict[str, Any]]:
        return [gr.update(visible=name == chosen) for name in names]

    recipe.change(choose_form, recipe, groups, **CALM)
    _connect(desk, tab, seen, choose)
    return tab


def _recipe_forms(recipes: Mapping[str, Any], names: list[str]) -> tuple[list[gr.Column], dict[str, Form]]:
    groups: list[gr.Column] = []
    forms: dict[str, Form] = {}
    for index, name in enumerate(names):
        with gr.Column(visible=index == 0) as group:
            forms[name] = simple_form(recipes[name].options, f"{name}-")
        groups.append(group)
    return groups, forms


def _connect(desk: Desk, tab: TrainTab, seen: gr.State, choose: gr.UploadButton) -> None:
    @shown
    def submit(values: Mapping[Component, Any]) -> list[Any]:
        given: Seen = values[seen]
        recipe = str(values[tab.recipe])
        fields = {
            **tab.base.read(values),
            "recipe": recipe,
            "options": tab.forms[recipe].read(values),
            "pictures": [_kept(desk, picture) for picture in values[tab.pictures]],
        }
        job = desk.studio.submit(TrainRequest.parse(fields))
        given.training = job.id
        given.unfinished.add(job.id)
        return refresh(desk, given)

    @shown
    def stop(given: Seen) -> list[Any]:
        job = training.current(desk, given)
        if job is not None and not job.finished_already:
            desk.studio.cancel(job.id)
            desk.await_end(job.id)
        return refresh(desk, given)

    @shown
    def act(given: Seen, event: gr.EventData) -> list[Any]:
        if event.act == "resume":
            job = desk.studio.resume(str(event.job))
            given.training = job.id
            given.unfinished.add(job.id)
        return refresh(desk, given)

    @shown
    def add(paths: list[str] | None, current: list[dict[str, str]]) -> list[dict[str, str]]:
        return take_in(desk, [(Path(path).name, path) for path in paths or []], current)

    forms = [component for form in tab.forms.values() for component in form.components]
    inputs: set[Block] = {*tab.base.components, tab.recipe, *forms, tab.pictures, seen}
    tab.start.click(submit, inputs, tab.watched, **CALM)
    tab.stop.click(stop, seen, tab.watched, **CALM)
    tab.live.act(act, seen, tab.watched, **CALM)
    choose.upload(add, [choose, tab.pictures], tab.pictures, **CALM)


def take_in(desk: Desk, files: list[tuple[str, str]], current: list[dict[str, str]]) -> list[dict[str, str]]:
    """Keep uploaded pictures in the studio and add them to the sheet, with captions that came along.

    Raises:
        IntarsiaError: A picture or zip cannot be used; none of the drop is added then.
    """
    added: list[dict[str, str]] = []
    for name, path in files:
        for picture in desk.studio.pictures(desk.studio.store_upload(uploaded(path))):
            where = Path(picture.path)
            kept = str(where.relative_to(desk.studio.home.uploads))
            shown_name = name if len(files) == 1 or not name.endswith(".zip") else where.name
            added.append(
                {"file": kept, "name": esc(shown_name), "caption": picture.caption, "thumb": thumbnail(picture.path)}
            )
    known = {picture["file"] for picture in current}
    return [*current, *(picture for picture in added if picture["file"] not in known)]


def _kept(desk: Desk, picture: Mapping[str, str]) -> dict[str, str]:
    """Find a picture of the sheet again under the studio's uploads, and nowhere else."""
    folder = desk.studio.home.uploads.resolve()
    path = (folder / picture["file"]).resolve()
    if not path.is_relative_to(folder):
        raise InputError("The page named a picture outside the uploads.", "Drop it again.")
    return {"path": str(path), "caption": picture["caption"]}


def refresh(desk: Desk, seen: Seen) -> list[Any]:
    """Values for `tab.watched`, unchanged ones left alone."""
    job = training.current(desk, seen)
    busy = job is not None and not job.finished_already
    return [
        seen.fresh("train", training.live(desk, job)),
        seen.fresh("train-stop", gr.update(interactive=busy)),
    ]
