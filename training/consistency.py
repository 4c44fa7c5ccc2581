"""Consistency distillation: one call of the network shall answer what many steps of its own sampler arrive at.

On the path a sampler follows from noise to a picture, every point belongs to the same picture. The taught network f
gives that picture from any point: its answer at t is compared with its answer one solver step further down, from where
the way is shorter (at t = 0 there is none: f(x, 0) = x). A path cut into 50 intervals gives fifty such equations.

Papers: Consistency Models, arXiv:2303.01469, section 3 (boundary scalings); Latent Consistency Models,
arXiv:2310.04378, algorithm 1 (skipping steps, guidance within the solver); LCM-LoRA, arXiv:2311.05556, algorithm 1.
As in the authors' LoRA script, the target is the taught network itself without gradient, not a slow copy of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..pipelines.errors import InputError
from .recipe import Ask, Compared, Moment
from .schedule import NoiseSchedule

INTERVALS = 50  # `original_inference_steps` of LCMScheduler: few-step sampling visits timesteps of this grid only
SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0  # both as in LCMScheduler, which applies the same scalings when it samples
HUBER = 0.001  # the authors' c: in effect the absolute error


@dataclass(frozen=True)
class Consistency:
    """The equations one schedule gives.

    Args:
        schedule: Noise levels and kind of prediction.
        grid: `(51,)` ascending timesteps: 0, 19, 39, ... 999 of 1000. The last is where sampling starts, so a schedule
            with zero terminal SNR is taught from pure noise on.
    """

    schedule: NoiseSchedule
    grid: Tensor

    @classmethod
    def of(cls, schedule: NoiseSchedule) -> Consistency:
        """Lay the grid over a schedule.

        Raises:
            InputError: The schedule has too few timesteps, or predicts noise where there is nothing else.
        """
        total = len(schedule.alphas)
        if total % INTERVALS:
            raise InputError(
                f"Consistency distillation cuts the schedule into {INTERVALS} parts, but it has {total} timesteps.",
                "Choose an SD1.5 or SDXL model with the usual 1000.",
            )
        if schedule.kind == "epsilon" and float(schedule.alphas[-1]) == 0:
            raise InputError(
                "This model predicts noise but starts from pure noise, where that says nothing about the picture.",
                "Choose a model with v-prediction, or one whose schedule is not rescaled to zero terminal SNR.",
            )
        grid = torch.arange(0, total + 1, total // INTERVALS) - 1
        return cls(schedule, grid.clamp(min=0).to(schedule.alphas.device))

    def draw(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw intervals, each as likely as the others.

        Args:
            count: How many.
            rng: On the CPU or the schedule's device.

        Returns:
            Timesteps `(count,)` of the noisy end, and of the end one solver step further down.
        """
        index = torch.randint(1, len(self.grid), (count,), generator=rng, device=rng.device).to(self.grid.device)
        return self.grid[index], self.grid[index - 1]

    def step(self, prediction: Tensor, noisy: Tensor, now: Tensor, then: Tensor) -> Tensor:
        """Follow the trajectory from timesteps `now` down to `then` by one DDIM step.

        In terms of clean latents and noise it starts from pure noise like from anywhere else; in terms of sigma, as
        Euler's step is usually written, it would have to start from infinity.
        """
        clean, noise = self.schedule.estimates(prediction, noisy, now)
        return self.schedule.noised(clean, noise, then)

    def answer(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Give f: `c_skip noisy + c_out clean`; `noisy` itself at timestep 0, all but the clean estimate elsewhere."""
        skip, out = scalings(timesteps)
        clean, _ = self.schedule.estimates(prediction, noisy, timesteps)
        shape = (-1, *[1] * (noisy.ndim - 1))
        return skip.view(shape) * noisy + out.view(shape) * clean

    def compare(self, moment: Moment, guidance: Tensor, rng: torch.Generator) -> Compared:
        """Make both sides of the equation at randomly drawn intervals.

        Args:
            moment: Latents, noise and the network; the untaught network is the teacher.
            guidance: `(batch,)`, the scale people set (1 is none), folded into the teacher's step.
            rng: For the intervals.
        """
        now, then = self.draw(len(moment.clean), rng)
        noisy = self.schedule.noised(moment.clean, moment.noise, now)
        with torch.no_grad():
            further = self.step(guided(moment.ask, noisy, now, guidance), noisy, now, then)
            target = self.answer(moment.ask(further, then), further, then)
        return Compared(self.answer(moment.ask(noisy, now), noisy, now), target, now)


def guided(teacher: Ask, noisy: Tensor, timesteps: Tensor, guidance: Tensor) -> Tensor:
    """Ask the untaught network with guidance `(batch,)`.

    Noise, v and clean latents depend on each other linearly at one point and time, so guiding the prediction guides
    all of them (the authors guide noise and clean latents one by one).
    """
    conditional = teacher(noisy, timesteps, taught=False)
    if bool((guidance == 1).all()):
        return conditional
    unconditional = teacher(noisy, timesteps, taught=False, captions=False)
    return unconditional + guidance.view(-1, *[1] * (noisy.ndim - 1)) * (conditional - unconditional)


def scalings(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Give c_skip and c_out, `(batch,)` each: 1 and 0 at timestep 0 (arXiv:2310.04378, appendix)."""
    t, data = TIMESTEP_SCALING * timesteps.float(), SIGMA_DATA**2
    return data / (t.square() + data), t / (t.square() + data).sqrt()


def pseudo_huber(prediction: Tensor, target: Tensor) -> Tensor:
    """Average sqrt(d^2 + c^2) - c over all differences d."""
    return ((prediction - target).square() + HUBER**2).sqrt().mean() - HUBER
