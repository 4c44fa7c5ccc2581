"""Pictures: what is opened and how, what is refused, and settings that come back."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from intarsia.pipelines import a1111
from intarsia.pipelines.errors import InputError
from intarsia.pipelines.picture import open_picture, read_settings, write_png
from intarsia.pipelines.requests import AdapterUse, GenerateRequest
from PIL import Image, PngImagePlugin

REQUEST = GenerateRequest(
    prompt="a red apple, twemoji style",
    negative="text: no, blur",
    seed=7,
    steps=12,
    guidance=4.5,
    width=64,
    height=48,
    scheduler="dpmpp_2m_karras",
    adapters=(AdapterUse(adapter="cat-style", weight=0.5, sha256="ab" * 32),),
)


def noise(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8))


def test_the_same_request_gives_the_same_bytes(tmp_path: Path) -> None:
    first = write_png(noise(), tmp_path / "a.png", REQUEST).read_bytes()
    assert write_png(noise(), tmp_path / "b.png", REQUEST).read_bytes() == first
    other = write_png(noise(), tmp_path / "c.png", REQUEST.model_copy(update={"seed": 8})).read_bytes()
    assert other != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "c.png"]


def test_our_own_settings_come_back_whole(tmp_path: Path) -> None:
    restored = read_settings(write_png(noise(), tmp_path / "a.png", REQUEST))
    assert restored.request == REQUEST
    assert restored.notes == ()


def test_other_letters_survive_in_both_chunks(tmp_path: Path) -> None:
    request = GenerateRequest(prompt="яблоко 苹果, été", seed=1)
    path = write_png(noise(), tmp_path / "a.png", request)
    assert read_settings(path).request == request
    with Image.open(path) as picture:
        picture.load()
        assert a1111.read(str(picture.info["parameters"])).request.prompt == request.prompt


def test_what_others_read_says_the_same(tmp_path: Path) -> None:
    with Image.open(write_png(noise(), tmp_path / "a.png", REQUEST)) as picture:
        text = str(picture.info["parameters"])
    lines = text.split("\n")
    assert lines[0] == "a red apple, twemoji style <lora:cat-style:0.5>"
    assert lines[1] == "Negative prompt: text: no, blur"
    assert lines[2].startswith("Steps: 12, Sampler: DPM++ 2M Karras, CFG scale: 4.5, Seed: 7, Size: 64x48")
    assert 'Lora hashes: "cat-style: abababababab"' in lines[2]
    restored = a1111.read(text).request
    assert restored.model_copy(update={"adapters": ()}) == REQUEST.model_copy(update={"adapters": ()})
    assert restored.adapters[0].weight == 0.5


A1111 = """\
masterpiece, a cat <lora:Ink Style:0.8>, <lora:bad:99>
second line
Negative prompt: ugly, "quoted"
more ugly
Steps: 30, Sampler: DPM++ 2M SDE, Schedule type: Karras, CFG scale: 7, Seed: 12345, Size: 512x768, \
Model hash: 6ce0161689, Model: some, VAE hash: 63aeecb90f, Clip skip: 2, \
Lora hashes: "Ink Style: e3b0c44298fc, bad: 1234567890ab", Version: v1.9.4"""


def test_settings_of_a1111_come_back_with_notes_on_the_rest() -> None:
    restored = a1111.read(A1111)
    request = restored.request
    assert request.prompt.startswith("masterpiece, a cat") and "second line" in request.prompt
    assert "lora" not in request.prompt
    assert request.negative == 'ugly, "quoted"\nmore ugly'
    assert (request.steps, request.guidance, request.seed) == (30, 7.0, 12345)
    assert (request.width, request.height) == (512, 768)
    assert request.adapters == (AdapterUse(adapter="Ink Style", weight=0.8),)
    notes = "\n".join(restored.notes)
    for words in ("DPM++ 2M SDE Karras", "empty file", "the model some", "VAE hash, Clip skip", "weight 99"):
        assert words in notes


def test_values_that_are_not_possible_here_are_told_not_taken() -> None:
    restored = a1111.read("a cat\nSteps: 900, Sampler: Euler a, CFG scale: 99, Seed: -5, Size: 513x512")
    assert restored.request == GenerateRequest(prompt="a cat", scheduler="euler_ancestral")
    assert len(restored.notes) == 4


def test_a_last_line_with_two_pairs_is_still_prompt() -> None:
    assert a1111.read("a cat\nstyle: ink, mood: calm").request.prompt == "a cat\nstyle: ink, mood: calm"


def test_exif_of_a_jpeg_is_read(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "a cat\nSteps: 5, Sampler: DDIM, Seed: 3".encode("utf-16-be")
    noise().save(tmp_path / "a.jpg", exif=exif)
    restored = read_settings(tmp_path / "a.jpg").request
    assert (restored.prompt, restored.steps, restored.scheduler) == ("a cat", 5, "ddim")


def test_pictures_without_settings_and_newer_settings_are_told(tmp_path: Path) -> None:
    noise().save(tmp_path / "plain.png")
    with pytest.raises(InputError, match="carries no settings"):
        read_settings(tmp_path / "plain.png")
    info = PngImagePlugin.PngInfo()
    chunk = {"version": 9, "request": REQUEST.model_dump(mode="json") | {"swirl": 3}, "packages": {"torch": "0.1"}}
    info.add_text("intarsia", json.dumps(chunk))
    noise().save(tmp_path / "new.png", pnginfo=info)
    restored = read_settings(tmp_path / "new.png")
    assert restored.request == REQUEST
    assert "swirl" in restored.notes[0] and "torch 0.1" in restored.notes[1]
    info = PngImagePlugin.PngInfo()
    info.add_text("intarsia", "{}")
    noise().save(tmp_path / "broken.png", pnginfo=info)
    with pytest.raises(InputError, match="damaged"):
        read_settings(tmp_path / "broken.png")


def test_broken_files_are_told_apart(tmp_path: Path) -> None:
    raw = write_png(noise(), tmp_path / "whole.png", REQUEST).read_bytes()
    files = {"empty.png": b"", "cut.png": raw[: len(raw) // 2], "text.png": b"hello there"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    words = {"nope.png": "no picture", "empty.png": "is empty", "cut.png": "cut off", "text.png": "not a picture"}
    for name, word in words.items():
        with pytest.raises(InputError, match=word) as caught:
            open_picture(tmp_path / name)
        assert caught.value.hint
    with pytest.raises(InputError, match="is a folder"):
        open_picture(tmp_path)
    assert open_picture(raw).size == (64, 48)


def test_two_hundred_megapixels_are_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (20_000, 10_000)).save(tmp_path / "large.png")
    Image.new("1", (9_000, 8_000)).save(tmp_path / "less.png")

    def load(self: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    for name in ("large.png", "less.png"):
        with pytest.raises(InputError, match="pixels"):
            open_picture(tmp_path / name)


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_animations_are_refused(tmp_path: Path, ending: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match="animation of 3 frames"):
        open_picture(tmp_path / f"a.{ending}")


def test_every_mode_becomes_upright_rgb_on_white(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "ink.jpg", quality=100)
    assert np.abs(np.array(open_picture(tmp_path / "ink.jpg").getpixel((0, 0))) - (255, 0, 0)).max() <= 2

    deep = np.full((4, 6), 65535, np.uint16)
    deep[0] = 32768
    Image.fromarray(deep).save(tmp_path / "deep.png")
    grey = open_picture(tmp_path / "deep.png")
    assert (grey.getpixel((0, 0)), grey.getpixel((0, 2))) == ((128, 128, 128), (255, 255, 255))

    table = Image.new("P", (4, 4), 0)
    table.putpalette([255, 0, 0, 0, 255, 0])
    table.putpixel((1, 1), 1)
    table.save(tmp_path / "table.png", transparency=0)
    clear = open_picture(tmp_path / "table.png")
    assert (clear.getpixel((0, 0)), clear.getpixel((1, 1))) == ((255, 255, 255), (0, 255, 0))

    half = io.BytesIO()
    Image.new("RGBA", (2, 2), (0, 0, 0, 128)).save(half, "PNG")
    assert open_picture(half.getvalue()).getpixel((0, 0)) == (127, 127, 127)

    turned = Image.new("RGB", (8, 4))
    exif = turned.getexif()
    exif[0x112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    upright = open_picture(tmp_path / "turned.jpg")
    assert (upright.size, upright.mode) == ((4, 8), "RGB")
