"""Adapters that act during a part of the denoising only."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .attach import Attachment, Branches
from .hooks import Step


class StepRanges:
    """A step hook that lets every adapter act within its `steps` alone, whatever the number of steps.

    Args:
        branches: Of the adapters.
        attachments: The same adapters with their ranges.
    """

    def __init__(self, branches: Branches, attachments: Sequence[Attachment]) -> None:
        self._branches, self._attachments = branches, tuple(attachments)

    def before(self, step: Step) -> Tensor:
        done = step.index / step.total
        self._branches.mute(a.name for a in self._attachments if not a.steps[0] <= done < a.steps[1])
        return step.latents

    def after(self, step: Step) -> Tensor:
        return step.latents
