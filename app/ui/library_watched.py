"""Folders of other studios on the page: listed in place and followed, with what cannot be used and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ...pipelines.errors import InputError
from .desk import CALM, Desk, Seen, shown
from .pieces import button, esc

REFUSED = 20  # files that are named


@dataclass(frozen=True)
class FolderPanel:
    """The parts of the panel."""

    path: gr.Textbox
    add: gr.Button
    listed: gr.HTML


def build(desk: Desk) -> FolderPanel:
    """Lay the panel out, folded."""
    with gr.Accordion("Folders: list the files of another studio in place", open=False, elem_id="library-folders"):
        with gr.Row(equal_height=True):
            path = gr.Textbox(
                show_label=False, placeholder="/home/me/ComfyUI/models/loras", elem_id="folder-path", scale=4
            )
            add = gr.Button("List this folder", elem_id="folder-add", scale=1, min_width=140)
        listed = gr.HTML(
            elem_id="folder-list", apply_default_css=False, js_on_load="intarsia.actions(element, trigger); /* 'act' */"
        )
    return FolderPanel(path, add, listed)


def connect(desk: Desk, panel: FolderPanel) -> None:
    """Add and remove folders; the studio's own watch finds their files a moment later."""

    @shown
    def add(text: str | None) -> tuple[str, str]:
        path = Path((text or "").strip()).expanduser()
        if not path.is_absolute():
            raise InputError("The folder is not given whole.", "Write its path from the root on.")
        desk.studio.shelf.add_folder(path)
        return "", listed_html(desk)

    @shown
    def act(event: gr.EventData) -> str:
        if event.act == "unwatch":
            desk.studio.shelf.remove_folder(Path(str(event.folder)))
        return listed_html(desk)

    gr.on([panel.add.click, panel.path.submit], add, panel.path, [panel.path, panel.listed], **CALM)
    panel.listed.act(act, None, panel.listed, **CALM)


def refresh(desk: Desk, seen: Seen) -> Any:  # noqa: ANN401 - a value, or "leave as it is"
    """The list of folders, left alone if unchanged."""
    return seen.fresh("folder-list", listed_html(desk))


def listed_html(desk: Desk) -> str:
    """Every folder with how many files it has, and those that cannot be used with the reason."""
    folders = desk.studio.shelf.folders()
    if not folders:
        return '<p class="soft">No folder yet. Files stay where they are; their notes and pictures are read.</p>'
    rows = "".join(
        f'<li><b>{esc(folder.path)}</b> <span class="num">{folder.entries:,} listed, {folder.refused:,} not usable'
        f"{', not reachable now' if folder.missing else ''}</span> "
        f"{button('Leave out', 'unwatch', folder=str(folder.path))}</li>"
        for folder in folders
    )
    refused = desk.studio.shelf.refused()
    more = f"<li>and {len(refused) - REFUSED:,} more</li>" if len(refused) > REFUSED else ""
    why = "".join(
        f"<li><b>{esc(one.path.name)}</b>: {esc(one.message)} {esc(one.hint)}</li>" for one in refused[:REFUSED]
    )
    told = f"<details><summary>{len(refused):,} files not usable</summary><ul>{why}{more}</ul></details>"
    return f'<ul class="folders">{rows}</ul>{told if refused else ""}'
