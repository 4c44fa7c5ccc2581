"""What every training recipe promises; a new file in training/recipes is tested here without a new line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from intarsia.pipelines.adapter_types import LowRank
from intarsia.pipelines.errors import InputError
from intarsia.pipelines.events import Artifact, Cancelled, CancelToken
from intarsia.pipelines.models import Model
from intarsia.pipelines.options import describe
from intarsia.pipelines.requests import TrainingPicture
from intarsia.training.layers import linear_layers
from intarsia.training.recipe import ModelFacts, recipes
from intarsia.training.run import train
from safetensors.torch import load_file
from training_fakes import Tiny, assert_same, load, losses, picture, request, run, snapshot

RECIPES = sorted(recipes())


def facts(model: Model, family: str = "sdxl") -> ModelFacts:
    return ModelFacts(family, linear_layers(model.denoiser), 32, 64, 1)


@pytest.mark.parametrize("name", RECIPES)
def test_options_survive_json(name: str) -> None:
    kind = recipes()[name].options
    changed = kind.parse({"steps": 7, "learning_rate": 0.25, "rank": 3, "sample_prompt": "é"})
    assert kind.from_json(changed.to_json()) == changed != kind()


@pytest.mark.parametrize("name", RECIPES)
def test_every_number_has_bounds_and_they_are_kept(name: str) -> None:
    kind = recipes()[name].options
    for info in describe(kind):
        assert info.label and info.kind != "other"
        if info.kind in ("int", "float"):
            assert info.low is not None and info.high is not None, info.name
            for outside in (info.low - 1, info.high + 1):
                with pytest.raises(InputError, match=re.escape(info.label)):
                    kind.parse({info.name: outside})


@pytest.mark.parametrize("name", RECIPES)
def test_describe_lists_every_option_and_unknown_ones_are_refused(name: str) -> None:
    kind = recipes()[name].options
    assert [info.name for info in describe(kind)] == list(kind.model_fields)
    with pytest.raises(InputError, match="no setting called rang"):
        kind.parse({"rang": 4})


@pytest.mark.parametrize("name", RECIPES)
def test_targets_are_real_layers_with_possible_ranks(name: str, tiny: Tiny) -> None:
    recipe = recipes()[name]
    for family in recipe.families:
        layers = linear_layers(load(tiny(family)).denoiser)
        targets = recipe.targets(family, layers, recipe.options(rank=512))
        assert targets and set(targets) <= set(layers)
        assert all(1 <= rank <= min(layers[path]) for path, rank in targets.items())


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("family", ["sd3", "flux1"])
def test_other_families_are_refused_by_name(name: str, family: str) -> None:
    recipe = recipes()[name]
    with pytest.raises(InputError, match=family):
        recipe.targets(family, {"transformer_blocks.0.attn.to_q": (8, 8)}, recipe.options())


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_left_open_is_chosen_and_said(name: str, tiny: Tiny) -> None:
    recipe = recipes()[name]
    known = facts(load(tiny("sdxl")))
    chosen = recipe.settings(known, recipe.options())
    assert chosen.steps >= 1 and chosen.learning_rate > 0 and chosen.resolution == 64
    said = " ".join(chosen.notices)
    assert str(chosen.steps) in said and f"{chosen.learning_rate:g}" in said and "ank" in said
    given = recipe.settings(known, recipe.options(steps=9, learning_rate=0.5, resolution=128, rank=2))
    assert (given.steps, given.learning_rate, given.resolution, given.notices) == (9, 0.5, 128, ())


@pytest.mark.parametrize("name", RECIPES)
def test_parts_hold_every_layer_once(name: str, tiny: Tiny) -> None:
    recipe = recipes()[name]
    targets = recipe.targets("sdxl", linear_layers(load(tiny("sdxl")).denoiser), recipe.options())
    layers = {f"unet.{path}": LowRank(torch.zeros(1, 2), torch.zeros(2, 1), 1.0) for path in targets}
    parts = recipe.parts(layers)
    assert sorted(path for part in parts.values() for path in part) == sorted(layers)
    assert all(parts.values())


@pytest.mark.parametrize("name", RECIPES)
def test_no_picture_is_refused(name: str) -> None:
    recipe = recipes()[name]
    with pytest.raises(InputError, match="picture"):
        recipe.check((), recipe.options())
    recipe.check((TrainingPicture(path="a.png"),), recipe.options())


@pytest.mark.parametrize("name", RECIPES)
def test_cancel_at_any_step_leaves_the_model_untouched(name: str, tiny: Tiny, tmp_path: Path) -> None:
    model = load(tiny("sdxl"))
    before = snapshot(model)
    asked = request(name, [picture(tmp_path / "a.png")], steps=3)
    everything = run(asked, model, tmp_path / "all")
    last = max(index for index, event in enumerate(everything) if event.type == "progress")
    for after in range(1, last, 2):
        token, folder = CancelToken(), tmp_path / str(after)
        events = train(asked, model, folder, token)
        for _ in range(after):
            next(events)
        token.cancel()
        with pytest.raises(Cancelled):
            list(events)
        assert_same(dict(before), snapshot(model))


@pytest.mark.parametrize("name", RECIPES)
def test_closing_the_generator_and_a_bug_leave_the_model_untouched(
    name: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny("sdxl"))
    before = snapshot(model)
    asked = request(name, [picture(tmp_path / "a.png")], save_memory=True)
    events = train(asked, model, tmp_path / "closed", CancelToken())
    assert any(event.type == "metric" for event in events)
    events.close()  # pyright: ignore[reportAttributeAccessIssue] - a generator
    assert_same(dict(before), snapshot(model))

    def broken(*given: object, **more: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(type(recipes()[name]), "loss", broken)
    with pytest.raises(ZeroDivisionError):
        run(asked, model, tmp_path / "broken")
    assert_same(dict(before), snapshot(model))


@pytest.mark.parametrize("name", RECIPES)
def test_same_seed_same_result_and_another_seed_another(name: str, tiny: Tiny, tmp_path: Path) -> None:
    model = load(tiny("sdxl"))
    asked = request(name, [picture(tmp_path / "a.png")])

    def result(folder: str, seed: int) -> tuple[list[float], list[bytes]]:
        events = run(asked.model_copy(update={"seed": seed}), model, tmp_path / folder)
        made = [Path(e.path) for e in events if isinstance(e, Artifact) and e.kind == "adapter"]
        tensors = [{key: tensor.numpy().tobytes() for key, tensor in load_file(path).items()} for path in made]
        assert tensors and all(tensors)
        return losses(events), [tensors[0][key] for key in sorted(tensors[0])]

    assert result("one", 3) == result("two", 3) != result("three", 4)


@pytest.mark.parametrize("name", RECIPES)
def test_saving_memory_changes_no_result(name: str, tiny: Tiny, tmp_path: Path) -> None:
    model = load(tiny("sdxl"))
    first = run(request(name, [picture(tmp_path / "a.png")]), model, tmp_path / "plain")
    second = run(request(name, [tmp_path / "a.png"], save_memory=True), model, tmp_path / "saving")
    assert losses(first) == pytest.approx(losses(second), rel=1e-5)


def test_recipes_import_without_torch() -> None:
    code = (
        "import sys; from intarsia.training.recipe import recipes; import intarsia.training.data; "
        "import intarsia.training.checkpoint; assert recipes(); "
        "print([name for name in ('torch', 'diffusers', 'peft', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
