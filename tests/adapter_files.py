"""Adapter files made by tests: any tensor names, any header, in the dialects people meet."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from intarsia.pipelines.adapter_types import AdapterFile, LowRank
from intarsia.pipelines.architectures import reference
from numpy.typing import NDArray
from safetensors.numpy import save_file

Arrays = dict[str, NDArray[Any]]
Shapes = Mapping[str, tuple[int, ...]]
Spelling = Callable[[str], tuple[str, str, str]]


def low_rank(adapter: AdapterFile) -> dict[str, LowRank]:
    """The layers of an adapter that holds nothing but low-rank factors."""
    found = {path: layer for path, layer in adapter.layers.items() if isinstance(layer, LowRank)}
    assert found.keys() == adapter.layers.keys()
    return found


def matrices(family: str) -> dict[str, tuple[int, ...]]:
    """The layers of a family that a LoRA can sit on: linear ones and convolutions."""
    return {path: shape for path, shape in reference(family).shapes.items() if len(shape) > 1}


def write(path: Path, tensors: Arrays, metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, path, metadata)
    return path


def write_raw(path: Path, header: object, body: bytes = b"", length: int | None = None) -> Path:
    """Write a file with any header: an object becomes JSON, text and bytes go in as they are."""
    raw = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + body)
    return path


def peft(path: str) -> tuple[str, str, str]:
    return f"{path}.lora_A.weight", f"{path}.lora_B.weight", f"{path}.alpha"


def default_peft(path: str) -> tuple[str, str, str]:
    return f"{path}.lora_A.default.weight", f"{path}.lora_B.default.weight", f"{path}.alpha"


def lycoris(path: str) -> tuple[str, str, str]:
    stem = "lycoris_" + path.partition(".")[2].replace(".", "_")
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"


def old_diffusers(path: str) -> tuple[str, str, str]:
    return f"{path}.lora.down.weight", f"{path}.lora.up.weight", f"{path}.alpha"


def linear_layer(path: str) -> tuple[str, str, str]:
    return f"{path}.lora_linear_layer.down.weight", f"{path}.lora_linear_layer.up.weight", f"{path}.alpha"


def wrapped_peft(path: str) -> tuple[str, str, str]:
    inner = path.partition(".")[2]
    return f"base_model.model.{inner}.lora_A.weight", f"base_model.model.{inner}.lora_B.weight", f"{inner}.alpha"


def processor(path: str) -> tuple[str, str, str]:
    """Attention processors, with the component in front or without it."""
    inner = path.partition(".")[2]
    for layer, short in (("to_out.0", "to_out"), ("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v")):
        if inner.endswith(layer):
            stem = f"{inner.removesuffix(layer)}processor.{short}_lora"
            return f"{stem}.down.weight", f"{stem}.up.weight", f"{stem}.alpha"
    raise AssertionError(f"no attention layer: {path}")


def kohya(path: str, text: str = "lora_te1_", unet: str = "lora_unet_") -> tuple[str, str, str]:
    component, _, inner = path.partition(".")
    prefix = {"unet": unet, "text_encoder": text, "text_encoder_2": "lora_te2_"}[component]
    stem = prefix + inner.replace(".", "_")
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"


def lora(
    shapes: Shapes,
    spelling: Spelling,
    rank: int | Callable[[int], int] = 2,
    alpha: float | None = None,
    seed: int = 0,
    scale: float = 0.3,
) -> Arrays:
    """Make random factors for weights of the given shapes; `rank` may depend on the layer's number."""
    random = np.random.default_rng(seed)
    tensors: Arrays = {}
    for number, (path, shape) in enumerate(shapes.items()):
        r = rank(number) if callable(rank) else rank
        down, up, alpha_name = spelling(path)
        tensors[down] = (random.standard_normal((r, *shape[1:])) * scale).astype(np.float32)
        tensors[up] = (random.standard_normal((shape[0], r, *[1] * (len(shape) - 2))) * scale).astype(np.float32)
        if alpha is not None:
            tensors[alpha_name] = np.array(alpha, np.float32)
    return tensors


def attention(
    shapes: Shapes, component: str = "unet", ends: Iterable[str] = ("to_q", "to_k", "to_v", "to_out.0")
) -> Shapes:
    """Only the attention projections of one component."""
    return {
        p: s for p, s in shapes.items() if p.startswith(component + ".") and p.endswith(tuple("." + e for e in ends))
    }
