"""Training in a real browser: watch it, stop it, kill it, resume it, use what came out."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from browser_steps import Server, close_toasts, drop, generate, open_tab, setting, toast
from intarsia.app.processes import pid_of
from intarsia.pipelines.requests import TrainRequest
from PIL import Image, ImageDraw
from playwright.sync_api import Page, expect


def a_picture(path: Path) -> Path:
    image = Image.new("RGB", (160, 128), "ivory")
    ImageDraw.Draw(image).ellipse((40, 24, 120, 104), fill="darkorange", outline="black", width=4)
    image.save(path)
    return path


def start_training(page: Page, picture: Path, name: str, **options: object) -> None:
    open_tab(page, "Train")
    drop(page, picture)
    expect(page.locator("#train-pictures .sheet-row")).to_have_count(1)
    setting(page, "name", name, "train")
    more = page.get_by_role("button", name="More settings")
    more.locator("visible=true").click()
    for option, value in options.items():
        setting(page, option, value, "blora")
    page.locator("#train-start").click()
    expect(page.locator("#train-live .run-head")).to_contain_text(name)


def test_a_blora_is_trained_watched_and_used(page: Page, tmp_path: Path, shots: Path) -> None:
    start_training(page, a_picture(tmp_path / "orange.png"), "orange", steps=6, sample_every=6)
    expect(page.locator("#train-live .run[data-state=done]")).to_be_visible(timeout=200_000)
    plot = page.locator("#train-live .plot")
    expect(plot).to_have_attribute("data-points", "6")
    expect(plot.locator("polyline.smooth")).to_be_visible()
    expect(page.locator("#train-live .strip figure")).to_contain_text(["base", "step 6"])
    for sample in page.locator("#train-live .strip img").all():
        assert sample.evaluate("image => image.complete && image.naturalWidth > 0")
    expect(page.locator("#train-live .numbers")).to_contain_text("6 / 6")
    expect(page.locator("#train-live .made")).to_have_count(2)
    page.screenshot(path=shots / "train.png")

    page.locator("#train-live [data-act=use]").click()
    expect(page.locator("#rack .use")).to_have_count(1)
    expect(page.locator("#rack .weight .what")).to_have_text(["content", "style"])
    page.locator("#rack .exact").nth(1).fill("0.5")
    page.locator("#rack .exact").nth(1).blur()
    page.locator("#rack .chip.trigger").click()
    expect(page.locator("#generate-prompt textarea")).not_to_have_value("")
    prompt = page.locator("#generate-prompt textarea").input_value()
    generate(page, f"A {prompt}", steps=3)
    expect(page.locator("#stage .chip.adapter")).to_have_text(["orange-content 1", "orange-style 0.5"], timeout=60_000)


def test_a_killed_worker_leaves_an_interrupted_run_that_resumes(
    page: Page, server: Server, tmp_path: Path, shots: Path
) -> None:
    picture = a_picture(tmp_path / "killed.png")
    start_training(page, picture, "killed", steps=100_000, sample_every=0, checkpoint_every=2)
    expect(page.locator("#train-live .numbers")).to_contain_text("/ 100000", timeout=90_000)
    job = server.store.jobs(kind="train")[0]
    wait_for_checkpoint(job.folder / "checkpoint")
    owner = server.store.worker(server.store.job(job.id).device)
    assert owner is not None
    os.kill(pid_of(owner), signal.SIGKILL)
    began = time.monotonic()
    expect(page.locator("#train-live .run[data-state=interrupted]")).to_be_visible(timeout=10_000)
    assert time.monotonic() - began < 5.0
    toast(page, "ended before it was done")
    open_tab(page, "Runs")
    row = page.locator(f"#runs .run-row[data-job='{job.id}']")
    expect(row).to_contain_text("interrupted")
    row.click()
    expect(page.locator("#run-detail")).to_contain_text("Interrupted")
    close_toasts(page)
    page.screenshot(path=shots / "runs.png")
    page.locator("#run-detail [data-act=resume]").click()
    expect(page.locator("#run-detail .notice", has_text="Going on after step")).to_be_visible(timeout=90_000)
    expect(page.locator("#run-detail .detail[data-state=running]")).to_be_visible()

    open_tab(page, "Train")
    page.locator("#train-stop").click()
    expect(page.locator("#train-live .run[data-state=stopped]")).to_contain_text("checkpoint is kept", timeout=10_000)
    expect(page.locator("#train-live [data-act=resume]")).to_be_visible()


def wait_for_checkpoint(folder: Path) -> None:
    end = time.monotonic() + 60
    while not (folder.is_dir() and any(folder.iterdir())):
        assert time.monotonic() < end, "no checkpoint was written"
        time.sleep(0.1)


def test_training_without_a_picture_is_told_in_a_toast(page: Page) -> None:
    open_tab(page, "Train")
    setting(page, "name", "nothing", "train")
    page.locator("#train-start").click()
    toast(page, "exactly one picture")


def test_a_caption_is_kept_and_a_recipe_brings_its_own_form(page: Page, server: Server, tmp_path: Path) -> None:
    open_tab(page, "Train")
    page.get_by_label("LoRA from a folder of pictures").click()
    expect(page.locator("#lora-steps")).to_be_visible()
    expect(page.locator("#blora-steps")).to_be_hidden()
    drop(page, a_picture(tmp_path / "one.png"))
    page.get_by_label("Caption of one.png").fill("an orange ball")
    drop(page, a_picture_of_another_colour(tmp_path / "two.png"))
    expect(page.locator("#train-pictures .sheet-row")).to_have_count(2)
    expect(page.get_by_label("Caption of one.png")).to_have_value("an orange ball")
    setting(page, "name", "captioned", "train")
    setting(page, "steps", 2, "lora")
    setting(page, "sample_every", 0, "lora")
    page.locator("#train-start").click()
    expect(page.locator("#train-live .run-head")).to_contain_text("captioned")
    request = server.store.jobs(kind="train")[0].request
    assert isinstance(request, TrainRequest)
    assert [picture.caption for picture in request.pictures] == ["an orange ball", ""]
    expect(page.locator("#train-live .run[data-state=done]")).to_be_visible(timeout=200_000)


def a_picture_of_another_colour(path: Path) -> Path:
    Image.new("RGB", (96, 96), "teal").save(path)
    return path
