"""Adapter files on the page: dialects come in, parts and steps act, reports are drawn, the library is searched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from browser_steps import NewPage, Server, close_toasts, drop, generate, open_tab, toast
from intarsia.pipelines.requests import GenerateRequest
from mini_adapters import six_dialects
from PIL import Image, ImageChops
from playwright.sync_api import Page, expect

KINDS = {
    "moss-painting": "LoRA",
    "ink-wash": "LoRA",
    "fern-press": "LoHa",
    "slate-cut": "LoKr",
    "ember-glow": "DoRA",
    "velvet-fox": "B-LoRA",
}


@pytest.fixture
def stocked(page: Page, server: Server, tmp_path: Path) -> Page:
    """The page with the six files in the library; the first test drops them, the others find them."""
    open_tab(page, "Library")
    if not any(path.stem.startswith("moss-painting") for path in server.home.adapters.iterdir()):
        drop(page, *six_dialects(tmp_path))
        for name in KINDS:
            expect(page.locator(f"#library .card[data-name={name}]")).to_be_visible(timeout=60_000)
        close_toasts(page)
    return page


def card(page: Page, name: str):  # noqa: ANN201 - a Locator
    return page.locator(f"#library .card[data-name={name}]")


def only(page: Page, name: str) -> None:
    """Wait until one card is left."""
    expect(page.locator("#library .card")).to_have_count(1)
    expect(card(page, name)).to_be_visible()


def newest_picture(page: Page, server: Server, before: set[Path]) -> tuple[Image.Image, Path]:
    """Wait for the picture of the run that was just started."""
    expect(page.locator("#stage img.result")).to_be_visible(timeout=90_000)
    page.wait_for_function("count => document.querySelectorAll('#gallery .tile img').length > count", arg=len(before))
    (path,) = set(server.home.outputs.glob("*.png")) - before
    return Image.open(path).convert("RGB"), path


def test_six_dialects_dropped_at_once_are_told_apart(stocked: Page, shots: Path) -> None:
    for name, kind in KINDS.items():
        expect(card(stocked, name).locator(".chip.kind")).to_have_text(kind)
        expect(card(stocked, name).locator(".chip.family")).to_have_text("SDXL")
        expect(card(stocked, name).locator(".matched")).to_contain_text("modules matched")
    expect(card(stocked, "velvet-fox-style").locator(".chip.role")).to_have_text("style")
    expect(card(stocked, "moss-painting")).to_contain_text("moss painting")
    expect(card(stocked, "moss-painting").locator("img.face")).to_be_visible()
    card(stocked, "moss-painting").locator("details summary").click()
    expect(card(stocked, "moss-painting").locator("details")).to_contain_text("CC-BY-4.0")
    card(stocked, "moss-painting").locator("details summary").click()
    stocked.screenshot(path=shots / "library.png")


def test_parts_and_steps_change_the_picture_and_come_back_with_it(stocked: Page, server: Server, shots: Path) -> None:
    pictures: list[Image.Image] = []
    asked = {"steps": 4, "seed": 11}

    def draw() -> Path:
        before = set(server.home.outputs.glob("*.png"))
        generate(stocked, "a red apple, twemoji style", **asked)
        picture, path = newest_picture(stocked, server, before)
        pictures.append(picture)
        return path

    draw()
    for name in ("moss-painting", "fern-press"):
        open_tab(stocked, "Library")
        card(stocked, name).locator("[data-act=use]").click()
        expect(stocked.locator("#rack .use", has_text=name)).to_be_visible()
    draw()
    row = stocked.locator("#rack .use", has_text="moss-painting")
    row.locator("summary").click()
    expect(row.locator(".part .what")).to_contain_text(["down 1", "mid", "up 0", "content", "style"])
    stocked.get_by_label("Factor of moss-painting in up 0", exact=True).fill("0.2")
    expect(stocked.get_by_label("Exact factor of moss-painting in content")).to_have_value("0.2")  # a part of it
    stocked.get_by_label("Exact factor of moss-painting in style").fill("1.5")
    stocked.get_by_label("Exact factor of moss-painting in style").blur()
    until = stocked.get_by_label("moss-painting acts until")
    until.fill("0.6")
    until.press("ArrowLeft")
    until.press("ArrowRight")
    expect(row.locator("summary")).to_contain_text("2 parts, 0 % to 60 %")
    stocked.evaluate("scrollTo(0, 0)")
    stocked.screenshot(path=shots / "parts.png")
    made = draw()
    expect(stocked.locator("#stage .chip.adapter").first).to_have_text("moss-painting 1, 2 parts, 0% to 60%")
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert ImageChops.difference(pictures[one], pictures[other]).getbbox() is not None

    row.get_by_label("Reset parts and steps of moss-painting").click()
    expect(row.locator("summary .changed")).to_have_count(0)
    drop(stocked, made)
    expect(stocked.locator("#message")).to_contain_text("Settings restored")
    expect(row.locator("summary")).to_contain_text("2 parts, 0 % to 60 %")
    stocked.get_by_label("Remove moss-painting").click()
    expect(row).to_have_count(0)
    add = stocked.get_by_label("Add an adapter")
    add.fill("moss")
    expect(stocked.locator(".offer")).to_have_count(1)
    add.press("Enter")
    expect(row.locator("summary")).to_contain_text("2 parts, 0 % to 60 %")  # as it was
    request = server.store.jobs(kind="generate")[0].request
    assert isinstance(request, GenerateRequest)
    use = request.adapters[0]
    assert use.blocks == {"unet.up_blocks.0": 0.2, "unet.up_blocks.0.attentions.1": 1.5}
    assert (use.first, use.last) == (0.0, 0.6)


def test_a_report_shows_what_a_file_holds_and_how_it_changes_pictures(stocked: Page, shots: Path) -> None:
    card(stocked, "moss-painting").locator("[data-act=report]").click()
    panel = stocked.locator("#library-panel .panel")
    expect(panel.locator("h3")).to_be_focused()
    expect(panel.locator(".facts").first).to_contain_text("certain: shapes of")
    expect(panel.locator(".chart.columns")).to_be_visible()
    bars = panel.locator(".chart.bars")
    expect(bars.locator("rect")).not_to_have_count(0, timeout=60_000)
    assert "content" in (bars.locator("svg").get_attribute("aria-label") or "")
    panel.locator("summary", has_text="What the file says").click()
    expect(panel.locator(".texts")).to_contain_text("CC-BY-4.0")
    panel.locator("summary", has_text="What the file says").click()
    effect = stocked.locator("#library-effect")
    expect(effect.get_by_label("Prompt")).to_have_value("moss painting, a red apple, twemoji style")
    effect.get_by_label("Prompt").fill("a red apple, twemoji style")
    stocked.set_viewport_size({"width": 1440, "height": 1180})
    stocked.locator("#library-drawer").evaluate("drawer => { drawer.scrollTop = 0; }")
    stocked.screenshot(path=shots / "report.png")
    effect.locator("[data-act=effect]").click()
    expect(effect.locator(".chart.lines polyline")).to_have_count(2, timeout=200_000)
    expect(effect.locator(".facts")).to_contain_text("of what it changes")
    for picture in effect.locator(".pair img").all():
        expect(picture).to_be_visible()
        assert picture.evaluate("image => image.complete && image.naturalWidth > 0")
    effect.scroll_into_view_if_needed()
    stocked.screenshot(path=shots / "effect.png")
    stocked.keyboard.press("Escape")
    expect(panel).to_have_count(0)
    expect(card(stocked, "moss-painting").locator("[data-act=report]")).to_be_focused()
    open_tab(stocked, "Runs")
    expect(stocked.locator("#run-detail .chart.lines")).to_be_visible()


def test_a_dora_says_what_its_file_does_not_hold(stocked: Page) -> None:
    card(stocked, "ember-glow").locator("[data-act=report]").click()
    panel = stocked.locator("#library-panel .panel")
    expect(panel.locator(".chart.bars")).to_be_visible(timeout=60_000)
    expect(panel).to_contain_text("follows from the model's own weights")
    panel.locator("[data-act=close]").click()
    expect(panel).to_have_count(0)


def test_the_library_is_searched_filtered_and_edited(stocked: Page) -> None:
    search, found = stocked.get_by_label("Search the library"), stocked.locator(".found")
    search.fill("fern")
    expect(found).to_have_text("1 adapter found")
    only(stocked, "fern-press")
    search.fill("nothing like it")
    expect(stocked.locator("#library .empty")).to_contain_text("Nothing found")
    stocked.locator("#library [data-act=clear]").click()
    expect(search).to_have_value("")
    stocked.get_by_label("Kind", exact=True).select_option("lokr")
    only(stocked, "slate-cut")
    stocked.get_by_label("Kind", exact=True).select_option("")

    card(stocked, "ink-wash").locator("[data-act=edit]").click()
    form = stocked.locator("#library-panel form")
    form.get_by_label("Tags").fill("ink, <b>soft</b>")
    form.get_by_label("Notes").fill("for skies")
    form.get_by_label("Name").fill("fern-press")  # taken
    form.locator("[data-act=save]").click()
    toast(stocked, "another adapter called fern-press")
    form.get_by_label("Name").fill("ink-sky")
    form.locator("[data-act=save]").click()
    expect(card(stocked, "ink-sky").locator(".chip.tag")).to_have_text(["<b>soft</b>", "ink"])
    close_toasts(stocked)
    stocked.get_by_label("Tag", exact=True).select_option("ink")
    only(stocked, "ink-sky")
    stocked.get_by_label("Tag", exact=True).select_option("")
    card(stocked, "ink-sky").locator("[data-act=edit]").click()
    form.get_by_label("Name").fill("ink-wash")
    form.get_by_label("Tags").fill("")
    form.get_by_label("Name").press("Enter")
    expect(card(stocked, "ink-wash").locator(".chip.tag")).to_have_count(0)

    star = card(stocked, "slate-cut").locator(".star")
    star.click()
    expect(star).to_have_attribute("aria-pressed", "true")
    stocked.locator(".toggle", has_text="Favourites").click()
    only(stocked, "slate-cut")
    star.click()
    expect(stocked.locator("#library .empty")).to_be_visible()
    stocked.locator(".toggle", has_text="Favourites").click()


def test_what_is_removed_waits_in_the_trash_and_can_come_back(stocked: Page, server: Server) -> None:
    card(stocked, "slate-cut").locator("[data-act=remove]").click()
    expect(card(stocked, "slate-cut")).to_have_count(0)
    toast(stocked, "is in the trash")
    close_toasts(stocked)
    trash = stocked.locator(".toggle", has_text="Trash")
    trash.click()
    card(stocked, "slate-cut").locator("[data-act=restore]").click()
    expect(stocked.locator("#library .empty")).to_contain_text("The trash is empty")
    trash.click()
    expect(card(stocked, "slate-cut")).to_be_visible()
    card(stocked, "slate-cut").locator("[data-act=remove]").click()
    expect(card(stocked, "slate-cut")).to_have_count(0)
    trash.click()
    empty = stocked.locator("[data-act=empty]")
    empty.click()
    expect(empty).to_contain_text("for good?")
    empty.click()
    expect(stocked.locator("#library .empty")).to_contain_text("The trash is empty")
    assert not list(server.home.adapters.glob("slate-cut*"))


def test_the_page_is_whole_when_narrow_and_dark(new_page: NewPage, stocked: Page) -> None:
    narrow = new_page(width=390, height=844, dark=True)
    open_tab(narrow, "Library")
    card(narrow, "moss-painting").locator("[data-act=report]").click()
    expect(narrow.locator("#library-panel .chart.bars")).to_be_visible(timeout=60_000)
    assert narrow.evaluate("document.scrollingElement.scrollWidth") <= 390
    assert narrow.evaluate("document.querySelector('#library-drawer').scrollWidth") <= 390


def test_two_adapters_are_merged_after_their_error_was_shown(stocked: Page, server: Server, shots: Path) -> None:
    page = stocked
    page.get_by_text("Tools: merge, resize").click()
    for name in ("moss-painting", "ink-wash"):
        card(page, name).get_by_role("button", name="Tools").click()
        expect(page.locator("#tool-adapters textarea")).to_have_value(re.compile(name))
    page.locator("#tool-choice input").click()
    page.get_by_role("option", name="Merge: TIES").click()
    page.locator("#tool-ties-density input").last.fill("0.4")
    page.locator("#tool-name input, #tool-name textarea").fill("moss-and-ink")
    page.locator("#tool-look").click()
    outcome = page.locator("#tool-outcome")
    expect(outcome.locator("[data-state=done]")).to_be_visible(timeout=90_000)
    expect(outcome).to_contain_text("of the change wanted")
    expect(outcome.locator("figure.chart.bars, svg").first).to_be_visible()
    assert not (server.home.adapters / "moss-and-ink.safetensors").exists(), "it was only to be looked at"
    page.locator("#library-tools").scroll_into_view_if_needed()
    page.screenshot(path=shots / "tools.png")
    page.locator("#tool-make").click()
    expect(outcome).to_contain_text("In the library: moss-and-ink", timeout=90_000)
    expect(card(page, "moss-and-ink")).to_contain_text("rank 4", timeout=30_000)


def test_a_tool_that_cannot_work_says_why(stocked: Page) -> None:
    page = stocked
    page.get_by_text("Tools: merge, resize").click()
    page.locator("#tool-adapters textarea").fill("moss-painting")
    page.locator("#tool-choice input").click()
    page.get_by_role("option", name="Merge: LoRA-LEGO").click()
    page.locator("#tool-look").click()
    toast(page, "takes 2 or more adapters")


def test_a_folder_is_listed_in_place_and_followed(stocked: Page, tmp_path: Path) -> None:
    page, folder = stocked, tmp_path / "loras"
    folder.mkdir()
    first, second = six_dialects(tmp_path)[:2]
    bent = bytearray(first.read_bytes())
    bent[-4:] = b"\x01\x02\x03\x04"  # other values: another adapter
    (folder / "from-elsewhere.safetensors").write_bytes(bent)
    (folder / "broken.safetensors").write_bytes(second.read_bytes()[:1000])
    page.get_by_text("Folders: list the files").click()
    page.locator("#folder-path input, #folder-path textarea").fill(str(folder))
    page.locator("#folder-add").click()
    expect(card(page, "from-elsewhere")).to_be_visible(timeout=40_000)
    expect(page.locator("#folder-list")).to_contain_text("1 listed, 1 not usable", timeout=20_000)
    page.locator("#folder-list summary").click()
    expect(page.locator("#folder-list details")).to_contain_text("broken.safetensors")
    page.locator("#folder-list").get_by_role("button", name="Leave out").click()
    expect(card(page, "from-elsewhere")).to_have_count(0, timeout=20_000)
    assert (folder / "from-elsewhere.safetensors").is_file()
