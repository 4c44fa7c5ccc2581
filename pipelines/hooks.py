"""What may hang on the denoising loop: a hook sees every step before and after the network ran."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One step of the denoising loop.

    Args:
        index: Counter from 0.
        total: Number of steps.
        timestep: The model's clock, 0..1000.
        sigma: Noise level at the start of the step, in the scheduler's own units.
        latents: `(batch, channels, height / 8, width / 8)`, or the family's own layout.
        predict: `(latents) -> guided noise prediction` at this step's timestep, both guidance branches in one
            batch; a hook may call it with other latents, or under autograd.
    """

    index: int
    total: int
    timestep: float
    sigma: float
    latents: Tensor
    predict: Callable[[Tensor], Tensor]


class StepHook(Protocol):
    """Changes latents around a step; return `step.latents` to change nothing."""

    def before(self, step: Step) -> Tensor:
        """Give the latents the network will see."""
        ...

    def after(self, step: Step) -> Tensor:
        """Give the latents the next step starts from (`step.latents` holds what the scheduler made)."""
        ...
