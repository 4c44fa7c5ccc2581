"""The tools under the library's cards: choose adapters and a tool, see the error it introduces, then let it write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from ...pipelines.block_groups import block_groups
from ...pipelines.errors import InputError
from ...pipelines.events import Failed, Interrupted, Stopped
from ...pipelines.requests import AdapterUse, ToolRequest
from ..studio import Job, Studio
from . import plots
from .desk import CALM, Desk, Seen, shown
from .forms import Form, simple_form
from .pieces import button, esc
from .plots import Bar
from .stage import status_line

if TYPE_CHECKING:
    from ...pipelines.tool import Tool

LARGEST = 12  # layers listed
SHOWN = ("error", "distance")  # what is drawn by block, whichever a tool tells


@dataclass(frozen=True)
class ToolPanel:
    """The parts of the panel that others fill or connect."""

    chosen: gr.Textbox
    tool: gr.Dropdown
    forms: Mapping[str, Form]
    name: gr.Textbox
    out: gr.Textbox
    look: gr.Button
    make: gr.Button
    outcome: gr.HTML


def build(desk: Desk) -> ToolPanel:
    """Lay the panel out, folded; its forms come from the options of every tool that is found."""
    tools = Studio.tools()
    names = sorted(tools, key=lambda name: tools[name].merge)  # the merges last, each group in its own order
    with gr.Accordion("Tools: merge, resize, extract, slice, compare, bake", open=False, elem_id="library-tools"):
        with gr.Row():
            with gr.Column(scale=1):
                chosen = gr.Textbox(
                    label="Adapters",
                    lines=3,
                    max_lines=12,
                    placeholder="One per line, NAME or NAME:0.8; or Tools on a card",
                    elem_id="tool-adapters",
                )
                name = gr.Textbox(label="Name of the result", placeholder="both", elem_id="tool-name")
                out = gr.Textbox(
                    label="Write to", placeholder="empty: the library; a model needs a place", elem_id="tool-out"
                )
            with gr.Column(scale=1):
                choices = [(_title(tools[key].title, tools[key].merge), key) for key in names]
                tool = gr.Dropdown(choices, value=names[0], label="Tool", elem_id="tool-choice")
                groups: list[gr.Column] = []
                forms: dict[str, Form] = {}
                for key in names:
                    with gr.Column(visible=key == names[0]) as group:
                        gr.HTML(f'<p class="soft">{esc(tools[key].help)}</p>', apply_default_css=False)
                        forms[key] = simple_form(tools[key].options, f"tool-{key}-", last=_last(tools[key]))
                    groups.append(group)
                with gr.Row(elem_classes="go"):
                    look = gr.Button("Show the error first", elem_id="tool-look")
                    make = gr.Button("Make it", variant="primary", elem_id="tool-make")
        outcome = gr.HTML(
            elem_id="tool-outcome",
            apply_default_css=False,
            js_on_load="intarsia.actions(element, trigger); /* 'act' */",
        )

    def choose(key: str) -> list[dict[str, Any]]:
        return [gr.update(visible=key == name) for name in names]

    tool.change(choose, tool, groups, **CALM)
    return ToolPanel(chosen, tool, forms, name, out, look, make, outcome)


def _last(tool: Tool[Any]) -> tuple[str, ...]:
    """The options that stand behind a tool's own; a model that must be named is its own."""
    return ("dtype",) if tool.makes == "model" or not tool.most else ("model", "dtype")


def _title(title: str, merge: bool) -> str:
    return f"Merge: {title.removeprefix('Merge ')}" if merge else title


def connect(desk: Desk, panel: ToolPanel, seen: gr.State, cards: gr.HTML) -> None:
    """Let the cards fill the list of adapters, and the buttons queue the work."""

    @shown
    def pick(lines: str, event: gr.EventData) -> Any:  # noqa: ANN401 - a value, or "leave as it is"
        if event.act != "pick":
            return gr.skip()
        kept = [line for line in (lines or "").splitlines() if line.strip()]
        return "\n".join([*kept, str(event.name)])

    cards.act(pick, panel.chosen, panel.chosen, **CALM)
    fields = [panel.chosen, panel.tool, panel.name, panel.out, seen]
    controls = [control for form in panel.forms.values() for control in form.components]

    def asked(dry: bool) -> Any:  # noqa: ANN401 - a handler
        @shown
        def ask(values: dict[Any, Any]) -> Any:  # noqa: ANN401 - what the place shows
            given: Seen = values[seen]
            request = _request(desk, panel, values, dry)
            job = desk.studio.submit(request)
            given.tool = job.id
            given.unfinished.add(job.id)
            return outcome_html(desk, given)

        return ask

    for trigger, dry in ((panel.look, True), (panel.make, False)):
        trigger.click(asked(dry), {*fields, *controls}, panel.outcome, **CALM)

    @shown
    def stop(given: Seen, event: gr.EventData) -> str:
        if event.act == "stop":
            desk.studio.cancel(str(event.job))
            desk.await_end(str(event.job))
        return outcome_html(desk, given)

    panel.outcome.act(stop, seen, panel.outcome, **CALM)


