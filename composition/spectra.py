"""Frequency profiles of adapters: each draws one short picture alone, from one seed, and keeps its profile.

Paper: CMLoRA, arXiv:2502.04923, whose notebook draws one picture for each LoRA; its pipelines then go by the first
letters of the adapters' names instead. Here the profile itself decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..pipelines import schedule
from ..pipelines.attach import Attachment, attached
from ..pipelines.denoise import denoise
from . import frequency
from .composition import Composition, Concept

SEED = 0  # of the picture an adapter is judged by, whatever the seed of the composition
Kept = dict[tuple[object, ...], Tensor]


def profiles(composition: Composition, steps: int, kept: Kept) -> list[Tensor]:
    """Give the profile of each concept's adapter, at weight 1 and without styles.

    Args:
        composition: Whose concepts they are; nothing is attached to its model.
        steps: Of each picture.
        kept: Profiles by model, adapter and settings; new ones are added.

    Raises:
        AdapterError: An adapter does not fit.
        Cancelled: A stop was asked for.
    """
    found: list[Tensor] = []
    for concept in composition.concepts:
        prompt = concept.prompt or composition.prompt
        key = (
            composition.model.source, concept.attachment.adapter.sha256, prompt, composition.negative, steps,
            composition.size, composition.guidance, composition.scheduler,
        )  # fmt: skip
        if key not in kept:
            kept[key] = frequency.picture_profile(_drawn(composition, concept, prompt, steps))
        found.append(kept[key])
    return found


def _drawn(composition: Composition, concept: Concept, prompt: str, steps: int) -> Tensor:
    """Draw with one adapter alone: `(height, width, 3)` from 0 to 255."""
    model = composition.model
    alone = Attachment(concept.name, concept.attachment.adapter)
    with attached(model.components, [alone]), torch.no_grad():
        embedded = model.engine.encode(prompt, composition.negative, composition.guidance)
        sampler = schedule.make(composition.scheduler, model.components["scheduler"], model.spec)
        generator = torch.Generator().manual_seed(SEED)
        work = model.engine.begin(embedded, composition.size, steps, sampler, generator)
        latents = work.latents
        for stepped in denoise(work, composition.token):
            latents = stepped.latents
        picture = model.engine.decode(latents, composition.size)[0]
    return torch.from_numpy(np.array(picture.convert("RGB")))


def for_page(names: Sequence[str], found: Sequence[Tensor], size: tuple[int, int]) -> dict[str, Any]:
    """Profiles and scores as plain lists, for the report.

    Args:
        names: Of the concepts.
        found: Their profiles.
        size: (height, width) of the pictures in pixels.
    """
    drawn = [frequency.bands(profile, size) for profile in found]
    return {
        "names": list(names),
        "edges": drawn[0][0],
        "profiles": [values for _, values in drawn],
        "scores": [frequency.high(profile, size) for profile in found],
        "cut": frequency.CUT,
    }
