"""The samplers by name, the noise level of each step, and the denoised estimate inside a step.

Three ways of writing the noisy state occur (x_0 the picture, n the noise):
    sigma-space      x = x_0 + sigma n                      Euler, Euler ancestral, Heun
    preserving       x = alpha x_0 + s n, alpha^2 + s^2 = 1   DDIM, PNDM, DPM-Solver++, UniPC, LCM
    straight path    x = (1 - sigma) x_0 + sigma n           everything for SD3 and FLUX.1
In the first two the level is given as sigma = s / alpha.
"""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch
from torch import Tensor

from .errors import InputError
from .families import Family

D: Any = diffusers
Generators = torch.Generator | list[torch.Generator]  # one, or one for each picture of a batch

SOLVER: dict[str, Any] = {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": False}
NOISE: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {"use_karras_sigmas": False}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", SOLVER),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", SOLVER | {"use_karras_sigmas": True}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "heun": ("HeunDiscreteScheduler", {"use_karras_sigmas": False}),
    "unipc": ("UniPCMultistepScheduler", {"use_karras_sigmas": False}),
    "lcm": ("LCMScheduler", {"clip_sample": False}),
}
STRAIGHT: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
FLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", SOLVER | STRAIGHT),
    "unipc": ("UniPCMultistepScheduler", STRAIGHT | {"use_karras_sigmas": False}),
    "lcm": ("FlowMatchLCMScheduler", {}),
}
# Settings that change the mathematics: a sampler that does not know one of these cannot run a model that sets it.
VITAL = {"rescale_betas_zero_snr": False, "use_dynamic_shifting": False}


def make(name: str, own: Any, family: Family) -> Any:  # noqa: ANN401 - the samplers share no typed base
    """Build a fresh sampler with the model's own noise schedule.

    Args:
        name: Key of the request's SCHEDULERS; "default" is the model's own.
        own: The model's sampler.
        family: The model's family.

    Raises:
        InputError: The sampler cannot run this model.
    """
    config: dict[str, Any] = dict(own.config)
    if name == "default":
        return type(own).from_config(config)
    table = FLOW if family.prediction == "flow" else NOISE
    if name not in table:
        raise InputError(
            f"The scheduler {name} cannot run a {family.title} model.", f"Choose from: default, {', '.join(table)}."
        )
    kind_name, changes = table[name]
    kind: Any = getattr(D, kind_name)
    if kind is type(own):
        return kind.from_config(config, **changes)
    known = inspect.signature(kind.__init__).parameters
    for setting, neutral in VITAL.items():
        if config.get(setting, neutral) != neutral and setting not in known:
            raise InputError(
                f"The scheduler {name} cannot run this model ({setting.replace('_', ' ')}).",
                "Choose default or euler.",
            )
    if family.prediction == "flow" and "flow_shift" in known:
        changes = changes | {"flow_shift": config.get("shift", 1.0)}
    return kind.from_config(config, **changes)


def check_steps(scheduler: Any, steps: int) -> None:  # noqa: ANN401
    """Refuse more steps than a sampler has places for: LCM's visits a few of the timesteps its adapters were taught at.

    Raises:
        InputError: Says how many it takes.
    """
    most = scheduler.config.get("original_inference_steps", steps)
    if steps > most:
        raise InputError(
            f"The scheduler lcm cannot take {steps} steps; it takes at most {most}.", "4 to 8 are what it is made for."
        )


def sigmas_of(scheduler: Any, timesteps: Tensor) -> list[float]:  # noqa: ANN401
    """Give the noise level at the start of each step, in the sampler's own units; infinite for pure noise.

    Args:
        scheduler: After `set_timesteps`.
        timesteps: `(steps,)`, as the sampler made them.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) >= len(timesteps):
        return [float(sigma) for sigma in sigmas[: len(timesteps)].tolist()]
    found: list[float] = []
    for timestep in timesteps.tolist():
        alpha = float(scheduler.alphas_cumprod[int(timestep)])
        found.append(((1 - alpha) / alpha) ** 0.5 if alpha > 0 else float("inf"))
    return found


def denoised(scheduler: Any, prediction: Tensor, latents: Tensor, sigma: float) -> Tensor:  # noqa: ANN401
    """Estimate the noise-free latents x_0 from one prediction.

    Args:
        scheduler: The sampler that runs.
        prediction: The guided prediction, the shape of `latents`.
        latents: The noisy state x before the step.
        sigma: The step's level, from `sigmas_of`.
    """
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    if kind == "flow_prediction":
        return latents - sigma * prediction
    # alpha and s of the preserving form; for infinite sigma they are 0 and 1
    alpha = 1 / (sigma * sigma + 1) ** 0.5
    s = 1.0 if sigma == float("inf") else sigma * alpha
    x = latents * alpha if sigma_space(scheduler) else latents
    if kind == "sample":
        return prediction
    if kind == "v_prediction":
        return alpha * x - s * prediction
    return (x - s * prediction) / max(alpha, 1e-6)


def sigma_space(scheduler: Any) -> bool:  # noqa: ANN401
    """Whether the sampler's state is x_0 + sigma n: those samplers scale their input for the network."""
    return hasattr(scheduler, "is_scale_input_called") or type(scheduler).__name__ == "HeunDiscreteScheduler"


def random_arguments(scheduler: Any, generator: Generators) -> dict[str, Generators]:  # noqa: ANN401
    """What a sampler's `step` needs so that its noise comes from our generator, and from nowhere else."""
    takes = "generator" in inspect.signature(scheduler.step).parameters
    return {"generator": generator} if takes else {}
