"""Consistency distillation against data whose sampling path is known in closed form, and the sampler "lcm" by hand.

The data is one normal distribution per number (mean 2, deviation 0.5). Its exact network is linear, its sampling path
keeps (x - alpha mean) / sqrt(alpha^2 deviation^2 + s^2), and its exact consistency function follows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from intarsia.pipelines import schedule as samplers
from intarsia.pipelines.errors import InputError
from intarsia.pipelines.events import Artifact
from intarsia.pipelines.families import FAMILIES
from intarsia.pipelines.identify import inspect
from intarsia.pipelines.requests import TrainingPicture
from intarsia.pipelines.sources import resolve, unet_shapes
from intarsia.training import loop, mini
from intarsia.training.consistency import Consistency, guided, pseudo_huber, scalings
from intarsia.training.layers import plain_attention, trainable_layers
from intarsia.training.recipe import Ask, Moment, Prediction
from intarsia.training.recipes.lcm import RECIPE, LcmOptions
from intarsia.training.schedule import NoiseSchedule
from torch import Tensor
from training_fakes import Tiny, adapters, load, picture, request, run, trainer_for

MEAN, DEVIATION = 2.0, 0.5
CPU = torch.device("cpu")
KINDS: tuple[Prediction, ...] = ("epsilon", "v_prediction", "sample")


def minis() -> NoiseSchedule:
    """Mini's schedule: v-prediction, zero terminal SNR; in float64, so that only the mathematics is tested."""
    found = NoiseSchedule.of(mini.scheduler(), CPU)
    return NoiseSchedule(found.alphas.double(), found.kind)


def plain(kind: Prediction) -> NoiseSchedule:
    """SDXL's schedule, which ends with a little signal left."""
    own: Any = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return NoiseSchedule(NoiseSchedule.of(own, CPU).alphas.double(), kind)


