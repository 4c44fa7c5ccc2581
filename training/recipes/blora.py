"""B-LoRA: content and style of one picture, learned together in two blocks of SDXL and used apart.

Paper: Implicit Style-Content Separation using B-LoRA, arXiv:2403.14572. Deviations, each on purpose: the size ids are
true (the authors' code claims 1024x1024 for every picture); the picture is turned as its EXIF data says; the rank is
capped in narrow layers; learning rate and step count follow the model's width and size. Rank 64, alpha = rank,
gaussian factors, float32, AdamW with weight decay 1e-4, clipping at 1, no crop and no flip are the authors'.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...pipelines.adapter_types import Role
from ...pipelines.errors import InputError
from ...pipelines.options import option
from ...pipelines.requests import TrainingPicture
from ..recipe import ModelFacts, Prediction, Settings, TrainingOptions, capped, scaled_rate

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ...pipelines.adapter_types import LowRank

CONTENT = "up_blocks.0.attentions.0."
STYLE = "up_blocks.0.attentions.1."
# Matched in full: a substring test would also take attentions.10 for attentions.1.
LAYER = re.compile(r"up_blocks\.0\.attentions\.[01]\..*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)")


class BLoraOptions(TrainingOptions):
    """Options of B-LoRA."""

    rank: int = option(64, label="Rank", help="Capped at a quarter of a layer's width.", low=1, high=512)
    placeholder: str = option(
        "", label="Placeholder", help="Word that stands for the picture; empty: one made from the name.", high=40
    )


class BLora:
    """Train both blocks on one picture; two adapter files come out."""

    name = "blora"
    title = "B-LoRA: content and style of one picture"
    paper = "arXiv:2403.14572"
    families = ("sdxl",)
    options = BLoraOptions

    def check(self, pictures: tuple[TrainingPicture, ...], options: BLoraOptions) -> None:
        if len(pictures) != 1:
            raise InputError(
                f"B-LoRA learns from exactly one picture, not from {len(pictures)}.",
                "Give one picture, or choose the LoRA recipe.",
            )
        if options.placeholder and not re.fullmatch(r"\S+", options.placeholder):
            raise InputError("The placeholder cannot hold spaces.", 'Use one word, such as "[v7]".')

    def targets(self, family: str, layers: Mapping[str, tuple[int, ...]], options: BLoraOptions) -> Mapping[str, int]:
        if family not in self.families:
            raise InputError(
                f"B-LoRA works with SDXL models only, not with {family}.",
                "Choose an SDXL model or Mini, or the LoRA recipe.",
            )
        chosen = {path: capped(options.rank, shape) for path, shape in layers.items() if LAYER.fullmatch(path)}
        if not any(path.startswith(CONTENT) for path in chosen) or not any(path.startswith(STYLE) for path in chosen):
            raise InputError(
                "This model lacks the two attention blocks B-LoRA trains (up_blocks.0.attentions.0 and .1).",
                "Choose a model with SDXL's blocks.",
            )
        return chosen

    def settings(self, facts: ModelFacts, options: BLoraOptions) -> Settings:
        ranks = self.targets(facts.family, facts.layers, options)
        notices: list[str] = []
        if min(ranks.values()) < options.rank:
            low, high = min(ranks.values()), max(ranks.values())
            shown = str(low) if low == high else f"{low} to {high}"
            notices.append(f"Rank {shown} instead of {options.rank}: a quarter of the width of this model's layers.")
        rate = options.learning_rate
        if rate is None:
            rate = scaled_rate(5e-5, facts.width)
            notices.append(f"Learning rate {rate:g}: the paper's 5e-05 x 1280 / {facts.width}, the model's width.")
        steps = options.steps
        if steps is None:
            steps = max(300, round(1000 * facts.size / 1024))
            notices.append(f"{steps} steps: the paper's 1000 for 1024 pixels, at {facts.size} pixels (300 at least).")
        return Settings(
            steps=steps,
            learning_rate=rate,
            resolution=options.resolution or facts.size,
            ranks=ranks,
            notices=tuple(notices),
        )

    def trigger(self, name: str, options: BLoraOptions) -> str:
        """One distinct word per name, so that two pictures can meet in a prompt: "A [v12] in [v871] style"."""
        if options.placeholder:
            return options.placeholder
        return f"[v{int(hashlib.sha256(name.encode()).hexdigest(), 16) % 1000}]"

    def prompts(self, name: str, pictures: tuple[TrainingPicture, ...], options: BLoraOptions) -> tuple[str, ...]:
        """The bare placeholder: words about content or style in the prompt would spoil the separation."""
        return (f"A {self.trigger(name, options)}",) * len(pictures)

    def loss(
        self,
        prediction: Tensor,
        target: Tensor,
        snr: Tensor,
        options: BLoraOptions,
        rng: torch.Generator,
        kind: Prediction = "epsilon",
    ) -> Tensor:
        return (prediction - target).square().mean()

    def parts(self, layers: Mapping[str, LowRank]) -> Mapping[Role, Mapping[str, LowRank]]:
        return {
            "content": {path: layer for path, layer in layers.items() if f".{CONTENT}" in path},
            "style": {path: layer for path, layer in layers.items() if f".{STYLE}" in path},
        }


RECIPE = BLora()
