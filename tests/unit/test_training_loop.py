"""The training loop: targets, encodings, exact resumption, checkpoints, learning, and what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from intarsia.pipelines.errors import InputError
from intarsia.pipelines.events import Artifact, Cancelled, CancelToken, Event
from intarsia.pipelines.models import Resident
from intarsia.pipelines.requests import TrainingPicture
from intarsia.training import checkpoint, layers
from intarsia.training.encode import encode_pixels, encode_prompts
from intarsia.training.recipe import ModelFacts, recipes
from intarsia.training.recipes.blora import BLora
from intarsia.training.recipes.lora import LoraOptions, min_snr_weight
from intarsia.training.run import train
from intarsia.training.schedule import NoiseSchedule
from PIL import Image
from training_fakes import (
    Tiny,
    adapters,
    assert_equal,
    held_out,
    load,
    losses,
    picture,
    request,
    run,
    snapshot,
    trainer_for,
)

# Targets and weights


def test_v_target_is_the_derivative_along_the_circle_from_picture_to_noise() -> None:
    clean, noise = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    angles = torch.tensor([0.3, 0.3 + 1e-6, 1.2, 1.2 + 1e-6], dtype=torch.float64)
    schedule = NoiseSchedule(angles.cos().square(), "v_prediction")

    def at(index: int) -> torch.Tensor:
        return schedule.noised(clean, noise, torch.tensor([index]))

    for index in (0, 2):
        slope = (at(index + 1) - at(index)) / 1e-6
        assert torch.allclose(schedule.target(clean, noise, torch.tensor([index])), slope, atol=1e-5)


def test_a_schedule_with_zero_terminal_snr_ends_in_noise_and_its_target_is_minus_the_picture(tiny: Tiny) -> None:
    schedule = NoiseSchedule.of(load(tiny("sdxl", variant="vpred")).components["scheduler"], torch.device("cpu"))
    assert schedule.kind == "v_prediction" and len(schedule.alphas) == 1000
    clean, noise, last = torch.randn(1, 2, 2, 2), torch.randn(1, 2, 2, 2), torch.tensor([999])
    assert torch.equal(schedule.noised(clean, noise, last), noise)
    assert torch.equal(schedule.target(clean, noise, last), -clean)
    assert schedule.snr(last) == 0 and torch.isfinite(schedule.snr(torch.arange(1000))).all()


def test_min_snr_weights_follow_the_paper_and_never_divide_by_zero() -> None:
    snr = torch.tensor([0.0, 0.5, 5.0, 50.0])
    by_hand = {"epsilon": [1, 1, 1, 0.1], "v_prediction": [0, 0.5 / 1.5, 5 / 6, 5 / 51], "sample": [0, 0.5, 5, 5]}
    for kind, expected in by_hand.items():
        assert min_snr_weight(snr, 5.0, kind).tolist() == pytest.approx(expected)  # pyright: ignore[reportArgumentType]


def test_min_snr_changes_the_loss_and_zero_leaves_it_plain() -> None:
    recipe, rng = recipes()["lora"], torch.Generator()
    prediction, target, snr = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2), torch.tensor([1.0, 50.0])
    assert float(recipe.loss(prediction, target, snr, LoraOptions(), rng)) == 1.0
    assert float(recipe.loss(prediction, target, snr, LoraOptions(min_snr=5), rng)) == pytest.approx(0.55)


# Encodings


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_prompts_are_encoded_as_the_plain_pipeline_does(family: str, tiny: Tiny) -> None:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    pipeline: Any = DiffusionPipeline.from_pretrained(tiny(family))
    expected = pipeline.encode_prompt(
        "a red cat", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    (text,), cut = encode_prompts(load(tiny(family)).components, ["a red cat"])
    assert torch.allclose(text.tokens, expected[0][0], atol=1e-5) and not cut
    if family == "sdxl":
        assert text.pooled is not None and torch.allclose(text.pooled, expected[2][0], atol=1e-5)
    assert encode_prompts(load(tiny(family)).components, ["cat " * 100])[1] == ["cat " * 100]


@pytest.mark.parametrize("variant", ["", "vpred"])
def test_latents_are_what_the_pipeline_would_decode(variant: str, tiny: Tiny) -> None:
    vae = load(tiny("sdxl", variant=variant)).components["vae"]
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, deviation = encode_pixels(vae, pixels)
    output = vae.encode(pixels)
    if variant:
        assert deviation is None and torch.allclose(mean, output.latents, atol=1e-5)
    else:
        assert torch.allclose(mean, output.latent_dist.mean * 0.13025, atol=1e-5)
        assert deviation is not None and torch.allclose(deviation, output.latent_dist.std * 0.13025, atol=1e-5)
    vae.to(torch.bfloat16)
    assert encode_pixels(vae, pixels)[0].dtype == torch.float32 and vae.dtype == torch.bfloat16


def test_a_turned_photo_is_learned_upright(tiny: Tiny, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    Image.new("RGB", (120, 60)).save(tmp_path / "turned.jpg", exif=exif)
    model = load(tiny("sdxl"))
    with trainer_for(request("blora", [tmp_path / "turned.jpg"], resolution=96), model) as trainer:
        width, height = trainer.task.cache.examples[0].size
        assert (width, height) == (64, 128)
        assert trainer.task.cache.examples[0].time_ids[0].tolist()[4:] == [height, width]


# Layers


def test_blora_trains_exactly_the_attention_of_its_two_blocks(tiny: Tiny, tmp_path: Path) -> None:
    model = load(tiny("sdxl"))
    made = adapters(run(request("blora", [picture(tmp_path / "a.png")], steps=1), model, tmp_path / "job"))
    for label, block in (("thing-content", 0), ("thing-style", 1)):
        names = {name.removeprefix("unet.").rsplit(".lora_", 1)[0] for name in made[label]}
        expected = {
            name
            for name, module in model.denoiser.named_modules()
            if isinstance(module, torch.nn.Linear)
            and name.startswith(f"up_blocks.0.attentions.{block}.")
            and name.rsplit(".attn", 1)[-1][2:] in ("to_q", "to_k", "to_v", "to_out.0")
        }
        assert names == expected and len(names) == 2 * 8  # two transformer layers, eight linears each


def test_blora_does_not_take_attentions_10_for_1() -> None:
    path = "up_blocks.0.attentions.{}.transformer_blocks.0.attn1.to_q"
    layers = {path.format(index): (64, 64) for index in (0, 1, 2, 10)}
    assert set(BLora().targets("sdxl", layers, BLora.options())) == {path.format(0), path.format(1)}
    with pytest.raises(InputError, match="lacks the two attention blocks"):
        BLora().targets("sdxl", {path.format(2): (64, 64)}, BLora.options())


def test_two_names_get_two_placeholders_and_the_caption_is_not_used() -> None:
    recipe, options = BLora(), BLora.options()
    triggers = {recipe.trigger(name, options) for name in ("cat", "dog", "tree", "cup")}
    assert len(triggers) == 4
    word = recipe.trigger("cat", options)
    assert recipe.prompts("cat", (TrainingPicture(path="a", caption="a cat"),), options) == (f"A {word}",)


def test_feed_forward_layers_join_on_request(tiny: Tiny, tmp_path: Path) -> None:
    model = load(tiny("sd15"))
    paths = [picture(tmp_path / "a.png")]
    fewer = adapters(run(request("lora", paths, steps=1), model, tmp_path / "one"))["thing"]
    more = adapters(run(request("lora", paths, steps=1, layers="attention+feed-forward"), model, tmp_path / "two"))
    added = set(more["thing"]) - set(fewer)
    assert added and all(".ff.net." in name for name in added)


# Learning


@pytest.mark.parametrize("recipe", ["blora", "lora"])
def test_training_lowers_the_loss_of_its_picture_at_noises_it_has_not_seen(
    recipe: str, tiny: Tiny, tmp_path: Path
) -> None:
    model = load(tiny("sdxl", variant="vpred"))
    asked = request(recipe, [picture(tmp_path / "a.png")], steps=80, learning_rate=0.01)
    with trainer_for(asked, model) as trainer:
        base = held_out(trainer)
        for number in range(80):
            trainer.step(number)
        assert held_out(trainer) < 0.9 * base


# Resumption


HARD = {"batch": 2, "flip": True, "crop": "random", "caption_dropout": 0.5, "warmup": 2, "min_snr": 5.0}


@pytest.mark.parametrize(("recipe", "more"), [("blora", {}), ("lora", HARD)])
def test_resuming_gives_every_weight_exactly(recipe: str, more: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    model = load(tiny("sdxl"))
    count = 1 if recipe == "blora" else 5
    paths = [picture(tmp_path / f"{i}.png", (64 + 32 * (i % 2), 64), seed=i) for i in range(count)]
    asked = request(recipe, paths, steps=5, checkpoint_every=3, **more)
    whole = run(asked, model, tmp_path / "whole")
    rest = run(asked.model_copy(update={"resume_from": str(tmp_path / "whole")}), load(tiny("sdxl")), tmp_path / "rest")
    assert losses(rest) == losses(whole)[3:]
    assert_equal(adapters(whole), adapters(rest))


def test_a_stopped_run_keeps_its_step_and_goes_on_exactly(tiny: Tiny, tmp_path: Path) -> None:
    model = load(tiny("sdxl"))
    asked = request("blora", [picture(tmp_path / "a.png")], steps=6)
    whole = run(asked, model, tmp_path / "whole")
    token, seen = CancelToken(), list[Event]()
    with pytest.raises(Cancelled):
        for event in train(asked, model, tmp_path / "stopped", token):
            seen.append(event)
            if len(losses(seen)) == 2:
                token.cancel()
    assert isinstance(seen[-1], Artifact) and (seen[-1].kind, seen[-1].step) == ("checkpoint", 2)
    assert checkpoint.resumable(tmp_path / "stopped")
    rest = run(asked.model_copy(update={"resume_from": str(tmp_path / "stopped")}), model, tmp_path / "rest")
    assert losses(seen) + losses(rest) == losses(whole)
    assert_equal(adapters(whole), adapters(rest))


def test_a_stop_before_the_first_step_keeps_nothing(tiny: Tiny, tmp_path: Path) -> None:
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        run(request("blora", [picture(tmp_path / "a.png")]), load(tiny("sdxl")), tmp_path / "job", token)
    assert not (tmp_path / "job" / "checkpoint").exists()


@pytest.mark.parametrize("change", ["seed", "picture", "rank", "model"])
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(change: str, tiny: Tiny, tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    asked = request("blora", [path], checkpoint_every=2)
    run(asked, load(tiny("sdxl")), tmp_path / "job")
    model = load(tiny("sdxl", seed=1) if change == "model" else tiny("sdxl"))
    if change == "seed":
        asked = asked.model_copy(update={"seed": 9})
    if change == "rank":
        asked = asked.model_copy(update={"options": asked.options | {"rank": 2}})
    if change == "picture":
        picture(path, seed=2)
    named = {"picture": "pictures", "rank": "options"}.get(change, change)
    before = snapshot(model)["modules"]
    with pytest.raises(InputError, match=rf"these differ: {named}\."):
        run(asked.model_copy(update={"resume_from": str(tmp_path / "job")}), model, tmp_path / "again")
    assert snapshot(model)["modules"] == before


def test_missing_and_damaged_checkpoints_are_named(tiny: Tiny, tmp_path: Path) -> None:
    model = load(tiny("sdxl"))
    asked = request("blora", [picture(tmp_path / "a.png")], checkpoint_every=2)
    again = asked.model_copy(update={"resume_from": str(tmp_path / "job")})
    with pytest.raises(InputError, match="no checkpoint in"):
        run(again, model, tmp_path / "again")
    run(asked, model, tmp_path / "job")
    (weights,) = (tmp_path / "job" / "checkpoint").glob("step-*/weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged"):
        run(again, model, tmp_path / "again")


def test_a_checkpoint_holds_no_pickle_and_only_the_last_state(tiny: Tiny, tmp_path: Path) -> None:
    run(request("blora", [picture(tmp_path / "a.png")], checkpoint_every=1), load(tiny("sdxl")), tmp_path / "job")
    folder = tmp_path / "job" / "checkpoint"
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    state = json.loads((tmp_path / "job/checkpoint/state.json").read_text())
    assert state["step"] == 4
    assert files == ["state.json", "step-0000004/moments.safetensors", "step-0000004/weights.safetensors"]


# Defaults


@pytest.mark.parametrize(
    ("width", "size", "expected"), [(1280, 1024, (5e-5, 1000, 64, 1.0)), (160, 256, (4e-4, 300, 40, 1.0))]
)
def test_blora_uses_the_papers_values_on_sdxl_and_scales_them_for_small_models(
    width: int, size: int, expected: tuple[float, ...]
) -> None:
    path = "up_blocks.0.attentions.{}.transformer_blocks.0.attn1.to_q"
    known = ModelFacts("sdxl", {path.format(i): (width, width) for i in (0, 1)}, width, size, 1)
    chosen = BLora().settings(known, BLora.options())
    assert (chosen.learning_rate, chosen.steps, max(chosen.ranks.values()), chosen.scale) == expected
    assert any("Rank" in text for text in chosen.notices) == (width == 160)


@pytest.mark.parametrize("few", [1024, 1])
def test_plain_attention_gives_the_same_and_is_taken_off_again(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "FEW", few)
    unet = Resident().get("mini").denoiser.float()
    x, states = torch.randn(1, 8, 8, 8), torch.randn(1, 5, 256)
    added = {"text_embeds": torch.randn(1, 192), "time_ids": torch.ones(1, 6)}

    def drawn() -> torch.Tensor:
        with torch.no_grad():
            return unet(x, 500, states, added_cond_kwargs=added).sample

    before, fused = dict(unet.attn_processors), drawn()
    with pytest.raises(KeyError), layers.plain_attention(unet):
        assert all(isinstance(processor, layers.SmallPlain) for processor in unet.attn_processors.values())
        assert torch.allclose(drawn(), fused, atol=1e-4)
        raise KeyError
    assert unet.attn_processors == before and torch.equal(drawn(), fused)
