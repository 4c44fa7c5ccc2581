"""Making pictures in a real browser."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from browser_steps import NewPage, Server, drop, generate, open_tab, setting, toast
from PIL import Image
from playwright.sync_api import Page, expect

LONG = 200  # steps: long enough to look at a run while it goes on


def live_step(page: Page) -> None:
    """Wait until a run shows a preview."""
    expect(page.locator("#stage .stage.live img.preview")).to_be_visible(timeout=60_000)


def stop_all(page: Page) -> None:
    page.locator("#stop").click()
    expect(page.locator("#stop")).to_be_disabled()


def test_a_picture_is_made_and_found_in_the_gallery(page: Page, server: Server, shots: Path) -> None:
    page.screenshot(path=shots / "generate-empty.png")
    generate(page, "a red apple, twemoji style", steps=100, seed=7)  # long enough for the page to see it live
    live_step(page)
    expect(page.locator("#stage .status")).to_contain_text("of 100")
    expect(page.locator("#stage img.result")).to_be_visible(timeout=60_000)
    expect(page.locator("#stage .caption")).to_contain_text("seed 7")
    tile = page.locator("#gallery .tile img").first
    expect(tile).to_have_attribute("alt", "a red apple, twemoji style")
    served = page.request.get(f"{server.address}/{tile.get_attribute('src')}")
    picture = Image.open(io.BytesIO(served.body()))
    assert "a red apple, twemoji style" in picture.info["parameters"]
    page.screenshot(path=shots / "generate.png")
    page.reload()
    expect(page.locator("#gallery .tile img").first).to_have_attribute("alt", "a red apple, twemoji style")


def test_a_dropped_picture_brings_its_settings_back(page: Page, server: Server, tmp_path: Path) -> None:
    before = set(server.home.outputs.iterdir())
    generate(page, "a blue heart", steps=3, seed=41, guidance=3.5, negative="frame")
    expect(page.locator("#gallery .tile img").first).to_have_attribute("alt", "a blue heart", timeout=60_000)
    made = next(path for path in server.home.outputs.iterdir() if path not in before)
    page.reload()
    expect(page.locator("#stage img.result")).to_be_visible()
    assert page.locator("#generate-prompt textarea").input_value() == ""
    drop(page, made)
    expect(page.locator("#generate-prompt textarea")).to_have_value("a blue heart")
    expect(page.locator("#generate-negative textarea")).to_have_value("frame")
    expect(page.locator("#generate-seed input")).to_have_value("41")
    expect(page.locator("#generate-steps input[type=number]")).to_have_value("3")
    expect(page.locator("#generate-guidance input[type=number]")).to_have_value("3.5")
    expect(page.locator("#message")).to_contain_text("Settings restored")

    other = tmp_path / "foreign.png"
    Image.new("RGB", (64, 64), "teal").save(other)
    drop(page, other)
    toast(page, "settings")


def test_stop_answers_within_two_seconds(page: Page) -> None:
    generate(page, "a slow picture", steps=LONG, count=8)
    live_step(page)
    began = time.monotonic()
    page.locator("#stop").click()
    expect(page.locator("#stage .stage[data-state=stopped]")).to_contain_text("Stopped at step", timeout=5_000)
    assert time.monotonic() - began < 2.0
    expect(page.locator("#stop")).to_be_disabled()


def test_a_reload_and_a_second_tab_find_the_running_job(page: Page, new_page: NewPage) -> None:
    generate(page, "a long run", steps=LONG, count=8)
    live_step(page)
    job = page.locator("#stage .stage").get_attribute("data-job")
    page.reload()
    live_step(page)
    expect(page.locator("#stage .stage")).to_have_attribute("data-job", job or "")
    second = new_page()
    live_step(second)
    expect(second.locator("#stage .stage")).to_have_attribute("data-job", job or "")
    stop_all(second)
    expect(page.locator("#stage .stage[data-state=stopped]")).to_be_visible()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("width", "100", "Width cannot be"), ("height", "eight", "Height cannot be"), ("model", "nowhere/at-all", "")],
)
def test_a_wrong_value_is_told_in_a_toast_and_starts_nothing(
    page: Page, server: Server, name: str, value: str, said: str
) -> None:
    before = len(server.store.jobs())
    generate(page, "anything", **{name: value})
    toast(page, said or value)
    assert len(server.store.jobs()) == before


def test_every_button_of_the_tab_does_something(page: Page) -> None:
    generate(page, "a gold key", steps=2, seed=5)
    expect(page.locator("#gallery .tile img").first).to_have_attribute("alt", "a gold key", timeout=60_000)
    page.locator("#seed-random").click()
    expect(page.locator("#generate-seed input")).to_have_value("-1")
    page.locator("#seed-reuse").click()
    expect(page.locator("#generate-seed input")).to_have_value("5")
    page.locator("#gallery .tile[data-act=select]").last.click()
    expect(page.locator("#gallery .tile.chosen")).to_have_count(1)
    page.locator("#gallery .tile[data-act=select]").first.click()
    expect(page.locator("#stage .caption")).to_contain_text("a gold key")
    setting(page, "prompt", "something else")
    page.locator("#stage [data-act=restore]").click()
    expect(page.locator("#generate-prompt textarea")).to_have_value("a gold key")
    page.locator("#seed-random").click()
    page.locator("#stage [data-act=seed]").click()
    expect(page.locator("#generate-seed input")).to_have_value("5")
    with page.expect_download() as download:
        page.locator("#stage a[download]").click()
    assert Image.open(download.value.path()).format == "PNG"
    dark = page.locator("body.dark")
    expect(dark).to_have_count(0)
    page.locator("[data-theme-switch]").click()
    expect(dark).to_have_count(1)
    page.reload()
    expect(page.locator("#stage .stage")).to_be_visible()
    expect(dark).to_have_count(1)


def test_a_phone_sees_everything_without_scrolling_sideways(new_page: NewPage, shots: Path) -> None:
    phone = new_page(width=390, height=844)
    for tab in ("Generate", "Library", "Train", "Runs"):
        open_tab(phone, tab)
        expect(phone.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true")
        phone.screenshot(path=shots / f"phone-{tab.lower()}.png", full_page=True)
        assert phone.evaluate("document.scrollingElement.scrollWidth") <= 390
