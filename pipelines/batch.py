"""Many pictures in few passes, as benches need them. Each is the picture that its prompt and seed give alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from PIL import Image

from . import schedule
from .denoise import Work, denoise
from .errors import InputError
from .events import CancelToken
from .hooks import StepHook
from .models import Model
from .modular import Prompt
from .network import Network


def render_many(  # noqa: PLR0913 - keywords, the names of `render`
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    negative: str = "",
    steps: int = 20,
    guidance: float = 5.0,
    size: tuple[int, int] | None = None,
    batch: int = 16,
    token: CancelToken | None = None,
    scheduler: str = "default",
    hooks: Sequence[StepHook] = (),
) -> Iterator[Image.Image]:
    """Make one picture for every prompt, `batch` of them in one pass, with whatever is attached to the model right now.

    Args:
        model: Loaded.
        prompts: What each picture shows.
        seeds: Of each picture; it is drawn from its own seed alone, so the batch it falls into does not change it
            (but for rounding: other batch sizes may choose other kernels).
        negative: What none must show.
        steps: Denoising steps.
        guidance: Guidance scale.
        size: (width, height) in pixels; the model's own if None.
        batch: Pictures per pass.
        token: Checked before every step.
        scheduler: Sampler.
        hooks: Hang on every step of every batch.

    Yields:
        The pictures in order.

    Raises:
        InputError: Not as many seeds as prompts.
        Cancelled: A stop was asked for.
    """
    if len(prompts) != len(seeds):
        raise InputError(f"There are {len(prompts)} prompts but {len(seeds)} seeds.", "Give one seed for each prompt.")
    engine, size, token = model.engine, size or model.native_size, token or CancelToken()
    known: dict[str, Prompt] = {}
    try:
        for start in range(0, len(prompts), batch):
            works: list[Work] = []
            for prompt, seed in zip(prompts[start : start + batch], seeds[start : start + batch], strict=True):
                token.check()
                if prompt not in known:
                    known[prompt] = engine.encode(prompt, negative, guidance)
                sampler = schedule.make(scheduler, model.components["scheduler"], model.spec)
                works.append(engine.begin(known[prompt], size, steps, sampler, torch.Generator().manual_seed(seed)))
            latents = works[0].latents
            for stepped in denoise(together(works), token, hooks):
                latents = stepped.latents
            for single in latents.split(1):
                yield from engine.decode(single, size)
    finally:
        model.rest()


def together(works: Sequence[Work]) -> Work:
    """Several pictures of one size, sampler and number of steps as one batch; each keeps its own random numbers."""
    if len(works) == 1:
        return works[0]
    networks = [work.network for work in works if isinstance(work.network, Network)]
    generators = [work.generator for work in works if isinstance(work.generator, torch.Generator)]
    return replace(
        works[0],
        latents=torch.cat([work.latents for work in works]),
        network=Network.together(networks),
        generator=generators,  # diffusers' noise takes one for each picture
    )
