"""Composing in a real browser: boxes drawn with the mouse, adapters dropped on them, methods compared, sheets saved."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest
from adapter_files import kohya, lora, write
from browser_steps import NewPage, Server, close_toasts, drop, open_tab, setting, toast
from intarsia.composition.layout import ComposeRequest, read_layout
from mini_adapters import layers, thumbnail
from PIL import Image
from playwright.sync_api import Locator, Page, expect

BOXES = ((0.06, 0.2, 0.44, 0.94), (0.56, 0.44, 0.94, 0.94), (0.5, 0.06, 0.94, 0.38))
WORDS = {
    "apple-red": "a red apple, twemoji style",
    "penguin-ink": "a penguin, noto style",
    "heart-blue": "a blue heart, twemoji style",
}
FACES = {"apple-red": (0, 9), "penguin-ink": (3, 5), "heart-blue": (4, 6)}


def gentle(folder: Path) -> dict[str, Path]:
    """Adapters that change Mini's pictures a little: what a picture shows comes from the prompts."""
    made: dict[str, Path] = {}
    for seed, name in enumerate(WORDS):
        tensors = lora(layers(), kohya, 4, 4.0, 40 + seed, scale=0.012)
        made[name] = write(folder / f"{name}.safetensors", tensors, thumbnail(*FACES[name]))
    return made


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return gentle(tmp_path)


@pytest.fixture
def compose(page: Page, server: Server, files: dict[str, Path]) -> Page:
    """The page at the tab, with the adapters in the library."""
    open_tab(page, "Library")
    if not list(server.home.adapters.glob("heart-blue*")):
        drop(page, *files.values())
        for name in files:
            expect(page.locator(f"#library .card[data-name={name}]")).to_be_visible(timeout=60_000)
        close_toasts(page)
    open_tab(page, "Compose")
    expect(page.locator(".stock-row[data-adapter=heart-blue]")).to_be_visible()
    return page


def canvas_point(page: Page, x: float, y: float) -> tuple[float, float]:
    frame = page.locator(".board-canvas").bounding_box()
    assert frame is not None
    return frame["x"] + x * frame["width"], frame["y"] + y * frame["height"]


def drag(page: Page, start: tuple[float, float], end: tuple[float, float]) -> None:
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
    page.mouse.move(*end)
    page.mouse.up()


def draw_box(page: Page, box: tuple[float, float, float, float]) -> None:
    drag(page, canvas_point(page, *box[:2]), canvas_point(page, *box[2:]))


def box_of(page: Page, index: int) -> Locator:
    return page.locator(f".box[data-index='{index}']")


def place_of(page: Page, index: int) -> list[float]:
    """Left, top, right, bottom of a box in fractions of the canvas."""
    style = box_of(page, index).evaluate(
        "box => ['left', 'top', 'width', 'height'].map(name => parseFloat(box.style[name]) / 100)"
    )
    return [style[0], style[1], style[0] + style[2], style[1] + style[3]]


def carry(page: Page, name: str, index: int) -> None:
    """Drag a row of the library onto a box with the mouse."""
    row = page.locator(f".stock-row[data-adapter={name}]")
    row.scroll_into_view_if_needed()
    start, end = row.bounding_box(), box_of(page, index).bounding_box()
    assert start and end
    drag(page, (start["x"] + 60, start["y"] + 20), (end["x"] + end["width"] / 2, end["y"] + end["height"] / 2))


def drop_on(page: Page, file: Path, index: int) -> None:
    """Drop a file on a box, as from a file manager."""
    page.evaluate(
        """([name, body, index]) => {
            const data = new DataTransfer();
            data.items.add(new File([Uint8Array.from(atob(body), (letter) => letter.charCodeAt(0))], name));
            const box = document.querySelector(`.box[data-index='${index}']`);
            const frame = box.getBoundingClientRect();
            const place = { clientX: frame.x + frame.width / 2, clientY: frame.y + frame.height / 2 };
            for (const type of ["dragenter", "dragover", "drop"])
                box.dispatchEvent(
                    new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true, ...place }));
        }""",
        [file.name, base64.b64encode(file.read_bytes()).decode(), index],
    )


def prompt_for(page: Page, name: str) -> None:
    page.get_by_label(f"Prompt of {name}", exact=True).fill(WORDS[name])


def three_concepts(page: Page) -> None:
    """Draw three boxes and give each its adapter by the mouse, and its prompt."""
    for box in BOXES:
        draw_box(page, box)
    for index, name in enumerate(WORDS):
        carry(page, name, index)
        expect(box_of(page, index)).to_contain_text(name)
        prompt_for(page, name)


