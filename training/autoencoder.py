"""Train Mini's autoencoder: 8x down to eight channels with zero mean and unit variance, so no scaling is needed.

The loss is L1 + L2 + L1 of image gradients on random crops; a small penalty pulls each latent channel towards zero
mean and unit variance, and what is left of scale and shift is folded into the encoder's last layer before the
decoder's last steps, which then see exactly the latents that generation will see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .mini import Part
from .scenes import Bank, Planner


@dataclass(frozen=True)
class AutoencoderOptions:
    """How to train the autoencoder: first both halves, then, on its final latents, the decoder alone."""

    steps: int = 10000
    decoder_steps: int = 5000
    batch: int = 64
    crop: int = 64
    learning_rate: float = 1e-3
    seed: int = 0
    latent_noise: float = 0.03  # makes the decoder forgive small errors of the denoiser


def reconstruction_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """L1 + L2 + L1 of horizontal and vertical differences; all `(batch, 3, height, width)`."""
    difference = made - wanted
    across, down = difference.diff(dim=-1).abs().mean(), difference.diff(dim=-2).abs().mean()
    return difference.abs().mean() + difference.square().mean() + across + down


def crops(pictures: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    """One random square of `size` pixels of each picture."""
    room = pictures.shape[-1] - size
    places = rng.integers(0, room + 1, size=(len(pictures), 2))
    return torch.stack(
        [p[:, y : y + size, x : x + size] for p, (y, x) in zip(pictures, places, strict=True)]
    )  # (batch, 3, size, size)


@torch.no_grad()
def whiten(vae: Part, pictures: Tensor) -> None:
    """Fold per-channel mean and deviation of the latents of `pictures` into the encoder's last layer."""
    latents = torch.cat([vae.encode(part).latents for part in pictures.split(64)])
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    last = vae.encoder.layers[-1]
    last.weight.div_(deviation[:, None, None, None])
    last.bias.sub_(mean).div_(deviation)


@torch.no_grad()
def psnr(vae: Part, pictures: Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB of whole pictures after a round trip."""
    values: list[Tensor] = []
    for part in pictures.split(32):
        back = vae.decode(vae.encode(part).latents).sample.clamp(-1, 1)
        values.append(-10 * torch.log10(((back - part) / 2).square().mean((1, 2, 3)).clamp_min(1e-8)))
    return float(torch.cat(values).mean())


def train_encoder(
    vae: Part, bank: Bank, planner: Planner, options: AutoencoderOptions, report: Callable[[str], None]
) -> None:
    """Train both halves in place on the bank's device, then whiten the latents; the encoder is final after this.

    Args:
        vae: The untrained autoencoder.
        bank: Pictures.
        planner: Draws what is shown.
        options: How long and how.
        report: Gets a line of text now and then.
    """
    _train(vae, bank, planner, options, report, joint=True)
    with torch.no_grad():
        whiten(vae, bank.render(planner.draw(1024, np.random.default_rng(options.seed + 1))))


def train_decoder(
    vae: Part, bank: Bank, planner: Planner, options: AutoencoderOptions, report: Callable[[str], None]
) -> None:
    """Train the decoder alone, in place, on the final latents; same arguments as `train_encoder`."""
    _train(vae, bank, planner, options, report, joint=False)


def _train(
    vae: Part,
    bank: Bank,
    planner: Planner,
    options: AutoencoderOptions,
    report: Callable[[str], None],
    *,
    joint: bool,
) -> None:
    device, rng = bank.pixels.device, np.random.default_rng(options.seed + 2 * (not joint))
    gpu, steps = device.type == "cuda", options.steps if joint else options.decoder_steps
    vae.to(device, memory_format=torch.channels_last).train().encoder.requires_grad_(joint)
    encode, decode = (torch.compile(half) if gpu else half for half in (vae.encoder, vae.decoder))
    learned = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=options.learning_rate, weight_decay=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, steps, pct_start=0.05)
    noise = torch.Generator(device).manual_seed(options.seed)
    pictures = torch.empty(0)
    for step in range(steps):
        if step % 4 == 0:  # drawing costs more than a crop: each drawing serves four steps
            pictures = bank.render(planner.draw(options.batch, rng))
        batch = crops(pictures, options.crop, rng).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            latents = encode(batch)
            shake = torch.randn(latents.shape, generator=noise, device=device, dtype=latents.dtype)
            made = decode(latents + options.latent_noise * shake)
        loss = reconstruction_loss(made.float(), batch)
        flat = latents.float().transpose(0, 1).flatten(1)  # (channels, everything else)
        penalty = flat.mean(1).square().mean() + (flat.std(1) - 1).square().mean()
        optimizer.zero_grad(set_to_none=True)
        (loss + 0.02 * penalty if joint else loss).backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            report(f"{'autoencoder' if joint else 'decoder'} step {step} of {steps}: loss {float(loss.detach()):.4f}")
    vae.requires_grad_(True).eval()
