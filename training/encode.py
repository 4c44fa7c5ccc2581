"""Pictures to latents and prompts to embeddings, once before training; both stay in memory."""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..pipelines.errors import InputError
from ..pipelines.events import CancelToken, Event, Notice, Progress
from ..pipelines.picture import open_picture
from ..pipelines.requests import TrainingPicture
from . import data
from .recipe import Settings

if TYPE_CHECKING:
    from ..pipelines.models import Model

NOTABLE = 1.25  # enlarging by less is not worth a word
CROPS = 4  # random crops kept of each picture: enough to vary, few enough to keep in memory


@dataclass(frozen=True)
class Example:
    """One picture, in all its crops and mirrored forms.

    Args:
        mean: `(variants, channels, height / 8, width / 8)`, scaled as the denoiser wants them, float32.
        deviation: Same shape, of the autoencoder's distribution; None if it gives points.
        time_ids: `(variants, 6)`, SDXL's size conditioning.
        size: (width, height) in pixels.
        prompt: Index into `Cache.prompts`.
    """

    mean: Tensor
    deviation: Tensor | None
    time_ids: Tensor
    size: tuple[int, int]
    prompt: int


@dataclass(frozen=True)
class Text:
    """Embeddings of one prompt: `(tokens, width)`, and SDXL's pooled `(width,)`."""

    tokens: Tensor
    pooled: Tensor | None

    def to(self, device: torch.device) -> Text:
        return Text(self.tokens.to(device), None if self.pooled is None else self.pooled.to(device))


@dataclass(frozen=True)
class Cache:
    """Everything the loop needs besides the denoiser; the last of `prompts` is the empty one."""

    examples: tuple[Example, ...]
    prompts: tuple[Text, ...]


def encode(
    model: Model,
    pictures: Sequence[TrainingPicture],
    prompts: Sequence[str],
    settings: Settings,
    seed: int,
    token: CancelToken,
) -> Generator[Event, None, Cache]:
    """Encode everything; yields progress, returns the cache.

    Args:
        model: On its device; the cache goes there too.
        pictures: To learn from.
        prompts: One for each picture.
        settings: Resolution, cropping, mirroring.
        seed: Random crops follow from it.
        token: Checked once per picture.

    Raises:
        InputError: A picture cannot be opened, or its latents are not numbers.
    """
    texts = [*dict.fromkeys(prompts), ""]
    components, device = model.components, model.device
    encoded, cut = encode_prompts(components, texts)
    encoded = [text.to(device) for text in encoded]
    if components["settings"].get("force_zeros_for_empty_prompt"):  # how SDXL was taught to go without a caption
        last = encoded[-1]
        encoded[-1] = Text(last.tokens * 0, None if last.pooled is None else last.pooled * 0)
    for text in cut:
        yield Notice(text=f"The model reads only the first 75 tokens of the caption {text[:60]!r}...")
    step = pixel_step(components)
    examples: list[Example] = []
    for index, picture in enumerate(pictures):
        token.check()
        image = open_picture(picture.path)
        size = data.bucket(image.size, settings.resolution, step, settings.enlarge)
        crops = CROPS if settings.crop == "random" else 1
        rng = random.Random(f"{seed}:crop:{index}") if settings.crop == "random" else None
        plans = [data.fit(image.size, size, rng) for _ in range(crops)]
        pixels = torch.stack([_pixels(data.apply(image, plan)) for plan in plans])  # (crops, 3, height, width)
        ids = torch.tensor([plan.time_ids for plan in plans], dtype=torch.float32, device=device)
        if settings.flip:
            pixels, ids = torch.cat([pixels, pixels.flip(-1)]), torch.cat([ids, ids])
        mean, deviation = encode_pixels(components["vae"], pixels)
        if not torch.isfinite(mean).all():
            raise InputError(f"The model's autoencoder gives no numbers for {picture.path}.", "Leave that picture out.")
        if plans[0].enlarged > NOTABLE:
            yield Notice(text=f"{_name(picture)} is small and was enlarged {plans[0].enlarged:.1f} times.")
        mean, deviation = mean.to(device), None if deviation is None else deviation.to(device)
        examples.append(Example(mean, deviation, ids, size, texts.index(prompts[index])))
        yield Progress(stage="encode", step=index + 1, total=len(pictures))
    return Cache(tuple(examples), tuple(encoded))


