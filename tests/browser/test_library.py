"""The library in a real browser: files come in by a drop, are told apart, used and removed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from adapter_files import attention, kohya, lora, write
from browser_steps import drop, generate, open_tab, toast
from intarsia.pipelines.sources import resolve, unet_shapes
from playwright.sync_api import Page, expect


def kohya_file(path: Path) -> tuple[Path, int]:
    """Write a LoRA for Mini's attention layers with kohya's names; gives the file and its number of modules.

    The numbers follow from the name: the library keeps equal files once.
    """
    shapes = attention(unet_shapes(resolve("mini")))
    layers = {name.removesuffix(".weight"): shape for name, shape in shapes.items()}
    return write(path, lora(layers, kohya, rank=4, alpha=4.0, seed=sum(path.name.encode()), scale=0.05)), len(layers)


def test_a_dropped_kohya_file_shows_its_module_count_and_can_be_used(page: Page, tmp_path: Path) -> None:
    file, modules = kohya_file(tmp_path / "lichen-painting.safetensors")
    open_tab(page, "Library")
    drop(page, file)
    card = page.locator("#library .card[data-name=lichen-painting]")
    expect(card).to_contain_text(f"{modules} of {modules} modules matched")
    expect(card).to_contain_text("rank 4")
    card.locator("[data-act=use]").click()
    expect(page.locator("#rack .use")).to_contain_text("lichen-painting")
    page.locator("#rack .exact").fill("0.6")
    page.locator("#rack .exact").blur()
    generate(page, "a key with an adapter", steps=2)
    expect(page.locator("#stage .chip.adapter")).to_have_text(["lichen-painting 0.6"], timeout=60_000)
    page.get_by_label("Remove lichen-painting").click()
    expect(page.locator("#rack .use")).to_have_count(0)

    open_tab(page, "Library")
    card.locator("[data-act=remove]").click()
    expect(card).to_have_count(0)
    toast(page, "lichen-painting is in the trash")


def test_a_file_dropped_on_generate_enters_library_and_rack(page: Page, tmp_path: Path) -> None:
    file, modules = kohya_file(tmp_path / "dropped-here.safetensors")
    drop(page, file)
    toast(page, f"{modules} of {modules} modules matched")
    expect(page.locator("#rack .use")).to_contain_text("dropped-here")


def test_refused_files_are_told_with_their_reason_and_good_ones_still_come_in(page: Page, tmp_path: Path) -> None:
    pickle = tmp_path / "old.ckpt"
    pickle.write_bytes(b"\x80\x02}q\x00.")
    foreign = write(
        tmp_path / "foreign.safetensors",
        {"lora_unet_down_blocks_0_attentions_0.hada_w1_a": np.ones((4, 4), np.float32)},
    )
    good, _ = kohya_file(tmp_path / "good-one.safetensors")
    open_tab(page, "Library")
    drop(page, pickle, foreign, good)
    toast(page, "old.ckpt")
    toast(page, "foreign.safetensors")
    expect(page.locator("#library .card[data-name=good-one]")).to_be_visible()
    assert page.locator("#library .card", has_text="foreign").count() == 0


def test_names_from_files_are_shown_as_text(page: Page, tmp_path: Path) -> None:
    shapes = attention(unet_shapes(resolve("mini")))
    layers = {name.removesuffix(".weight"): shape for name, shape in shapes.items()}
    trigger = "<img src=x onerror=window.pwned=1>"
    metadata = {"modelspec.trigger_phrase": trigger, "ss_output_name": trigger}
    file = write(tmp_path / "evil.safetensors", lora(layers, kohya, rank=2, seed=9), metadata)
    open_tab(page, "Library")
    drop(page, file)
    expect(page.locator("#library .card[data-name=evil]")).to_be_visible()
    page.locator("#library .card[data-name=evil] [data-act=use]").click()
    expect(page.locator("#rack .use")).to_contain_text("evil")
    assert page.evaluate("window.pwned") is None
