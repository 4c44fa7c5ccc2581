"""LoRA: a subject, a character or a style from a folder of captioned pictures.

Papers: LoRA, arXiv:2106.09685; loss weighting, min-SNR: arXiv:2303.09556 (equations for noise and v prediction).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from ...pipelines.adapter_types import Role
from ...pipelines.errors import InputError
from ...pipelines.options import option
from ...pipelines.requests import TrainingPicture
from ..recipe import ModelFacts, Prediction, Settings, TrainingOptions, capped, narrowed, scaled_rate

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ...pipelines.adapter_types import LowRank

ATTENTION = r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"
FEED_FORWARD = r".*\.ff\.net\.(0\.proj|2)"
LAYERS = {
    "attention": re.compile(ATTENTION),
    "attention+feed-forward": re.compile(f"{ATTENTION}|{FEED_FORWARD}"),
}


class LoraOptions(TrainingOptions):
    """Options of LoRA training."""

    rank: int = option(16, label="Rank", help="Capped at a quarter of a layer's width.", low=1, high=512)
    alpha: float | None = option(None, label="Alpha", help="Scale is alpha / rank. Empty: as rank.", low=0.01, high=512)
    layers: Literal["attention", "attention+feed-forward"] = option(
        "attention", label="Layers", help="Which layers learn; feed-forward layers make the file larger."
    )
    trigger: str = option(
        "", label="Trigger", help="Word put before every caption that lacks it; it calls the result.", high=80
    )
    batch: int = option(1, label="Batch", help="Pictures per step.", low=1, high=64)
    warmup: int = option(0, label="Warm-up", help="Steps in which the learning rate rises.", low=0, high=10_000)
    weight_decay: float = option(1e-4, label="Weight decay", help="AdamW's.", low=0, high=1)
    min_snr: float = option(
        0.0, label="Min-SNR gamma", help="Weighs easy noise levels down; 5 is usual, 0 is off.", low=0, high=100
    )
    caption_dropout: float = option(
        0.0, label="Caption dropout", help="Share of pictures shown without caption.", low=0, high=1
    )
    flip: bool = option(False, label="Mirror", help="Also learn from mirrored pictures; not for text or faces.")
    crop: Literal["centre", "random"] = option(
        "centre", label="Crop", help="Part kept when a picture does not fit its bucket's shape."
    )
    enlarge: bool = option(True, label="Enlarge small pictures", help="Off: small pictures train at their own size.")


class Lora:
    """Train the attention layers (and feed-forward layers, if asked) of the whole denoiser."""

    name = "lora"
    title = "LoRA from a folder of pictures"
    paper = "arXiv:2106.09685"
    families = ("sd15", "sdxl")
    options = LoraOptions

    def check(self, pictures: tuple[TrainingPicture, ...], options: LoraOptions) -> None:
        if not pictures:
            raise InputError("There is no picture to learn from.", "Give a folder, a zip or some pictures.")
        if options.steps is not None and options.warmup >= options.steps:
            raise InputError(
                f"warmup cannot be {options.warmup}: the run has only {options.steps} steps.", "Lower the warm-up."
            )

    def targets(self, family: str, layers: Mapping[str, tuple[int, ...]], options: LoraOptions) -> Mapping[str, int]:
        if family not in self.families:
            raise InputError(
                f"LoRA training is not available for {family} models yet.", "Choose an SD1.5 or SDXL model, or Mini."
            )
        pattern = LAYERS[options.layers]
        chosen = {path: capped(options.rank, shape) for path, shape in layers.items() if pattern.fullmatch(path)}
        if not chosen:
            raise InputError("This model has no attention layers to train.", "Choose an SD1.5 or SDXL model.")
        return chosen

    def settings(self, facts: ModelFacts, options: LoraOptions) -> Settings:
        ranks = self.targets(facts.family, facts.layers, options)
        notices = narrowed(ranks, options.rank)
        rate = options.learning_rate
        if rate is None:
            rate = scaled_rate(1e-4, facts.width)
            notices.append(f"Learning rate {rate:g}: the usual 0.0001 x 1280 / {facts.width}, the model's width.")
        steps = options.steps
        if steps is None:
            steps = min(2000, max(300, 100 * facts.pictures // options.batch))
            notices.append(f"{steps} steps: 100 views of each picture, between 300 and 2000 steps.")
        return Settings(
            steps=steps,
            learning_rate=rate,
            resolution=options.resolution or facts.size,
            ranks=ranks,
            scale=1.0 if options.alpha is None else options.alpha / options.rank,
            batch=options.batch,
            warmup=options.warmup,
            weight_decay=options.weight_decay,
            flip=options.flip,
            crop=options.crop,
            enlarge=options.enlarge,
            caption_dropout=options.caption_dropout,
            notices=tuple(notices),
        )

    def trigger(self, name: str, options: LoraOptions) -> str:
        return options.trigger

    def prompts(self, name: str, pictures: tuple[TrainingPicture, ...], options: LoraOptions) -> tuple[str, ...]:
        return tuple(_prompt(picture.caption.strip(), options.trigger.strip()) for picture in pictures)

    def loss(
        self,
        prediction: Tensor,
        target: Tensor,
        snr: Tensor,
        options: LoraOptions,
        rng: torch.Generator,
        kind: Prediction = "epsilon",
    ) -> Tensor:
        error = (prediction - target).square().flatten(1).mean(dim=1)  # (batch,)
        return (error * min_snr_weight(snr, options.min_snr, kind)).mean() if options.min_snr else error.mean()

    def parts(self, layers: Mapping[str, LowRank]) -> Mapping[Role, Mapping[str, LowRank]]:
        return {"concept": dict(layers)}


def min_snr_weight(snr: Tensor, gamma: float, kind: Prediction) -> Tensor:
    """Weigh the loss of each item so that, in terms of the clean picture, it counts min(SNR, gamma) times.

    Args:
        snr: `(batch,)`; may be 0, so nothing divides by it: min(SNR, gamma) / SNR is 1 up to gamma.
        gamma: Greater than 0.
        kind: min(SNR, gamma) / SNR for noise, / (SNR + 1) for v, as it is for the clean picture.
    """
    if kind == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    if kind == "sample":
        return snr.clamp(max=gamma)
    return gamma / snr.clamp(min=gamma)


def _prompt(caption: str, trigger: str) -> str:
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


RECIPE = Lora()
