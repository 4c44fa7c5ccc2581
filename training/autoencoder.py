"""Mini's autoencoder: 8x down to eight channels.

The encoder is computed, not trained: its latents are the whitened principal components of 8x8 patches, which three
strided convolutions without blocks can hold exactly. Latents are so linear in the picture (a mixture of two colours
lies between them, what an early, blurred guess of the denoiser needs), with zero mean and unit variance. The decoder
is trained: L1 + L2 + L1 of image gradients on random crops. It sees more than one patch, and so draws sharper lines
than the components alone hold.
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
    """How to train the decoder."""

    steps: int = 10000
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


def components(pictures: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Whitened principal components of 8x8 patches of `(batch, 3, height, width)` in 0..1.

    Returns:
        Projection `(count, 192)`, whose product with a patch (channel, row, column) less the mean has unit variance,
        and the mean patch `(192,)`.
    """
    patches = torch.nn.functional.unfold(pictures, 8, stride=8).transpose(1, 2).reshape(-1, 192).double()
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    chosen = vectors[:, -count:].flip(1)  # strongest first
    chosen = chosen * chosen.sum(0).sign().where(
        chosen.sum(0) != 0, torch.ones(count).double()
    )  # eigh leaves signs open
    return (chosen / values[-count:].flip(0).sqrt()).T.float(), mean.float()


@torch.no_grad()
def fit_encoder(vae: Part, pictures: Tensor) -> None:
    """Set the encoder's weights so that latents are the whitened principal components of the pictures' patches.

    Each strided convolution copies the four pixels of a 2x2 square into four channels: 3, 12, 48; the last one
    projects. The encoder sees pictures in 0..1.

    Args:
        vae: From `mini.build_autoencoder`.
        pictures: `(batch, 3, height, width)` in -1..1.
    """
    first, *strided, last = [layer for layer in vae.encoder.layers if isinstance(layer, torch.nn.Conv2d)]
    projection, mean = components((pictures + 1) / 2, last.out_channels)
    for parameter in vae.encoder.parameters():
        parameter.zero_()
    for channel in range(3):
        first.weight[channel, channel, 1, 1] = 1
    where = {channel: (channel, 0, 0, 1) for channel in range(3)}  # channel -> colour, row, column, side of its square
    for layer in strided[:2]:
        found: dict[int, tuple[int, int, int, int]] = {}
        for channel, (colour, row, column, side) in where.items():
            for corner in range(4):
                down, across = divmod(corner, 2)
                layer.weight[4 * channel + corner, channel, 1 + down, 1 + across] = 1
                found[4 * channel + corner] = (colour, row + down * side, column + across * side, 2 * side)
        where = found
    patch = projection.reshape(-1, 3, 8, 8)
    for channel, (colour, row, column, side) in where.items():
        for corner in range(4):
            down, across = divmod(corner, 2)
            weights = patch[:, colour, row + down * side, column + across * side]
            strided[2].weight[: len(patch), channel, 1 + down, 1 + across] = weights
    for channel in range(len(patch)):
        last.weight[channel, channel, 1, 1] = 1
    assert last.bias is not None
    last.bias.copy_(-projection @ mean)


@torch.no_grad()
def psnr(vae: Part, pictures: Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB of whole pictures after a round trip."""
    values: list[Tensor] = []
    for part in pictures.split(32):
        back = vae.decode(vae.encode(part).latents).sample.clamp(-1, 1)
        values.append(-10 * torch.log10(((back - part) / 2).square().mean((1, 2, 3)).clamp_min(1e-8)))
    return float(torch.cat(values).mean())


def train_decoder(
    vae: Part, bank: Bank, planner: Planner, options: AutoencoderOptions, report: Callable[[str], None]
) -> None:
    """Train the decoder in place, on the bank's device, in bf16 autocast on a GPU and fp32 on a CPU.

    Args:
        vae: With its encoder fitted.
        bank: Pictures.
        planner: Draws what is shown.
        options: How long and how.
        report: Gets a line of text now and then.
    """
    device, rng = bank.pixels.device, np.random.default_rng(options.seed)
    gpu, steps = device.type == "cuda", options.steps
    vae.to(device, memory_format=torch.channels_last).train().encoder.requires_grad_(False)
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
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            report(f"decoder step {step} of {steps}: loss {float(loss.detach()):.4f}")
    vae.requires_grad_(True).eval()