@dataclass(frozen=True)
class World:
    """Normal data under a schedule: its exact network, path and consistency function."""

    schedule: NoiseSchedule
    deviation: float = DEVIATION

    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = self.schedule.alphas[timesteps].view(-1, 1)
        return a.sqrt(), (1 - a).sqrt(), (a * self.deviation**2 + 1 - a).sqrt()

    def prediction(self, clean: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """What a network that believes in `clean` predicts."""
        alpha, s, _ = self.levels(timesteps)
        noise = (noisy - alpha * clean) / s
        return {"epsilon": noise, "sample": clean, "v_prediction": alpha * noise - s * clean}[self.schedule.kind]

    def denoiser(self, noisy: Tensor, timesteps: Tensor, **how: bool) -> Tensor:
        """The exact network of the data: it believes in the posterior mean."""
        alpha, _, spread = self.levels(timesteps)
        clean = MEAN + self.deviation**2 * alpha / spread.square() * (noisy - alpha * MEAN)
        return self.prediction(clean, noisy, timesteps)

    def along(self, noisy: Tensor, now: Tensor, then: Tensor) -> Tensor:
        """The point of the exact path at `then` that goes through `noisy` at `now`."""
        (alpha, _, spread), (alpha2, _, spread2) = self.levels(now), self.levels(then)
        return alpha2 * MEAN + spread2 / spread * (noisy - alpha * MEAN)

    def consistent(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The prediction whose answer, boundary scalings included, is exactly where the path ends, at timestep 0."""
        end = self.along(noisy, timesteps, torch.zeros_like(timesteps))
        skip, out = (scale.view(-1, 1).double() for scale in scalings(timesteps))
        return self.prediction((end - skip * noisy) / out.clamp(min=1e-12), noisy, timesteps)

    def ask(self, noisy: Tensor, timesteps: Tensor, *, taught: bool = True, captions: bool = True) -> Tensor:
        """A perfectly taught network over a perfect teacher."""
        return self.consistent(noisy, timesteps) if taught else self.denoiser(noisy, timesteps)

    def moment(self, count: int = 256, perfect: bool = True) -> Moment:
        rng = torch.Generator().manual_seed(0)
        clean, noise = torch.randn(2, count, 8, generator=rng, dtype=torch.float64)
        return Moment(MEAN + self.deviation * clean, noise, self.schedule, self.ask if perfect else self.denoiser)

    def loss(self, perfect: bool = True) -> float:
        moment = self.moment(perfect=perfect)
        made = Consistency.of(self.schedule).compare(moment, torch.ones(256), torch.Generator().manual_seed(1))
        return float(pseudo_huber(made.prediction, made.target))


# The solver


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_are_what_the_noisy_latents_are_made_of(kind: Prediction) -> None:
    schedule, timesteps = plain(kind), torch.tensor([0, 19, 500, 999])
    clean, noise = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    noisy = schedule.noised(clean, noise, timesteps)
    found = schedule.estimates(schedule.target(clean, noise, timesteps), noisy, timesteps)
    assert all(torch.allclose(got, true) for got, true in zip(found, (clean, noise), strict=True))


@pytest.mark.parametrize("start", [999, 599])
def test_a_solver_step_stays_on_the_exact_path_up_to_its_order_also_from_pure_noise(start: int) -> None:
    world = World(minis())
    consistency, now = Consistency.of(world.schedule), torch.tensor([start])
    noisy = torch.linspace(-2, 3, 7, dtype=torch.float64)[None]
    errors: list[float] = []
    for length in (40, 20, 10):
        then = now - length
        made = consistency.step(world.denoiser(noisy, now), noisy, now, then)
        errors.append(float((made - world.along(noisy, now, then)).abs().max()))
        assert errors[-1] < 0.1 * float((noisy - world.along(noisy, now, then)).abs().max())
    ratios = [first / second for first, second in pairwise(errors)]
    assert all(3.4 < ratio < 4.6 for ratio in ratios), f"a first-order method errs by h^2 per step; {ratios}"


def test_the_grid_is_the_one_the_sampler_visits_and_its_last_point_is_pure_noise() -> None:
    consistency = Consistency.of(NoiseSchedule.of(mini.scheduler(), CPU))
    assert consistency.grid.tolist() == [0, *range(19, 1000, 20)]
    assert float(consistency.schedule.alphas[consistency.grid[-1]]) == 0
    for steps in range(1, 51):
        sampler = samplers.make("lcm", mini.scheduler(), FAMILIES["sdxl"])
        sampler.set_timesteps(steps)
        visited = sampler.timesteps.tolist()
        assert len(visited) == steps and visited[0] == 999
        assert set(visited) <= set(consistency.grid.tolist())


def test_every_interval_is_drawn_and_its_ends_are_neighbours() -> None:
    consistency = Consistency.of(minis())
    now, then = consistency.draw(5000, torch.Generator().manual_seed(0))
    assert set(now.tolist()) == set(range(19, 1000, 20))
    assert set((now - then).tolist()) == {19, 20} and int(then.min()) == 0


# The equations


@pytest.mark.parametrize("kind", KINDS)
def test_at_timestep_0_the_answer_is_the_input_whatever_the_network_says(kind: Prediction) -> None:
    consistency, start = Consistency.of(plain(kind)), torch.tensor([0, 0])
    noisy, said = torch.randn(2, 2, 4, dtype=torch.float64)
    assert torch.equal(consistency.answer(said, noisy, start), noisy)
    later = torch.tensor([19, 999])
    clean, _ = consistency.schedule.estimates(said, noisy, later)
    assert torch.allclose(consistency.answer(said, noisy, later), clean, atol=1e-4)


def test_a_perfect_consistency_function_has_no_loss_where_the_solver_is_exact() -> None:
    assert World(minis(), deviation=0.0).loss() < 1e-7  # all pictures are one: every path is a straight line to it


def test_a_perfect_consistency_function_loses_only_what_the_solver_errs_and_the_teacher_loses_more() -> None:
    world = World(minis())
    assert world.loss() < 0.01 * DEVIATION
    assert world.loss() < world.loss(perfect=False) / 3


def drawn(network: Ask) -> tuple[float, float]:
    """Mean and deviation of what four steps of the sampler "lcm" draw."""
    sampler = samplers.make("lcm", mini.scheduler(), FAMILIES["sdxl"])
    sampler.set_timesteps(4)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 1, generator=rng, dtype=torch.float64)
    for timestep in sampler.timesteps:
        x = sampler.step(network(x, timestep.expand(1)), timestep, x, generator=rng, return_dict=False)[0]
    return float(x.mean()), float(x.std())


def test_four_steps_of_a_perfect_consistency_function_draw_the_data_and_of_its_teacher_they_do_not() -> None:
    world = World(minis())
    assert drawn(world.ask) == (pytest.approx(MEAN, abs=0.02), pytest.approx(DEVIATION, rel=0.03))
    assert drawn(world.denoiser)[1] < 0.9 * DEVIATION


def test_the_sampler_does_what_the_paper_says_by_hand() -> None:
    """Algorithm 3 of arXiv:2310.04378: estimate the clean latents, add noise of the next level, four times."""
    alphas = minis().alphas
    sampler = samplers.make("lcm", mini.scheduler(), FAMILIES["sdxl"])
    sampler.set_timesteps(4)
    assert sampler.timesteps.tolist() == [999, 759, 499, 259]
    rng, same = (torch.Generator().manual_seed(5) for _ in range(2))
    x = by_hand = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    for index, timestep in enumerate((999, 759, 499, 259)):
        answer = torch.sin(3 * by_hand) + index  # any network will do
        x = sampler.step(torch.sin(3 * x) + index, timestep, x, generator=rng, return_dict=False)[0]
        clean = alphas[timestep].sqrt() * by_hand - (1 - alphas[timestep]).sqrt() * answer
        if timestep == 999:
            assert torch.equal(clean, -answer), "pure noise: the picture is the negative velocity"
        clean = clean * (1 + (0.5 / (10 * timestep)) ** 2) ** -0.5 + by_hand * 0.25 / ((10 * timestep) ** 2 + 0.25)
        by_hand = clean
        if timestep != 259:
            level = alphas[timestep - (240 if timestep != 759 else 260)]
            noise = torch.randn(clean.shape, generator=same, dtype=torch.float64)
            by_hand = level.sqrt() * clean + (1 - level).sqrt() * noise
        assert torch.allclose(x, by_hand, atol=1e-5), timestep


def test_more_steps_than_the_adapter_was_taught_are_refused_by_number(tiny: Tiny) -> None:
    sampler = samplers.make("lcm", mini.scheduler(), FAMILIES["sdxl"])
    samplers.check_steps(sampler, 50)
    with pytest.raises(InputError, match="51 steps"):
        samplers.check_steps(sampler, 51)
    samplers.check_steps(mini.scheduler(), 200)


# Guidance


@pytest.mark.parametrize("kind", KINDS)
def test_guiding_the_prediction_guides_clean_latents_and_noise_alike(kind: Prediction) -> None:
    schedule, timesteps, scale = plain(kind), torch.tensor([19, 999]), torch.tensor([4.0, 7.0])
    noisy, with_caption, without = torch.randn(3, 2, 5, dtype=torch.float64)

    def ask(noisy: Tensor, timesteps: Tensor, *, taught: bool = True, captions: bool = True) -> Tensor:
        assert not taught, "the teacher is the untaught network"
        return with_caption if captions else without

    made = schedule.estimates(guided(ask, noisy, timesteps, scale), noisy, timesteps)
    first = schedule.estimates(with_caption, noisy, timesteps)
    second = schedule.estimates(without, noisy, timesteps)
    for got, c, u in zip(made, first, second, strict=True):
        w = scale[:, None] - 1  # the paper's: beyond the conditional value
        assert torch.allclose(got, c + w * (c - u))


def test_guidance_1_asks_the_teacher_once() -> None:
    asked: list[bool] = []

    def ask(noisy: Tensor, timesteps: Tensor, *, taught: bool = True, captions: bool = True) -> Tensor:
        asked.append(captions)
        return noisy

    guided(ask, torch.zeros(2, 1), torch.tensor([19, 39]), torch.ones(2))
    assert asked == [True]


def test_guidance_is_fixed_or_drawn_from_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def compare(self: Consistency, moment: Moment, guidance: Tensor, rng: torch.Generator) -> None:
        seen.append(guidance)

    monkeypatch.setattr(Consistency, "compare", compare)
    rng = torch.Generator().manual_seed(0)
    for options in (LcmOptions(guidance=3), LcmOptions(guidance=3, guidance_high=9)):
        RECIPE.compare(World(minis()).moment(), options, rng)
    assert seen[0].unique().tolist() == [3.0]
    assert 3 <= float(seen[1].min()) < 3.5 and 8.5 < float(seen[1].max()) <= 9


# The recipe


def test_only_the_students_answer_carries_a_gradient_and_the_teacher_is_the_model_itself(
    tiny: Tiny, tmp_path: Path
) -> None:
    model = load(tiny("sdxl"))
    with trainer_for(request("lcm", [picture(tmp_path / "a.png")], batch=1), model) as trainer:
        rng = torch.Generator().manual_seed(0)
        for parameter in trainer.parameters:
            parameter.data.normal_(0, 0.05, generator=rng)
        batch = trainer.batch(0, loop.generator(0, 0))
        made = trainer.compared(batch, rng)
        assert made.prediction.requires_grad and not made.target.requires_grad
        made.prediction.sum().backward()
        assert all(parameter.grad is not None for parameter in trainer.parameters)
        asked = loop.Network(trainer, batch)
        empty = trainer.task.cache.prompts[-1]
        with torch.no_grad():
            taught = asked(batch.noisy, batch.timesteps)
            untaught = asked(batch.noisy, batch.timesteps, taught=False)
            unconditional = asked(batch.noisy, batch.timesteps, taught=False, captions=False)
    assert empty.pooled is not None
    with torch.no_grad(), plain_attention(model.denoiser):  # as it is computed while layers learn
        added = {"text_embeds": batch.added["text_embeds"], "time_ids": batch.added["time_ids"]}
        own = model.denoiser(batch.noisy, batch.timesteps, batch.tokens, added_cond_kwargs=added)[0]
        added["text_embeds"] = empty.pooled[None]
        silent = model.denoiser(batch.noisy, batch.timesteps, empty.tokens[None], added_cond_kwargs=added)[0]
    assert torch.equal(untaught, own) and torch.equal(unconditional, silent)
    assert float((taught - own).abs().max()) > 1e-3 and not torch.equal(own, silent)


@pytest.mark.parametrize(("family", "variant"), [("sd15", ""), ("sdxl", ""), ("sdxl", "vpred")])
def test_the_file_gives_plain_diffusers_the_trained_network_and_says_how_to_draw(
    family: str, variant: str, tiny: Tiny, tmp_path: Path
) -> None:
    folder = tiny(family, variant=variant)
    model = load(folder)
    asked = request("lcm", [picture(tmp_path / "a.png")], steps=3, learning_rate=0.02, batch=1)
    (made,) = [e for e in run(asked, model, tmp_path / "job") if isinstance(e, Artifact) and e.kind == "adapter"]
    with trainer_for(asked, model) as trainer:
        probe = trainer.batch(77, loop.generator(0, 77))
        with torch.no_grad():
            before = trainer.predict(probe)
        for number in range(3):
            trainer.step(number)
        with torch.no_grad():
            expected = trainer.predict(probe)
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(made.path)
    conditions = {"added_cond_kwargs": probe.added} if probe.added else {}
    with torch.no_grad():
        got = pipeline.unet(probe.noisy, probe.timesteps, probe.tokens, **conditions, return_dict=False)[0]
    assert torch.allclose(got, expected, atol=1e-5)
    assert float((expected - before).abs().max()) > 1e-2, "training changed nothing, the comparison is empty"
    report = inspect(Path(made.path), unet_shapes(resolve(str(folder))))
    assert json.loads(report.metadata["intarsia.drawing"]) == {"steps": 4, "guidance": 1.0, "scheduler": "lcm"}
    assert report.modules == report.matched == len(trainer.layers.factors("unet."))


def test_the_layers_are_the_papers(tiny: Tiny, tmp_path: Path) -> None:
    unet = load(tiny("sdxl")).denoiser
    chosen = set(RECIPE.targets("sdxl", trainable_layers(unet), LcmOptions()))
    ends = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2")
    ends += ("conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")
    assert chosen == {name for name, _ in unet.named_modules() if name.endswith(ends)}
    made = adapters(run(request("lcm", [picture(tmp_path / "a.png")], steps=1), load(tiny("sdxl")), tmp_path / "job"))
    assert {name.rsplit(".lora_", 1)[0].removeprefix("unet.") for name in made["thing"]} == chosen


def test_what_cannot_be_distilled_is_refused() -> None:
    pictures = (TrainingPicture(path="a.png"),)
    with pytest.raises(InputError, match="Guidance at most cannot be 2"):
        RECIPE.check(pictures, LcmOptions(guidance=4, guidance_high=2))
    with pytest.raises(InputError, match="warmup cannot be 9"):
        RECIPE.check(pictures, LcmOptions(steps=9, warmup=9))
    with pytest.raises(InputError, match="starts from pure noise"):
        Consistency.of(NoiseSchedule(minis().alphas, "epsilon"))
    with pytest.raises(InputError, match="has 999 timesteps"):
        Consistency.of(NoiseSchedule(minis().alphas[1:], "v_prediction"))
