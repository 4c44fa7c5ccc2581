"""Small pictures of latents while they are denoised, by a linear map fitted once per model instead of the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .atomic import replacing

CELLS = 16  # latents per side of the fitting picture
PATCH = 2  # latents per side of a patch of one colour
SIDE = 128  # pixels of the longer side of a preview
FILES = 8  # names in turn, so that a viewer is never given a file under its feet


@dataclass(frozen=True)
class LatentColours:
    """Colour of a latent cell: RGB = z @ matrix + offset, in -1..1.

    Args:
        matrix: `(channels, 3)`, float32 on the CPU.
        offset: `(3,)`.
    """

    matrix: Tensor
    offset: Tensor

    def picture(self, latents: Tensor) -> Image.Image:
        """Show the first of `(batch, channels, height, width)` latents."""
        z = latents[0].detach().float().cpu()  # (channels, height, width)
        rgb = torch.einsum("chw,cr->hwr", z, self.matrix) + self.offset
        pixels = ((rgb + 1) * 127.5).clamp(0, 255).nan_to_num().to(torch.uint8)  # (height, width, 3)
        image = Image.fromarray(pixels.numpy())
        scale = SIDE / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        return image.resize(size, Image.Resampling.BILINEAR)


@torch.no_grad()
def fit(vae: Any, device: torch.device) -> LatentColours:  # noqa: ANN401 - AutoencoderKL or AutoencoderTiny
    """Fit the map to one picture of coloured patches that the model's own autoencoder encodes.

    Args:
        vae: In float32.
        device: Where it computes.
    """
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)  # pixels per latent
    generator = torch.Generator().manual_seed(0)
    cells = torch.rand(1, 3, CELLS // PATCH, CELLS // PATCH, generator=generator) * 2 - 1
    pixels = torch.nn.functional.interpolate(cells, scale_factor=PATCH * factor, mode="nearest")
    encoded = vae.encode(pixels.to(device, vae.dtype))
    z = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    z = (z - (vae.config.get("shift_factor") or 0.0)) * vae.config["scaling_factor"]
    known = z[0].flatten(1).T.double().cpu()  # (cells, channels)
    known = torch.cat([known, torch.ones(len(known), 1, dtype=known.dtype)], 1)
    colours = torch.nn.functional.interpolate(cells, scale_factor=PATCH, mode="nearest")
    wanted = colours[0].flatten(1).T.double()  # (cells, 3)
    # ridge: a channel that hardly varies must not get a huge factor that shows as colour noise
    normal = known.T @ known + 1e-3 * len(known) * torch.eye(known.shape[1], dtype=known.dtype)
    solved = torch.linalg.solve(normal, known.T @ wanted).float()
    return LatentColours(solved[:-1].contiguous(), solved[-1].contiguous())


def save(image: Image.Image, folder: Path, index: int) -> Path:
    """Write a preview under the next name, whole or not at all."""
    path = folder / f"preview-{index % FILES}.jpg"
    with replacing(path) as temporary:
        image.save(temporary, "JPEG", quality=85)
    return path
