"""The one denoising loop. It knows no family: a network predicts, a sampler steps, hooks stand around each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import schedule
from .events import CancelToken
from .hooks import Step, StepHook


@dataclass(frozen=True)
class Work:
    """One picture (or batch) about to be denoised.

    Args:
        latents: Pure noise in the sampler's own scale, float32.
        timesteps: `(steps,)`, of the sampler.
        scheduler: A sampler of its own, after `set_timesteps`.
        network: `(latents, timestep) -> guided prediction`, float32 in and out.
        generator: On the CPU; the sampler's noise comes from it, so that a seed means the same on every device. One
            for each picture of a batch.
    """

    latents: Tensor
    timesteps: Tensor
    scheduler: Any
    network: Callable[[Tensor, Tensor], Tensor]
    generator: torch.Generator | list[torch.Generator]


@dataclass(frozen=True)
class Stepped:
    """One step was done.

    Args:
        index: Counter from 0.
        total: Number of steps.
        before: Latents the network saw.
        prediction: What it answered.
        sigma: Noise level of `before`.
        latents: Where the next step starts.
    """

    index: int
    total: int
    before: Tensor
    prediction: Tensor
    sigma: float
    latents: Tensor


def denoise(work: Work, token: CancelToken, hooks: Sequence[StepHook] = ()) -> Iterator[Stepped]:
    """Run the loop; gives control back after every step.

    Args:
        work: What to denoise.
        token: Checked before every step.
        hooks: Called in order before the network and after the sampler; without them nothing is added to a step.

    Raises:
        Cancelled: A stop was asked for.
    """
    scheduler, latents = work.scheduler, work.latents
    sigmas = schedule.sigmas_of(scheduler, work.timesteps)
    clocks: list[float] = [float(value) for value in work.timesteps.tolist()]
    noise = schedule.random_arguments(scheduler, work.generator)
    total = len(clocks)
    for index, timestep in enumerate(work.timesteps):
        token.check()
        with torch.no_grad():  # inside the step only: a generator must not change its caller's mode
            step = Step(index, total, clocks[index], sigmas[index], latents, _bound(work, timestep))
            for hook in hooks:
                step = replace(step, latents=hook.before(step))
            seen = step.latents
            prediction = work.network(seen, timestep)
            latents = scheduler.step(prediction, timestep, seen, **noise, return_dict=False)[0]
            step = replace(step, latents=latents)
            for hook in hooks:
                step = replace(step, latents=hook.after(step))
            latents = step.latents
        yield Stepped(index, total, seen, prediction, sigmas[index], latents)


def _bound(work: Work, timestep: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda latents: work.network(latents, timestep)
