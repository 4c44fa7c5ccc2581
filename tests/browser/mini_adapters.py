"""Adapter files for Mini in the dialects people meet, strong enough to change its pictures."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from adapter_files import Arrays, Shapes, attention, kohya, lora, lycoris, peft, write
from intarsia.pipelines.identify import HALVES
from intarsia.pipelines.sources import resolve, unet_shapes
from PIL import Image
from safetensors.numpy import load_file

RANK = 4
SHEET = Path(__file__).parents[2] / "assets" / "sheets" / "mini_sheet.png"


def layers() -> Shapes:
    """Mini's attention projections."""
    return {name.removesuffix(".weight"): shape for name, shape in attention(unet_shapes(resolve("mini"))).items()}


def thumbnail(column: int, row: int) -> dict[str, str]:
    """A picture of Mini's sheet, as files carry one in their header."""
    left, top = 110 + 128 * column, 22 + 128 * row
    buffer = io.BytesIO()
    Image.open(SHEET).crop((left, top, left + 128, top + 128)).save(buffer, "PNG")
    return {"modelspec.thumbnail": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()}


def loha(shapes: Shapes, seed: int) -> Arrays:
    """LoHa factors in LyCORIS' names."""
    random = np.random.default_rng(seed)
    tensors: Arrays = {}
    for path, (out, inner) in shapes.items():
        stem = lycoris(path)[0].removesuffix(".lora_down.weight")
        for part, shape in (("a", (out, RANK)), ("b", (RANK, inner))):
            for number in "12":
                tensors[f"{stem}.hada_w{number}_{part}"] = (random.standard_normal(shape) * 0.2).astype(np.float32)
        tensors[f"{stem}.alpha"] = np.array(RANK, np.float32)
    return tensors


def lokr(shapes: Shapes, seed: int) -> Arrays:
    """LoKr factors in LyCORIS' names: a small whole one and a large one of low rank."""
    random = np.random.default_rng(seed)
    tensors: Arrays = {}
    for path, (out, inner) in shapes.items():
        stem = lycoris(path)[0].removesuffix(".lora_down.weight")
        sizes = {"w1": (4, 4), "w2_a": (out // 4, RANK), "w2_b": (RANK, inner // 4)}
        for part, shape in sizes.items():
            tensors[f"{stem}.lokr_{part}"] = (random.standard_normal(shape) * 0.2).astype(np.float32)
        tensors[f"{stem}.alpha"] = np.array(RANK, np.float32)
    return tensors


def dora(shapes: Shapes, seed: int) -> Arrays:
    """LoRA factors in PEFT's names with the lengths of the model's own rows."""
    folder = resolve("mini").path
    assert folder is not None
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    tensors = lora(shapes, peft, rank=RANK, alpha=RANK, seed=seed, scale=0.08)
    for path in shapes:
        own = weights[path.removeprefix("unet.") + ".weight"].astype(np.float32)
        tensors[f"{path}.lora_magnitude_vector"] = np.linalg.norm(own.reshape(len(own), -1), axis=1)
    return tensors


def six_dialects(folder: Path) -> list[Path]:
    """Write kohya, PEFT, LoHa, LoKr, DoRA and a whole B-LoRA."""
    every = layers()
    halves = {path: shape for path, shape in every.items() if path.startswith(tuple(HALVES.values()))}
    moss = {**thumbnail(0, 9), "modelspec.trigger_phrase": "moss painting", "modelspec.license": "CC-BY-4.0"}
    return [
        write(folder / "moss-painting.safetensors", lora(every, kohya, RANK, 2.0, 1, scale=0.12), moss),
        write(folder / "ink-wash.safetensors", lora(every, peft, RANK, None, 2, scale=0.1), thumbnail(3, 5)),
        write(folder / "fern-press.safetensors", loha(every, 3), thumbnail(1, 4)),
        write(folder / "slate-cut.safetensors", lokr(every, 4), thumbnail(2, 0)),
        write(folder / "ember-glow.safetensors", dora(every, 5), thumbnail(4, 6)),
        write(folder / "velvet-fox.safetensors", lora(halves, peft, RANK, None, 6, scale=0.2), thumbnail(1, 9)),
    ]