def _name(picture: TrainingPicture) -> str:
    return picture.path.replace("\\", "/").rpartition("/")[2]


def pixel_step(components: Mapping[str, Any]) -> int:
    """Multiple of pixels that passes the autoencoder and every level of the U-Net without a remainder."""
    return vae_factor(components["vae"]) * 2 ** (len(components["unet"].config["block_out_channels"]) - 1)


def vae_factor(vae: Any) -> int:  # noqa: ANN401 - AutoencoderKL or AutoencoderTiny
    """Pixels per latent, along one side."""
    blocks = vae.config.get("block_out_channels") or vae.config["encoder_block_out_channels"]
    return 2 ** (len(blocks) - 1)


def _pixels(image: Any) -> Tensor:  # noqa: ANN401 - PIL.Image
    import numpy

    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float() / 127.5 - 1  # (3, height, width)


@torch.no_grad()
def encode_pixels(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401
    """Encode in float32 (SDXL's autoencoder overflows in float16) and scale as the denoiser wants it.

    Args:
        vae: AutoencoderKL, or AutoencoderTiny, which gives points instead of a distribution.
        pixels: `(batch, 3, height, width)` in -1..1.

    Returns:
        Mean and deviation, `(batch, channels, height / 8, width / 8)`; deviation None for points.
    """
    before = vae.dtype
    if before != torch.float32:
        vae.to(torch.float32)
    try:
        pixels = pixels.to(vae.device)
        shift, scale = _affine(vae)
        means: list[Tensor] = []
        deviations: list[Tensor] = []
        for picture in pixels.split(1):
            output = vae.encode(picture)
            if hasattr(output, "latents"):
                means.append((output.latents - shift) * scale)
            else:
                means.append((output.latent_dist.mean - shift) * scale)
                deviations.append(output.latent_dist.std * scale)
        return torch.cat(means), torch.cat(deviations) if deviations else None
    finally:
        if before != torch.float32:
            vae.to(before)


def _affine(vae: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Give what SD1.5 and SDXL subtract from and multiply latents with (they know no `shift_factor`)."""
    config, device = vae.config, vae.device
    factor = float(config.get("scaling_factor") or 1)
    means, deviations = config.get("latents_mean"), config.get("latents_std")
    if means is not None and deviations is not None:
        return (
            torch.tensor(means, device=device).view(1, -1, 1, 1),
            factor / torch.tensor(deviations, device=device).view(1, -1, 1, 1),
        )
    return torch.tensor(0.0, device=device), torch.tensor(factor, device=device)


@torch.no_grad()
def encode_prompts(components: Mapping[str, Any], texts: Sequence[str]) -> tuple[list[Text], list[str]]:
    """Encode prompts as SD1.5 (one encoder) or SDXL (two, last but one hidden states) do.

    Returns:
        One `Text` per prompt, and the prompts that were longer than the encoders can read.
    """
    encoders = [(components["tokenizer"], components["text_encoder"])] if components.get("text_encoder") else []
    sdxl = components.get("text_encoder_2") is not None
    if sdxl:
        encoders.append((components["tokenizer_2"], components["text_encoder_2"]))
    made: list[Text] = []
    cut: list[str] = []
    for text in texts:
        tokens: list[Tensor] = []
        pooled: Tensor | None = None
        for tokenizer, encoder in encoders:
            length = tokenizer.model_max_length
            ids = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            if len(tokenizer(text).input_ids) > length and text not in cut:
                cut.append(text)
            output = encoder(ids.input_ids.to(encoder.device), output_hidden_states=sdxl)
            tokens.append((output.hidden_states[-2] if sdxl else output[0])[0])  # (tokens, width)
            pooled = output[0][0] if sdxl else None  # the last encoder's: (width,)
        made.append(Text(torch.cat(tokens, dim=-1), pooled))
    return made, cut
