"""Samplers: the table, what is refused, and the denoised estimate against the samplers' own."""

from __future__ import annotations

from typing import Any, get_args

import diffusers
import pytest
import torch
from intarsia.pipelines import schedule
from intarsia.pipelines.errors import InputError
from intarsia.pipelines.families import FAMILIES
from intarsia.pipelines.requests import SCHEDULERS

D: Any = diffusers
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO: dict[str, Any] = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def own(family: str, **more: Any) -> Any:  # noqa: ANN401
    if FAMILIES[family].prediction == "flow":
        return D.FlowMatchEulerDiscreteScheduler(shift=3.0, **more)
    return D.EulerDiscreteScheduler(**BETAS, **more)


def gaussian(scheduler: Any, steps: int) -> torch.Tensor:  # noqa: ANN401
    """Denoise with the exact network of a data set that is one normal distribution (mean 2, deviation 0.5).

    Its probability flow maps x to mean + (x / sigma_max) * deviation almost exactly, whatever the sampler.
    """
    scheduler.set_timesteps(steps)
    x = torch.tensor([[-1.0, 0.0, 1.0, 2.0]]) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    levels = schedule.sigmas_of(scheduler, scheduler.timesteps)
    flow = scheduler.config.get("prediction_type", "flow_prediction") == "flow_prediction"
    mean, deviation = 2.0, 0.5
    for sigma, timestep in zip(levels, scheduler.timesteps, strict=True):
        alpha = 1 - sigma if flow else 1 / (sigma**2 + 1) ** 0.5
        s = sigma if flow else (1.0 if sigma == float("inf") else sigma * alpha)
        scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        # posterior mean of x_0 given alpha x_0 + s n
        clean = mean + deviation**2 * alpha / (alpha**2 * deviation**2 + s**2) * (scaled - alpha * mean)
        noise = (scaled - alpha * clean) / max(s, 1e-9)
        kind = scheduler.config.get("prediction_type", "flow_prediction")
        answers = {"epsilon": noise, "v_prediction": alpha * noise - s * clean, "flow_prediction": noise - clean}
        estimate = schedule.denoised(scheduler, answers[kind], x, sigma)
        assert torch.allclose(estimate, clean, atol=2e-3), (type(scheduler).__name__, sigma)
        x = scheduler.step(answers[kind], timestep, x, return_dict=False)[0]
    return x


DETERMINISTIC = ["default", "euler", "dpmpp_2m", "dpmpp_2m_karras", "ddim", "heun", "unipc"]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_every_sampler_solves_the_same_equation(name: str) -> None:
    scheduler = schedule.make(name, own("sdxl", timestep_spacing="trailing"), FAMILIES["sdxl"])
    # the schedule ends at sigma 14.6, where x / sigma is not pure noise yet: hence the bound
    assert torch.allclose(gaussian(scheduler, 100), torch.tensor([[1.5, 2.0, 2.5, 3.0]]), atol=0.12)


@pytest.mark.parametrize("name", ["default", "dpmpp_2m", "ddim", "unipc"])
def test_zero_terminal_snr_starts_from_pure_noise(name: str) -> None:
    scheduler = schedule.make(name, own("sdxl", **ZERO), FAMILIES["sdxl"])
    assert torch.allclose(gaussian(scheduler, 100), torch.tensor([[1.5, 2.0, 2.5, 3.0]]), atol=0.06)


@pytest.mark.parametrize("name", ["default", "euler", "dpmpp_2m", "unipc"])
def test_flow_samplers_solve_the_same_equation(name: str) -> None:
    scheduler = schedule.make(name, own("sd3"), FAMILIES["sd3"])
    assert torch.allclose(gaussian(scheduler, 100), torch.tensor([[1.5, 2.0, 2.5, 3.0]]), atol=0.05)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("name", get_args(SCHEDULERS))
def test_every_name_gives_a_sampler_or_a_refusal_that_lists_the_others(family: str, name: str) -> None:
    try:
        scheduler = schedule.make(name, own(family), FAMILIES[family])
    except InputError as error:
        assert FAMILIES[family].prediction == "flow"
        assert "euler" in error.hint
    else:
        assert scheduler is not None


def test_a_sampler_that_cannot_start_from_pure_noise_is_refused() -> None:
    with pytest.raises(InputError, match="heun cannot run this model"):
        schedule.make("heun", own("sdxl", **ZERO), FAMILIES["sdxl"])


def test_random_samplers_take_their_noise_from_the_generator() -> None:
    for name in ("euler_ancestral", "lcm"):
        scheduler = schedule.make(name, own("sdxl"), FAMILIES["sdxl"])
        assert schedule.random_arguments(scheduler, torch.Generator())