def newest(server: Server) -> ComposeRequest:
    request = server.store.jobs(kind="compose", limit=1)[0].request
    assert isinstance(request, ComposeRequest)
    return request


def start(page: Page, button: str) -> None:
    """Press a button and wait until the page shows the run that it started."""
    before = page.locator(".under-board")
    job = before.get_attribute("data-job") if before.count() else ""
    page.locator(button).click()
    expect(page.locator(f".under-board:not([data-job='{job}'])")).to_be_visible()


def finished(page: Page) -> None:
    expect(page.locator(".under-board[data-state=done]")).to_be_visible(timeout=240_000)


def give_adapters_three_ways(page: Page, folder: Path) -> None:
    """Drag one from the list onto its box, drop a file on another, look the third up on its card."""
    carry(page, "apple-red", 0)
    expect(box_of(page, 0)).to_contain_text("apple-red")
    prompt_for(page, "apple-red")
    other = folder / "penguin-dropped.safetensors"
    write(other, lora(layers(), kohya, 4, 4.0, 77, scale=0.012), thumbnail(3, 5))
    drop_on(page, other, 1)
    expect(box_of(page, 1)).to_contain_text("penguin-dropped", timeout=30_000)
    close_toasts(page)
    box_of(page, 1).click()
    page.get_by_label("Prompt of penguin-dropped", exact=True).fill(WORDS["penguin-ink"])
    box_of(page, 2).click()
    pick = page.get_by_label("Adapter of Concept 3")
    pick.fill("heart")
    expect(page.locator("#concept-offers .offer")).to_have_count(1)
    pick.press("Enter")
    expect(box_of(page, 2)).to_contain_text("heart-blue")
    prompt_for(page, "heart-blue")
    exact = page.get_by_label("Exact weight of heart-blue")
    exact.fill("0.8")
    exact.blur()


def compare(page: Page) -> None:
    """Tick two methods, give two seeds, press once, and see it drawn beneath the boxes."""
    setting(page, "steps", 20, "compose")
    setting(page, "seeds", "3, 5", "compose")
    for name in ("Merge", "Region"):
        page.locator("#compose-compared").get_by_label(name, exact=True).check()
    page.locator("#compose-region-reads input").click()
    page.get_by_role("option", name="own", exact=True).click()
    page.get_by_label("Score").check()
    start(page, "#compose-compare")
    page.evaluate("scrollTo(0, 0)")
    expect(page.locator(".board-canvas.live.pictured")).to_be_visible(timeout=120_000)
    expect(page.locator(".under-board .doing")).to_contain_text("seed 3")
    expect(page.locator(".box")).to_have_count(3)
    finished(page)


def exported_sheet(page: Page, server: Server) -> str:
    """Export the sheet both ways; gives the HTML."""
    with page.expect_download() as download:
        page.get_by_role("button", name="Export JSON").click()
    told = json.loads(Path(download.value.path()).read_text())
    drawn = [("merge", 3), ("region", 3), ("merge", 5), ("region", 5)]
    assert [(row["method"], row["seed"]) for row in told["rows"]] == drawn
    assert all(len(row["scores"]["identity"]) == 3 for row in told["rows"])
    with page.expect_download() as download:
        page.get_by_role("button", name="Export HTML").click()
    text = Path(download.value.path()).read_text()
    assert text.count("data:image/png;base64,") == 4 and str(server.home.root) not in text
    return text


def test_three_boxes_two_methods_compared_and_the_sheet_exported(
    compose: Page, server: Server, tmp_path: Path, shots: Path
) -> None:
    page = compose
    for index, box in enumerate(BOXES):
        draw_box(page, box)
        expect(page.locator(".box")).to_have_count(index + 1)
        assert place_of(page, index) == pytest.approx(box, abs=0.02)  # snapped to the grid where it is near
    give_adapters_three_ways(page, tmp_path)
    compare(page)
    sheet = page.locator("#compose-sheet .sheet")
    expect(sheet).to_have_attribute("data-pictures", "4")
    expect(sheet.locator(".sheet-table > thead th")).to_have_text(["Merge", "Region"])
    expect(sheet.locator(".sheet-table > tbody > tr > th")).to_have_text(["seed 3", "seed 5"])
    expect(sheet.locator(".marks")).to_have_count(4)
    for picture in sheet.locator("img").all():
        assert picture.evaluate("image => image.decode().then(() => image.naturalWidth > 0)")
    expect(page.locator("#compose-behind .tinted")).to_have_count(3)
    sheet.get_by_label("Show Region, seed 3 on the canvas").click()
    expect(page.locator(".under-board")).to_contain_text("Region")
    expect(page.locator(".under-board")).to_contain_text("seed 3")

    request = newest(server)
    assert [use.method for use in request.methods] == ["merge", "region"] and request.seeds == (3, 5)
    asked = [(use.called, use.weight) for use in request.concepts]
    assert asked == [("apple-red", 1), ("penguin-dropped", 1), ("heart-blue", 0.8)]
    assert request.methods[1].options["reads"] == "own"
    for use, box in zip(request.concepts, BOXES, strict=True):
        assert use.box == pytest.approx(box, abs=0.02)
    text = exported_sheet(page, server)
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=shots / "compose.png")
    page.set_viewport_size({"width": 1440, "height": 1300})
    sheet.screenshot(path=shots / "compare.png")
    exported = page.context.new_page()
    exported.set_content(text)
    exported.locator("main").screenshot(path=shots / "compare-exported.png")
    assert exported.evaluate("document.images.length") == 4


