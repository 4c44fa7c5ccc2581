"""The Compose tab without a browser: canvas to layout and back, masks, seeds, the sheet, its exports, escaping."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from gradio.components import Component
from intarsia.app.jobs import Job
from intarsia.app.processes import this_process
from intarsia.app.settings import Home
from intarsia.app.studio import Studio
from intarsia.app.ui import compose_form, compose_value, tab_compose
from intarsia.app.ui.compose_export import export_html, export_json, layout_map
from intarsia.app.ui.compose_panels import panels_html
from intarsia.app.ui.compose_sheet import Plan, Scores, Sheet, sheet_table, without_places
from intarsia.app.ui.compose_view import Shown, history_html, sheet_html, shown_now
from intarsia.app.ui.desk import Desk, Seen
from intarsia.app.ui.watch import Watcher
from intarsia.composition.layout import ComposeRequest, ConceptUse, parse_layout, write_layout
from intarsia.composition.method import methods
from intarsia.pipelines.errors import InputError
from intarsia.pipelines.events import Artifact, Done
from intarsia.pipelines.picture import write_png
from intarsia.pipelines.requests import GenerateRequest
from PIL import Image, ImageChops

EVIL = '<img src=x onerror="alert(1)">'


@pytest.fixture
def desk(home: Home) -> Desk:
    studio = Studio(home)
    studio.shelf.find("mini-fast")  # comes with the studio
    return Desk(studio, Watcher(studio))


def a_mask(width: int = 32, height: int = 24) -> str:
    picture = Image.new("L", (width, height))
    picture.paste(255, (4, 4, 20, 16))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def a_layout(**changes: object) -> ComposeRequest:
    values: dict[str, Any] = {
        "prompt": "a cat and a dog",
        "concepts": [
            {"adapter": "mini-fast", "name": "cat", "prompt": "a cat, noto", "weight": 0.7, "box": [0, 0.25, 0.5, 1],
             "blocks": {"unet.mid_block": 0.5}, "first": 0.1, "last": 0.9, "order": 3, "words": "the cat"},
            {"adapter": "mini-fast", "name": "dog", "prompt": "a dog"},
        ],
        "styles": [{"adapter": "mini-fast", "weight": 0.3}],
        "seeds": [3, 4],
        "methods": [{"method": "switch", "options": {"every": 2}}, {"method": "merge"}],
        "steps": 7, "guidance": 3.5, "width": 128, "height": 256, "score": True, "negative": "frame",
    }  # fmt: skip
    return ComposeRequest.parse(values | changes)


def read_back(desk: Desk, request: ComposeRequest) -> ComposeRequest:
    """Show a layout in the whole tab, and read the tab again."""
    with gr.Blocks():
        tab = tab_compose.build(desk, gr.State(Seen()))
    shown = compose_form.fill(desk, tab, request, [])
    values: Mapping[Component, Any] = dict(zip(tab.filled, shown, strict=True))
    return compose_form.request_of(desk, tab, values, [use.method for use in request.methods])


def test_what_the_tab_shows_of_a_layout_is_what_it_reads_back(desk: Desk) -> None:
    request = a_layout()
    again = read_back(desk, request)
    filled = [methods()[use.method].options.parse(use.options).model_dump(mode="json") for use in request.methods]
    assert [use.options for use in again.methods] == filled
    same = {"methods": request.methods}
    assert again.model_copy(update=same) == request


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_method_has_a_form_that_reads_its_defaults(desk: Desk, name: str) -> None:
    request = a_layout(methods=[{"method": name}])
    defaults = methods()[name].options()
    assert methods()[name].options.parse(read_back(desk, request).methods[0].options) == defaults


def test_a_painted_mask_is_kept_as_a_file_and_shown_again(desk: Desk) -> None:
    row = compose_value.concept_row(ConceptUse(adapter="mini-fast"), desk.studio.shelf.find("mini-fast"), a_mask())
    (fields,) = compose_value.concepts_of(desk, {"concepts": [row]})
    path = Path(fields["mask"])
    assert path.parent == desk.studio.home.uploads
    with Image.open(path) as kept:
        assert kept.mode == "L" and kept.size == (32, 24)
    board, notes = compose_value.board_of(desk, ComposeRequest.parse({"concepts": [fields]}))
    assert notes == []
    one, other = (compose_value.decoded(text) for text in (board["concepts"][0]["mask"], a_mask()))
    assert ImageChops.difference(one, other).getbbox() is None


@pytest.mark.parametrize(
    "text",
    [
        "data:image/svg+xml;base64,AAAA",
        "/etc/passwd",
        "data:image/png;base64,AAAA",
        "data:image/png;base64,A",
        a_mask(compose_value.MASK_SIDE + 1, compose_value.MASK_SIDE + 1),
        "data:image/png;base64," + "A" * (compose_value.MAX_MASK + 1),
    ],
    ids=["svg", "path", "no picture", "cut off", "too wide", "too long"],
)
def test_what_is_no_mask_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        compose_value.decoded(text)


def test_a_concept_without_adapter_is_named(desk: Desk) -> None:
    row = compose_value.concept_row(ConceptUse(adapter="", box=(0, 0, 1, 1)), None)
    with pytest.raises(InputError, match="Concept 1 has no adapter"):
        compose_value.concepts_of(desk, {"concepts": [row]})


def test_a_layout_whose_adapter_is_gone_says_so_and_keeps_the_rest(desk: Desk) -> None:
    request = a_layout(concepts=[{"adapter": "vanished", "prompt": "a ship", "box": [0, 0, 0.5, 0.5]}], styles=[])
    board, notes = compose_value.board_of(desk, request)
    assert notes == ["The adapter vanished of vanished is not in the library."]
    (row,) = board["concepts"]
    assert (row["adapter"], row["name"], row["prompt"], row["box"]) == ("", "vanished", "a ship", [0, 0, 0.5, 0.5])


@pytest.mark.parametrize(
    ("text", "seeds"), [("0", (0,)), ("1, 2,5-8", (1, 2, 5, 6, 7, 8)), (" 3 - 4 ,", (3, 4)), ("", ())]
)
def test_seeds_are_read_with_commas_and_ranges(text: str, seeds: tuple[int, ...]) -> None:
    assert compose_value.read_seeds(text) == seeds


@pytest.mark.parametrize("text", ["-1", "one", "8-5", "0-64", "1.5", "0-40, 50-90"])
def test_seeds_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        compose_value.read_seeds(text)


def test_dropped_adapters_go_where_they_fell(desk: Desk) -> None:
    entry = desk.studio.shelf.find("mini-fast")
    empty = compose_value.empty_board()
    one = compose_value.with_entries(empty, [entry], {"index": -1, "x": 0.9, "y": 0.1})
    (row,) = one["concepts"]
    left, top, right, bottom = row["box"]
    assert (right, top) == (1.0, 0.0) and right - left == bottom - top == compose_value.FIRST_BOX
    row["prompt"] = "mine"
    two = compose_value.with_entries(one, [entry, entry], {"index": 0, "x": 0.9, "y": 0.1})
    assert [row["name"] or row["adapter"] for row in two["concepts"]] == ["mini-fast", "mini-fast 2"]
    assert two["concepts"][0]["prompt"] == "mine"
    many = one
    for _ in range(12):
        many = compose_value.with_entries(many, [entry], {"index": -1})
    assert len(many["concepts"]) == 10
    ComposeRequest.parse({"concepts": compose_value.concepts_of(desk, many)})  # names differ, boxes lie inside


def test_an_opened_layout_brings_only_masks_that_came_along(desk: Desk, tmp_path: Path) -> None:
    secret, own = tmp_path / "secret.png", tmp_path / "sent" / "own.png"
    own.parent.mkdir()
    for path in (secret, own):
        Image.new("L", (8, 8), 255).save(path)
    painted = compose_value.keep_mask(desk, a_mask())
    names = {"a": str(secret), "b": "masks/own.png", "c": painted}
    concepts = [{"adapter": "mini-fast", "name": name, "mask": mask} for name, mask in names.items()]
    file = tmp_path / "layout.yaml"
    file.write_text(write_layout(a_layout(concepts=concepts)))
    request, notes = compose_value.opened(desk, [("layout.yaml", file), ("own.png", own)])
    assert [use.mask for use in request.concepts] == ["", str(own), painted]
    assert notes == ["The mask of a did not come along; drop secret.png together with the layout."]
    with pytest.raises(InputError, match="one layout"):
        compose_value.opened(desk, [("own.png", own)])


def test_a_composed_picture_brings_its_layout_back(desk: Desk, tmp_path: Path) -> None:
    layout, path = a_layout(), tmp_path / "composed.png"
    extra = {"composition": layout.model_dump(mode="json")}
    write_png(Image.new("RGB", (8, 8)), path, GenerateRequest(prompt="a cat and a dog"), extra)
    found = desk.studio.restore(path).composition
    assert found is not None and parse_layout(found) == layout
    write_png(Image.new("RGB", (8, 8)), path, GenerateRequest(prompt="a cat"))
    assert desk.studio.restore(path).composition is None


def a_row(folder: Path, method: str, seed: int, **more: object) -> dict[str, Any]:
    picture = folder / f"{method}-{seed}.png"
    Image.new("RGB", (16, 16), (seed * 40 % 256, 90, 120)).save(picture)
    return {"method": method, "title": method.capitalize(), "seed": seed, "picture": str(picture), **more}


SCORES = {
    "concepts": ["cat", "dog"], "presence": [1, 0], "identity": [0.81, 0.2], "confusion": [[0.81, 0.44], [0.05, 0.2]],
}  # fmt: skip


def a_job(desk: Desk, request: ComposeRequest, rows: list[dict[str, Any]], **report: object) -> Job:
    """A composition in the store that was drawn."""
    job = desk.studio.store.submit(request, owner=this_process())
    for row in (row for row in rows if "method" in row):
        event = Artifact(kind="picture", path=row["picture"], label=f"{row['method']}, seed {row['seed']}")
        desk.studio.store.append(job.id, [event])
    desk.studio.store.finish(job.id, Done(seconds=1.0))
    text = json.dumps({"version": 1, "layout": request.model_dump(mode="json"), "rows": rows, **report})
    (job.folder / "comparison.json").write_text(text)
    return desk.studio.job(job.id)


def now(desk: Desk) -> Shown:
    shown = shown_now(desk, Seen())
    assert shown is not None
    return shown


def test_the_sheet_has_a_row_per_seed_and_a_column_per_method(desk: Desk) -> None:
    folder = desk.studio.home.outputs
    rows = [a_row(folder, method, seed, seconds=2.5, passes=14, memory=3e8, scores=SCORES)
            for seed in (3, 4) for method in ("switch", "merge")]  # fmt: skip
    a_job(desk, a_layout(), rows[:3])
    html = sheet_html(desk, now(desk))
    assert re.findall(r'scope="row"><span>seed</span> (\d)', html) == ["3", "4"]
    assert re.findall(r'<th scope="col">(\w+)</th>', html) == ["Switch", "Merge"]
    assert html.count('data-act="select"') == 3 and html.count("pending") == 1
    assert "2.5 s · 300 MB · 14 passes" in html
    assert html.count('aria-label="present"') == html.count('aria-label="absent"') == 3
    assert "cat 0.44" in html  # the cat in the dog's place; the dog in the cat's is too faint to be told
    assert "dog 0.05" not in html
    assert "<b>50%</b> present" in html and "<b>0.51</b> identity" in html


def test_the_intruder_of_a_box_is_the_strongest_other_concept() -> None:
    scores = Scores(["a", "b", "c"], [1, 1, 1], [0.9, 0.8, 0.7], [[0.9, 0.1, 0.6], [0.2, 0.8, 0.5], [0.3, 0.0, 0.7]])
    assert [scores.intruder(box) for box in range(3)] == [("c", 0.3), ("a", 0.1), ("a", 0.6)]
    assert Scores(["a"], [1], [0.9], [[0.9]]).intruder(0) is None


def test_a_report_that_says_little_is_shown_as_far_as_it_goes(desk: Desk) -> None:
    row = a_row(desk.studio.home.outputs, "merge", 3)
    a_job(desk, a_layout(), [row, {"picture": "/gone.png"}, {}])
    shown = now(desk)
    assert len(shown.sheet.shots) == 1
    assert "pending" in sheet_html(desk, shown) and panels_html(shown.sheet, 0) == ""
    assert sheet_table(Sheet.read({}, []), Plan([], []), lambda index, shot: "").startswith("<div")


def test_the_exported_page_holds_its_pictures_and_no_folder_of_this_computer(desk: Desk, tmp_path: Path) -> None:
    rows = [a_row(desk.studio.home.outputs, "merge", 3, seconds=1, scores=SCORES)]
    request = a_layout(model=str(tmp_path / "models" / "my-model"), methods=[{"method": "merge"}], seeds=[3])
    a_job(desk, request, rows)
    text = export_html(desk, now(desk)).read_text()
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert base64.b64decode(data) == Path(rows[0]["picture"]).read_bytes()
    assert str(desk.studio.home.root) not in text and str(tmp_path) not in text
    assert not re.search(r'(src|href)="(?!data:)', text), "it must need no other file"
    assert 'class="c0" x="0.0"' in layout_map(request)

    exported = json.loads(export_json(now(desk)).read_text())
    assert exported["rows"][0]["scores"] == SCORES
    assert exported["rows"][0]["picture"] == "merge-3.png"
    assert exported["layout"]["model"] == "my-model"
    assert str(tmp_path) not in json.dumps(exported)


def test_only_files_lose_their_folders() -> None:
    told = {
        "prompt": "/imagine a cat",
        "picture": "/a/b.png",
        "layout": {"concepts": [{"mask": "", "adapter": "/x/y"}]},
    }
    assert without_places(told) == {
        "prompt": "/imagine a cat", "picture": "b.png", "layout": {"concepts": [{"mask": "", "adapter": "y"}]},
    }  # fmt: skip


def test_nothing_is_exported_before_the_first_picture(desk: Desk) -> None:
    a_job(desk, a_layout(), [])
    with pytest.raises(InputError, match="no picture to export"):
        export_json(now(desk))


def test_names_and_prompts_are_escaped_everywhere(desk: Desk) -> None:
    scores = {**SCORES, "concepts": [EVIL, "dog"], "confusion": [[0.1, 0.9], [0.8, 0.1]]}
    concepts = [{"adapter": "mini-fast", "name": EVIL, "prompt": EVIL}, {"adapter": "mini-fast", "name": "dog"}]
    request = a_layout(prompt=EVIL, concepts=concepts, methods=[{"method": "merge"}], seeds=[3])
    mask = desk.studio.home.outputs / "mask.png"
    Image.new("L", (8, 8), 200).save(mask)
    row = a_row(
        desk.studio.home.outputs, "merge", 3, scores=scores, masks=[{"concept": EVIL, "path": str(mask)}],
        facts={EVIL: [1.0, 2.0]},
    )  # fmt: skip
    a_job(desk, request, [row | {"title": EVIL}])
    shown = now(desk)
    pieces = [
        sheet_html(desk, shown), panels_html(shown.sheet, 0), history_html(desk, shown),
        export_html(desk, shown).read_text(),
    ]  # fmt: skip
    for html in pieces:
        assert "<img src=x" not in html and "&lt;img src=x" in html


def test_the_spectrum_is_drawn_with_a_line_per_adapter(desk: Desk) -> None:
    spectrum = {"names": ["cat", "dog"], "edges": [0, 0.25, 0.5], "profiles": [[3.0, 1.0], [1.0, 0.5]],
                "scores": [0.2, 0.4], "cut": 0.35}  # fmt: skip
    row = a_row(desk.studio.home.outputs, "cmlora", 3)
    a_job(desk, a_layout(methods=[{"method": "cmlora"}], seeds=[3]), [row], spectrum=spectrum)
    html = panels_html(now(desk).sheet, 0)
    assert html.count("<polyline") == 2
    assert "dog 0.4" in html and "0.35" in html
    broken = Sheet.read({"rows": [row], "spectrum": {**spectrum, "edges": [0, 1]}}, ["cat", "dog"])
    assert "<polyline" not in panels_html(broken, 0)


def test_a_name_given_twice_is_told_in_one_sentence() -> None:
    twice = [{"adapter": "mini-fast"}, {"adapter": "mini-fast"}]
    with pytest.raises(InputError, match=r"^Two concepts or styles are called mini-fast"):
        ComposeRequest.parse({"concepts": twice})