def _request(desk: Desk, panel: ToolPanel, values: Mapping[Any, Any], dry: bool) -> ToolRequest:
    name = str(values[panel.tool])
    lines = [line.strip() for line in (values[panel.chosen] or "").splitlines() if line.strip()]
    out = (values[panel.out] or "").strip()
    if out and not Path(out).expanduser().is_absolute():
        raise InputError(f"{out} is no whole path.", "Write it from the root on, or leave it empty for the library.")
    return ToolRequest.parse(
        {
            "tool": name,
            "adapters": [AdapterUse.read(line) for line in lines],
            "options": panel.forms[name].read(values),
            "name": (values[panel.name] or "").strip(),
            "out": out,
            "dry": dry or Studio.tools()[name].makes == "nothing",
        }
    )


def outcome_html(desk: Desk, seen: Seen) -> str:
    """The work this tab asked for: how far it is, its figures, what it made."""
    if not seen.tool:
        return ""
    job = desk.studio.job(seen.tool)
    watch = desk.look(job)
    parts: list[str] = []
    if not job.finished_already:
        parts.append(status_line(job, watch) + button("Stop", "stop", job=job.id))
    found = next((Path(report.path) for report in watch.reports if Path(report.path).is_file()), None)
    if found is not None:
        parts.append(figures_html(json.loads(found.read_text("utf-8"))))
    parts.append(_end(job, watch.ended))
    parts += [f'<p class="matched">In the library: <b>{esc(made.label)}</b></p>' for made in watch.adapters]
    return f'<section class="outcome" data-state="{job.state}">{"".join(parts)}</section>'


def _end(job: Job, ended: object) -> str:
    match ended:
        case Failed(message=message, hint=hint):
            return f'<p class="warning">{esc(message)} {esc(hint)}</p>'
        case Stopped() | Interrupted():
            return '<p class="warning">It ended before it was done; nothing was written.</p>'
        case _:
            pass
    assert isinstance(job.request, ToolRequest)
    written = job.state == "done" and job.request.out and not job.request.dry
    return f'<p class="matched">Written to {esc(job.request.out)}</p>' if written else ""


def figures_html(report: Mapping[str, Any]) -> str:
    """What a tool told: sentences, a chart by block, and the layers with the largest figures."""
    columns: list[str] = report["columns"][1:]
    rows: list[list[Any]] = report["rows"]
    told = "".join(f"<p>{esc(text)}</p>" for text in report["told"])
    key = next((name for name in SHOWN if name in columns), None)
    if not rows or key is None:
        return told
    place = columns.index(key) + 1
    chart = plots.bars(f"{key.capitalize()} by block", "Frobenius norm", _by_block(rows, place))
    largest = sorted(rows, key=lambda row: -row[place])[:LARGEST]
    head = "".join(f"<th>{esc(name)}</th>" for name in ("layer", *columns))
    lines = "".join(
        f"<tr><td>{esc(row[0])}</td>{''.join(f'<td class=num>{number:.3g}</td>' for number in row[1:])}</tr>"
        for row in largest
    )
    more = f"The {LARGEST} largest of {len(rows)} layers" if len(rows) > LARGEST else f"All {len(rows)} layers"
    body = f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody>"
    return f'{told}<div class="beside">{chart}<table class="figures"><caption>{more}</caption>{body}</table></div>'


def _by_block(rows: list[list[Any]], place: int) -> list[Bar]:
    """Norms of one column by part of the model: squares add up."""
    groups = block_groups([str(row[0]) for row in rows], "")
    return [
        Bar(group.title, sum(row[place] ** 2 for row in rows if group.holds(str(row[0]))) ** 0.5) for group in groups
    ]