def test_an_earlier_composition_comes_back_with_its_layout(compose: Page) -> None:
    page = compose
    expect(page.locator("#compose-sheet .sheet")).to_have_attribute("data-pictures", "4")  # of the test above
    expect(page.locator(".box")).to_have_count(0)
    page.locator("#compose-history .tile").last.click()
    expect(page.locator(".box")).to_have_count(3)
    expect(page.locator("#compose-message")).to_contain_text("Layout restored")
    expect(page.locator(".board-canvas")).to_be_in_viewport(ratio=0.9)
    expect(page.locator("#compose-seeds :is(input, textarea)")).to_have_value("3, 5")
    expect(page.get_by_label("Merge", exact=True)).to_be_checked()
    expect(page.get_by_label("Exact weight of heart-blue")).to_have_count(0)
    box_of(page, 2).click()
    expect(page.get_by_label("Exact weight of heart-blue")).to_have_value("0.8")


def test_boxes_obey_mouse_and_keyboard_and_every_change_can_be_undone(compose: Page) -> None:
    page = compose
    draw_box(page, (0.13, 0.13, 0.37, 0.37))
    assert place_of(page, 0) == pytest.approx([0.125, 0.125, 0.375, 0.375], abs=1e-3)  # on the grid
    expect(box_of(page, 0)).to_be_focused()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert place_of(page, 0) == pytest.approx([0.135, 0.135, 0.385, 0.385], abs=1e-3)
    page.keyboard.press("Shift+ArrowRight")
    assert place_of(page, 0) == pytest.approx([0.135, 0.135, 0.395, 0.385], abs=1e-3)
    page.keyboard.press("Control+d")
    expect(page.locator(".box")).to_have_count(2)
    expect(box_of(page, 1)).to_be_focused()
    assert place_of(page, 1) == pytest.approx([0.175, 0.175, 0.435, 0.425], abs=1e-3)
    above = "([one, other]) => one.style.zIndex - other.style.zIndex"

    def height() -> float:
        return page.evaluate(above, [box_of(page, 1).element_handle(), box_of(page, 0).element_handle()])

    assert height() > 0
    page.keyboard.press("[")
    assert height() < 0
    page.keyboard.press("]")
    assert height() > 0
    page.keyboard.press("Shift+Tab")
    expect(box_of(page, 0)).to_be_focused()
    expect(box_of(page, 0)).to_have_attribute("aria-pressed", "true")

    corner = canvas_point(page, *place_of(page, 0)[:2])
    page.keyboard.down("Alt")  # no snapping
    drag(page, corner, canvas_point(page, 0.02, 0.05))
    page.keyboard.up("Alt")
    assert place_of(page, 0) == pytest.approx([0.02, 0.05, 0.395, 0.385], abs=5e-3)
    drag(page, canvas_point(page, 0.1, 0.1), canvas_point(page, 0.68, 0.1))
    assert place_of(page, 0)[0] == pytest.approx(0.6, abs=0.03)
    drag(page, canvas_point(page, 0.72, 0.1), canvas_point(page, 2.0, 0.1))
    assert place_of(page, 0)[2] == pytest.approx(1.0)  # never outside
    box_of(page, 0).focus()
    page.keyboard.press("Delete")
    expect(page.locator(".box")).to_have_count(1)
    for _ in range(20):
        page.keyboard.press("Control+z")
    expect(page.locator(".box")).to_have_count(0)
    expect(page.get_by_label("Undo", exact=True)).to_be_disabled()
    page.get_by_label("Redo", exact=True).click()
    expect(page.locator(".box")).to_have_count(1)


