"""The report card: a model that draws what it is asked for gets full marks, one that does not gets none."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from bench_fakes import PALETTE, FakeJudge, FakePictures, disc
from intarsia.app.evaluation import instruments, prompts
from intarsia.app.evaluation.bench import Place
from intarsia.app.evaluation.benches.base import BENCH, BaseOptions
from intarsia.app.evaluation.layouts import pasted
from intarsia.app.evaluation.records import Records
from intarsia.app.settings import Home
from intarsia.pipelines import batch
from intarsia.pipelines.errors import InputError
from intarsia.pipelines.events import CancelToken
from intarsia.pipelines.headers import read_header
from intarsia.pipelines.judge import Embedded
from intarsia.pipelines.models import Resident
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

KNOWN, HIDDEN = PALETTE[:6], PALETTE[6:]
OPTIONS = BaseOptions(held_in=12, held_out=6, scenes=8)


class Judge(FakeJudge):
    """Knows all ten styles by name, but tells only two of them apart."""

    styles = prompts.STYLES  # type: ignore[assignment]

    def style_scores(self, seen: Embedded) -> Tensor:
        scores = torch.full((len(seen), len(self.styles)), -1.0)
        inked = seen.style[:, 1] > seen.style[:, 0]
        scores[:, self.styles.index("noto")] = (~inked).float()
        scores[:, self.styles.index("fluent-3d")] = inked.float()
        return scores


class Pictures(FakePictures):
    def __init__(self) -> None:
        super().__init__()
        self.rows = tuple(replace(row, split="train" if row.content in KNOWN else "held-out") for row in self.rows)


def wanted(prompt: str) -> Image.Image:
    """The picture a prompt asks for."""
    contents, style = re.findall(r"(?:^an? | an? )(\w+)", prompt), prompt.rsplit(", ", 1)[1].removesuffix(" style")
    if len(contents) == 1:
        return disc(contents[0], style, 128)
    arrangement = next(a for a in prompts.RELATIONS if a.words.replace("{0}", "").replace("{1}", "").strip() in prompt)
    return pasted([disc(content, style) for content in contents], arrangement.boxes, (128, 128))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A bench whose instruments are quick, and whose model is somebody's guess in `draw`."""

    def st_lpips(one: Sequence[Image.Image], other: Sequence[Image.Image]) -> Tensor:
        return torch.full((len(one),), 0.25)

    def lite0(pictures: Sequence[Image.Image]) -> Tensor:
        return torch.ones(len(pictures), 4).cumsum(0)

    monkeypatch.setattr(instruments, "st_lpips", st_lpips)
    monkeypatch.setattr(instruments, "lite0", lite0)
    model = SimpleNamespace(
        source=SimpleNamespace(path=None), native_size=(128, 128), device=SimpleNamespace(type="cpu"), components={}
    )
    records = Records(tmp_path / "records.jsonl", {"options": {"seed": 0}})
    pictures, judge = cast(Any, Pictures()), cast(Any, Judge())
    return Place(tmp_path, Home(tmp_path / "home"), pictures, cast(Any, model), judge, records, CancelToken())


def measured(
    place: Place,
    draw: Any,  # noqa: ANN401 - prompt to picture
    monkeypatch: pytest.MonkeyPatch,
    options: BaseOptions = OPTIONS,
) -> dict[str, Any]:
    def render_many(model: object, texts: Sequence[str], seeds: Sequence[int], **_: object) -> Iterator[Image.Image]:
        assert len(texts) == len(seeds)
        return map(draw, texts)

    monkeypatch.setattr(batch, "render_many", render_many)
    assert list(BENCH.run(options, place))
    summary = BENCH.summarise(options, place)
    assert all(path.is_file() for sheet in summary.sheets for path in sheet.paths)
    return dict(summary.figures)


def test_a_model_that_draws_what_it_is_asked_for_gets_full_marks(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(place, wanted, monkeypatch)
    for name in ("held_in_top1", "held_out_top1", "scene_present", "scene_placed", "pasted_placed"):
        assert found[name] == 1, name
    assert found["frechet_real"] == pytest.approx(0, abs=1e-6)
    assert found["nearest_real"] == found["variety_same"] == 0.25


def test_exchanging_the_places_costs_the_place_alone(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def exchanged(prompt: str) -> Image.Image:
        return wanted(prompt).rotate(180)

    found = measured(place, exchanged, monkeypatch)
    assert found["scene_present"] == 1 and found["scene_placed"] == 0 and found["held_in_top1"] == 1


def test_a_model_that_always_draws_the_same_gets_next_to_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def same(prompt: str) -> Image.Image:
        return disc("red", "noto", 128)

    found = measured(place, same, monkeypatch)
    assert found["held_in_top1"] <= 1 / len(KNOWN) + 0.01 and found["held_out_top1"] == 0 == found["scene_present"]


def test_what_was_measured_is_not_drawn_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measured(place, wanted, monkeypatch)

    def forbidden(prompt: str) -> Image.Image:
        raise AssertionError(prompt)

    assert measured(place, forbidden, monkeypatch) == first


def test_an_adapter_is_measured_with_the_model_and_let_go(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.model = Resident().get("mini")
    hooks = [module._forward_hooks for module in place.model.components["unet"].modules()]
    file = tmp_path / "fast.safetensors"
    file.write_bytes(files("intarsia.assets").joinpath("adapters/mini-fast.safetensors").read_bytes())

    def draw(prompt: str) -> Image.Image:
        assert any(hooks)
        return wanted(prompt)

    options = BaseOptions(held_in=2, held_out=0, scenes=0, adapter=f"{file}:0.5")
    measured(place, draw, monkeypatch, options)
    assert not any(hooks)
    save_file({key: value + 1 for key, value in load_file(file).items()}, file, dict(read_header(file).metadata))
    with pytest.raises(InputError, match="not the file these records were made with"):
        list(BENCH.run(options, place))


def test_a_models_card_says_what_it_was_taught(tmp_path: Path) -> None:
    source = cast(Any, SimpleNamespace(path=tmp_path))
    assert prompts.taught(source, ["cat", "dog"]) == ("cat", "dog")
    (tmp_path / "card.json").write_text(json.dumps({"contents": ["dog", "a thing nobody knows"]}))
    assert prompts.taught(source, ["cat", "dog"]) == ("dog",)


def test_every_pair_is_asked_for_before_any_comes_twice() -> None:
    asked = prompts.singles("held-in", KNOWN, 70, seed=3)
    assert len({(one.contents, one.style) for one in asked[:60]}) == 60 and len({one.key for one in asked}) == 70
    assert asked == prompts.singles("held-in", KNOWN, 70, seed=3) != prompts.singles("held-in", KNOWN, 70, seed=4)
