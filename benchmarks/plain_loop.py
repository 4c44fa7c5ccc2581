"""The baseline of `train_blora`: a LoRA training loop with the structure of diffusers' DreamBooth script for SDXL.

In our own words, options left out. What the script does per step is done per step here, what it does once is done once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from intarsia.pipelines.sources import native_size, resolve
from peft import LoraConfig
from PIL import Image
from PIL.ImageOps import exif_transpose
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Parts:
    """A loaded pipeline and what the loop asks of it; `resolution` in pixels is the model's own."""

    pipeline: Any
    resolution: int

    @property
    def unet(self) -> Any:  # noqa: ANN401 - a diffusers model
        return self.pipeline.unet


@dataclass(frozen=True)
class Wish:
    """What to train: layer path to rank, resolution in pixels, and the rest of the script's arguments."""

    ranks: Mapping[str, int]
    resolution: int
    learning_rate: float
    steps: int
    prompt: str
    seed: int


class PictureDataset(Dataset[dict[str, Any]]):
    """One picture, resized and cropped once, given again and again."""

    def __init__(self, path: Path, resolution: int) -> None:
        image = exif_transpose(Image.open(path)).convert("RGB")
        self.original = (image.height, image.width)
        scale = resolution / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
        top, left = (image.height - resolution) // 2, (image.width - resolution) // 2
        image = image.crop((left, top, left + resolution, top + resolution))
        self.top_left = (top, left)
        raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        self.pixels = raw.view(resolution, resolution, 3).permute(2, 0, 1).float() / 127.5 - 1  # (3, height, width)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixels": self.pixels, "original": self.original, "top_left": self.top_left}


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    pixels = torch.stack([example["pixels"] for example in examples]).contiguous().float()
    return {"pixels": pixels, "sizes": [(one["original"], one["top_left"]) for one in examples]}


def load(model: str) -> Parts:
    """Load a folder with plain diffusers; the resolution is the one Intarsia trains at."""
    source = resolve(model)
    if source.path is None:
        raise SystemExit("The benchmark wants a model that is a folder.")
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(source.path)
    return Parts(pipeline, min(native_size(source)))


def linear_layers(unet: nn.Module) -> dict[str, tuple[int, ...]]:
    return {path: tuple(m.weight.shape) for path, m in unet.named_modules() if isinstance(m, nn.Linear)}


def train(parts: Parts, picture: Path, wish: Wish) -> Iterator[float]:
    """Train; yields the loss of each step.

    The script's order: freeze, add layers, optimizer, data, embed the prompt once, prepare, loop.
    """
    torch.manual_seed(wish.seed)
    accelerator = Accelerator(gradient_accumulation_steps=1, cpu=True)
    unet, vae = parts.pipeline.unet, parts.pipeline.vae
    for module in (unet, vae, parts.pipeline.text_encoder, parts.pipeline.text_encoder_2):
        module.requires_grad_(False)
    scheduler = DDPMScheduler.from_config(parts.pipeline.scheduler.config)
    add_layers(unet, wish.ranks)
    learned = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer: Any = torch.optim.AdamW(learned, lr=wish.learning_rate, weight_decay=1e-4)
    loader: Any = DataLoader(PictureDataset(picture, wish.resolution), 1, shuffle=True, collate_fn=collate)
    with torch.no_grad():
        embeds, _, pooled, _ = parts.pipeline.encode_prompt(wish.prompt, do_classifier_free_guidance=False)
    rates: Any = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=0, num_training_steps=wish.steps)
    unet, optimizer, loader, rates = accelerator.prepare(unet, optimizer, loader, rates)
    bar: Any = tqdm(range(wish.steps), desc="Steps")
    unet.train()
    done = 0
    while done < wish.steps:
        for batch in loader:
            with accelerator.accumulate(unet):
                loss = loss_of(unet, vae, scheduler, batch, (embeds, pooled, wish.resolution))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(learned, 1.0)
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
            bar.update(1)
            shown = {"loss": loss.detach().item(), "lr": rates.get_last_lr()[0]}
            bar.set_postfix(**shown)
            done += 1
            yield shown["loss"]
            if done >= wish.steps:
                break
    accelerator.end_training()


def add_layers(unet: Any, ranks: Mapping[str, int]) -> None:  # noqa: ANN401 - a diffusers model
    """Add PEFT layers at the ranks given; gaussian factors, alpha equal to the rank."""
    most = max(ranks.values())
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        init_lora_weights="gaussian",
        target_modules=list(ranks),
        rank_pattern=dict(ranks),
        alpha_pattern=dict(ranks),
    )
    unet.add_adapter(config)


def loss_of(unet: Any, vae: Any, scheduler: Any, batch: dict[str, Any], once: tuple[Tensor, Tensor, int]) -> Tensor:  # noqa: ANN401 - diffusers models
    """One step's loss: encode, add noise, predict, mean square.

    Args:
        unet: The denoiser with the layers in it.
        vae: The autoencoder.
        scheduler: DDPM, for noise and targets.
        batch: From the loader.
        once: Prompt embeddings `(1, tokens, width)`, pooled `(1, width)`, the resolution in pixels.
    """
    embeds, pooled, resolution = once
    latents = encoded(vae, batch["pixels"].to(dtype=vae.dtype))
    noise = torch.randn_like(latents)
    count = latents.shape[0]
    timesteps = torch.randint(0, scheduler.config["num_train_timesteps"], (count,), device=latents.device).long()
    noisy = scheduler.add_noise(latents, noise, timesteps)
    ids = torch.cat([size_ids(original, top_left, resolution, latents) for original, top_left in batch["sizes"]])
    added = {"time_ids": ids, "text_embeds": pooled.repeat(count, 1)}
    predicted = unet(noisy, timesteps, embeds.repeat(count, 1, 1), added_cond_kwargs=added, return_dict=False)[0]
    velocity = scheduler.config["prediction_type"] == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    return functional.mse_loss(predicted.float(), target.float(), reduction="mean")


@torch.no_grad()
def encoded(vae: Any, pixels: Tensor) -> Tensor:  # noqa: ANN401 - AutoencoderKL or AutoencoderTiny
    """Encode pictures `(batch, 3, height, width)`; AutoencoderTiny has no distribution to draw from."""
    output = vae.encode(pixels)
    latents: Tensor = output.latents if hasattr(output, "latents") else output.latent_dist.sample()
    return latents * vae.config["scaling_factor"]  # (batch, channels, height / 8, width / 8)


def size_ids(original: tuple[int, int], top_left: tuple[int, int], resolution: int, like: Tensor) -> Tensor:
    return torch.tensor([[*original, *top_left, resolution, resolution]], device=like.device, dtype=like.dtype)