def test_a_place_is_painted_and_cleared_again(compose: Page, server: Server, shots: Path) -> None:
    page = compose
    three_concepts(page)
    box_of(page, 0).click(position={"x": 30, "y": 60})
    page.get_by_role("group", name="Place of apple-red").get_by_role("button", name="Brush").click()
    expect(page.locator(".bar-part.painting b")).to_have_text("Mask of apple-red")
    drag(page, canvas_point(page, 0.2, 0.3), canvas_point(page, 0.3, 0.8))
    drag(page, canvas_point(page, 0.3, 0.8), canvas_point(page, 0.15, 0.6))
    page.mouse.move(*canvas_point(page, 0.35, 0.45))
    page.locator("#compose-board").screenshot(path=shots / "brush.png")
    page.get_by_role("button", name="Done").click()
    expect(page.locator(".board-masks i")).to_have_count(1)
    setting(page, "steps", 2, "compose")
    start(page, "#compose-go")
    finished(page)
    mask = newest(server).concepts[0].mask
    with Image.open(mask) as picture:
        assert picture.getpixel((picture.width // 5, int(0.3 * picture.height))) == 255
        assert picture.getpixel((int(0.9 * picture.width), picture.height // 2)) == 0
        assert picture.width == picture.height
    page.get_by_role("group", name="Place of apple-red").get_by_role("button", name="Brush").click()
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("button", name="Done").click()
    expect(page.locator(".board-masks i")).to_have_count(0)
    expect(box_of(page, 0)).not_to_have_class(re.compile("masked"))


def test_a_layout_is_saved_and_opened_again(compose: Page, tmp_path: Path) -> None:
    page = compose
    three_concepts(page)
    setting(page, "seeds", "7", "compose")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save layout").click()
    file = tmp_path / "layout.yaml"
    download.value.save_as(file)
    saved = read_layout(file)
    assert [use.adapter for use in saved.concepts] == list(WORDS)
    assert saved.seeds == (7,) and [use.method for use in saved.methods] == ["region"]
    page.reload()
    open_tab(page, "Compose")
    drop(page, file)
    expect(page.locator("#compose-message")).to_contain_text("Layout opened.")
    expect(page.locator(".box .box-label")).to_have_text(list(WORDS))
    expect(page.locator("#compose-seeds :is(input, textarea)")).to_have_value("7")
    broken = tmp_path / "broken.yaml"
    broken.write_text("concepts: [1, 2")
    drop(page, broken)
    toast(page, "no YAML")


def test_what_cannot_be_drawn_is_told_and_starts_nothing(compose: Page, server: Server) -> None:
    page = compose
    before = len(server.store.jobs(kind="compose"))
    page.locator("#compose-go").click()
    toast(page, "There is no concept to compose")
    close_toasts(page)
    page.get_by_role("button", name="Add", exact=True).click()
    page.locator("#compose-go").click()
    toast(page, "Concept 1 has no adapter yet")
    close_toasts(page)
    page.locator(".stock-row[data-adapter=apple-red]").click()
    page.locator("#compose-go").click()
    toast(page, "needs a place for apple-red")
    close_toasts(page)
    setting(page, "seeds", "one", "compose")
    page.locator("#compose-go").click()
    toast(page, "Seeds cannot be")
    assert len(server.store.jobs(kind="compose")) == before


def test_a_long_composition_is_stopped_and_the_method_has_its_own_form(compose: Page) -> None:
    page = compose
    three_concepts(page)
    page.locator("#compose-method input").click()
    page.get_by_role("option", name="Switch").click()
    expect(page.locator("#compose-switch-every")).to_be_visible()
    expect(page.locator("#compose-region-edge")).to_be_hidden()
    setting(page, "steps", 200, "compose")
    start(page, "#compose-go")
    expect(page.locator(".board-canvas.live.pictured")).to_be_visible(timeout=90_000)
    page.locator("#compose-stop").click()
    expect(page.locator(".under-board[data-state=stopped]")).to_contain_text("0 of 1 pictures")
    expect(page.locator("#compose-stop")).to_be_disabled()


def test_the_tab_is_whole_in_the_dark_and_on_a_phone(compose: Page, new_page: NewPage, shots: Path) -> None:
    dark = new_page(dark=True)
    open_tab(dark, "Compose")
    dark.locator("#compose-history .tile").last.click()
    expect(dark.locator(".box").first).to_be_visible()
    dark.screenshot(path=shots / "compose-dark.png", full_page=True)
    phone = new_page(width=390, height=844)
    open_tab(phone, "Compose")
    phone.locator("#compose-history .tile").last.click()
    expect(phone.locator(".box").first).to_be_visible()
    phone.screenshot(path=shots / "phone-compose.png", full_page=True)
    assert phone.evaluate("document.scrollingElement.scrollWidth") <= 390
