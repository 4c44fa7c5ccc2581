"""LCM-LoRA: an adapter that draws in four steps what the model draws in twenty, and twice as fast at each of them.

Papers: LCM-LoRA, arXiv:2311.05556; the mathematics is in `training/consistency.py`. Deviations, each on purpose: one
fixed guidance unless a range is asked for (without an input for it, a range teaches only its middle); ranks follow the
width of the model's layers; a lower learning rate. Rank 64, alpha = rank, every linear layer and convolution of the
blocks, 50 solver steps, pseudo-Huber loss, no weight decay and batches of a dozen are the authors'.

The rate decides: on Mini, after 260 steps of 16 at 4e-5 the judge knew the contents of 54 of 64 pictures drawn in four
steps, without the adapter of 50; after 700 steps at 3e-4 of 18.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...pipelines.adapter_types import Role
from ...pipelines.errors import InputError
from ...pipelines.options import option
from ...pipelines.requests import TrainingPicture
from ..recipe import Compared, Drawing, ModelFacts, Moment, Prediction, Settings, TrainingOptions, capped, narrowed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ...pipelines.adapter_types import LowRank

LAYER = re.compile(
    r"(down_blocks|mid_block|up_blocks)\..*\.(to_[qkv]|to_out\.0|proj_in|proj_out|ff\.net\.(0\.proj|2)"
    r"|conv[12]|conv_shortcut|time_emb_proj|(down|up)samplers\.0\.conv)"
)
DRAWING = Drawing(steps=4, guidance=1.0, scheduler="lcm")


class LcmOptions(TrainingOptions):
    """Options of LCM-LoRA."""

    rank: int = option(64, label="Rank", help="Capped at a quarter of a layer's width.", low=1, high=512)
    batch: int = option(12, label="Batch", help="Pictures per step.", low=1, high=64)
    guidance: float = option(
        5.0,
        label="Guidance to learn",
        help="Folded into the result, which is then drawn with guidance 1.",
        low=1,
        high=30,
    )
    guidance_high: float | None = option(
        None, label="Guidance at most", help="Draws it from a range for each picture. Empty: always the same.", low=1,
        high=30,
    )  # fmt: skip
    warmup: int = option(0, label="Warm-up", help="Steps in which the learning rate rises.", low=0, high=10_000)


class Lcm:
    """Train every linear layer and convolution of the denoiser's blocks to jump to the end of the sampler's path."""

    name = "lcm"
    title = "LCM-LoRA: pictures in four steps"
    paper = "arXiv:2311.05556"
    families = ("sd15", "sdxl")
    options = LcmOptions

    def check(self, pictures: tuple[TrainingPicture, ...], options: LcmOptions) -> None:
        if not pictures:
            raise InputError("There is no picture to learn from.", "Give a folder, a zip or some pictures.")
        if options.guidance_high is not None and options.guidance_high < options.guidance:
            raise InputError(
                f"Guidance at most cannot be {options.guidance_high:g}: the range begins at {options.guidance:g}.",
                "Raise it, or leave it empty for one fixed guidance.",
            )
        if options.steps is not None and options.warmup >= options.steps:
            raise InputError(
                f"warmup cannot be {options.warmup}: the run has only {options.steps} steps.", "Lower the warm-up."
            )

    def targets(self, family: str, layers: Mapping[str, tuple[int, ...]], options: LcmOptions) -> Mapping[str, int]:
        if family not in self.families:
            raise InputError(
                f"LCM-LoRA is not available for {family} models yet.", "Choose an SD1.5 or SDXL model, or Mini."
            )
        chosen = {path: capped(options.rank, shape) for path, shape in layers.items() if LAYER.fullmatch(path)}
        if not chosen:
            raise InputError("This model has no blocks LCM-LoRA knows.", "Choose an SD1.5 or SDXL model.")
        return chosen

    def settings(self, facts: ModelFacts, options: LcmOptions) -> Settings:
        ranks = self.targets(facts.family, facts.layers, options)
        notices = narrowed(ranks, options.rank)
        rate = options.learning_rate
        if rate is None:
            rate = 4e-5
            notices.append("Learning rate 4e-05: below the paper's 0.0001, at which small models drift.")
        steps = options.steps
        if steps is None:
            steps = 1000
            notices.append(f"{steps} steps: the least the authors use; up to 3000 make pictures sharper.")
        return Settings(
            steps=steps,
            learning_rate=rate,
            resolution=options.resolution or facts.size,
            ranks=ranks,
            batch=options.batch,
            warmup=options.warmup,
            weight_decay=0.0,
            drawing=DRAWING,
            notices=tuple(notices),
        )

    def trigger(self, name: str, options: LcmOptions) -> str:
        return ""

    def prompts(self, name: str, pictures: tuple[TrainingPicture, ...], options: LcmOptions) -> tuple[str, ...]:
        return tuple(picture.caption.strip() for picture in pictures)

    def compare(self, moment: Moment, options: LcmOptions, rng: torch.Generator) -> Compared:
        """Compare the taught network's answer with its own one step further down the untaught network's path."""
        import torch

        from ..consistency import Consistency

        low, high = options.guidance, options.guidance_high or options.guidance
        guidance = low + (high - low) * torch.rand(len(moment.clean), generator=rng)
        return Consistency.of(moment.schedule).compare(moment, guidance.to(moment.clean.device), rng)

    def loss(
        self,
        prediction: Tensor,
        target: Tensor,
        snr: Tensor,
        options: LcmOptions,
        rng: torch.Generator,
        kind: Prediction = "epsilon",
    ) -> Tensor:
        from ..consistency import pseudo_huber

        return pseudo_huber(prediction, target)

    def parts(self, layers: Mapping[str, LowRank]) -> Mapping[Role, Mapping[str, LowRank]]:
        return {"concept": dict(layers)}


RECIPE = Lcm()
