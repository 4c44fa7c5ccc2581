"""Read an adapter into canonical layers, and write one so that plain diffusers gives the same picture.

Torch is imported only where tensors are made: the page process may import this module.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapter_types import AdapterFile, Layer, LowRank, Role
from .architectures import ModuleIndex, Shape
from .atomic import replacing
from .dora import Decomposed, magnitude_of, per_output
from .errors import AdapterError
from .headers import Header, read_header
from .identify import HALVES, Report, inspect, yardstick
from .layers import PEFT_KEY, LayerNames, alphas, collect, misfit
from .rows import of_rows

if TYPE_CHECKING:
    import torch

SPEC = "modelspec."
ARCHITECTURES = {"sdxl": "stable-diffusion-xl-v1-base/lora", "sd15": "stable-diffusion-v1/lora"}


def read_adapter(path: Path, shapes: Mapping[str, Shape] | None = None) -> AdapterFile:
    """Read, check and bring to canonical names; factors are float32 on the CPU.

    Args:
        path: A .safetensors file.
        shapes: Weights of the model it will sit on (`sources.unet_shapes`); every layer must then fit. Without it the
            real SD 1.5 and SDXL give the names, and shapes are checked when it is attached.

    Raises:
        AdapterError: The file is unsafe, of a kind that is not supported, holds NaN, or does not fit.
    """
    report = inspect(path, shapes)
    report.require_usable()
    header = read_header(path)
    index = ModuleIndex(shapes) if shapes is not None else yardstick(report.yardstick)
    found = collect(header, index, plain=shapes is None)
    if found.unmatched:
        names = ", ".join(found.unmatched[:3])
        raise AdapterError(
            f"{path.name}: {len(found.unmatched)} of {found.modules} layers are unknown: {names}.",
            "Read it together with the model it was made for.",
        )
    cut = [
        problem for name, names in found.layers.items() if names.piece.rows and (problem := misfit(header, name, names))
    ]
    if cut:  # which rows are whose is known for the model it was made for alone
        raise AdapterError(f"{path.name}: {cut[0]}.", "Read it together with the model it was made for.")
    scales, _ = alphas(header, found)
    layers = {name: _layer(header, names, scales.get(name)) for name, names in found.layers.items()}
    return _adapter(report, layers, {word: _tensor(header, word) for word in found.words})


def _adapter(report: Report, layers: Mapping[str, Layer], words: Mapping[str, torch.Tensor]) -> AdapterFile:
    return AdapterFile(
        path=report.path,
        family=report.family,
        role=report.role,
        trigger=report.trigger,
        layers=layers,
        sha256=report.sha256,
        metadata=report.metadata,
        words=words,
    )


def _layer(header: Header, names: LayerNames, alpha: float | None) -> Layer:
    target = names.piece.whole or None
    values = {part: _tensor(header, name) for part, name in names.parts.items()}
    layer = names.kind.read({part: values[part] for part in names.own}, alpha, target)
    part = magnitude_of(names.shapes(header))
    if part is not None:
        layer = Decomposed(layer, values[part].flatten(), per_output(part, tuple(values[part].shape), target))
    return of_rows(layer, names.piece.rows, names.piece.whole) if names.piece.rows else layer


def _tensor(header: Header, name: str) -> torch.Tensor:
    import torch

    return torch.from_numpy(header.values(name)).float()


def half(adapter: AdapterFile, role: Role) -> AdapterFile:
    """Cut the content or style half out of a B-LoRA, or of any SDXL adapter.

    Raises:
        AdapterError: The adapter has no layers in that half's block.
    """
    prefix = HALVES.get(role)
    layers = {name: layer for name, layer in adapter.layers.items() if prefix and name.startswith(prefix)}
    if not layers or adapter.family != "sdxl":
        raise AdapterError(f"{adapter.path.name} has no {role} half.", "Only SDXL adapters have content and style.")
    return replace(adapter, role=role, layers=layers)


def card(
    family: str,
    *,
    role: Role = "concept",
    base: str = "",
    trigger: str = "",
    title: str = "",
    base_hash: str = "",
    licence: str = "",
) -> dict[str, str]:
    """Make the header texts `write_adapter` understands; empty ones are left out."""
    texts = {
        "intarsia.family": family,
        "intarsia.role": role,
        "intarsia.base": base,
        "intarsia.trigger": trigger,
        SPEC + "title": title,
        SPEC + "trigger_phrase": trigger,
        SPEC + "architecture": ARCHITECTURES.get(family, ""),
        SPEC + "license": licence,
        "intarsia.base_hash": base_hash,
    }
    return {key: text for key, text in texts.items() if text}


def write_adapter(
    path: Path, layers: Mapping[str, LowRank], metadata: Mapping[str, str], dtype: torch.dtype | None = None
) -> None:
    """Write layers in diffusers-PEFT names, atomically; the same layers give the same bytes.

    `lora_adapter_metadata` carries ranks and alphas, so that plain `load_lora_weights` applies the right scale.

    Args:
        path: Where to write; the folder must exist.
        layers: Canonical path (`unet.up_blocks...to_q`) to factors, any device.
        metadata: Texts for the header, best made by `card`.
        dtype: What to store, such as `torch.float16`; None keeps each tensor's own.

    Raises:
        AdapterError: There are no layers, or a value is NaN or infinite.
    """
    if not layers:
        raise AdapterError("There are no layers to write.", "Train at least one step first.")
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        for part, tensor in (
            ("lora_A.weight", layer.down),
            ("lora_B.weight", layer.up),
            ("lora_B.bias", layer.bias),
        ):
            if tensor is None:
                continue
            value = tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype).contiguous()
            if not value.isfinite().all():
                raise AdapterError(f"{name} holds NaN or infinity; nothing was written.", "Lower the learning rate.")
            tensors[f"{name}.{part}"] = value
    write_tensors(
        path,
        tensors,
        {
            SPEC + "implementation": "diffusers",
            SPEC + "title": path.stem,
            **metadata,
            PEFT_KEY: json.dumps(peft_configuration(layers), sort_keys=True),
        },
    )


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and texts as a safetensors file, atomically and with the hash ModelSpec 1.0.1 asks for."""
    from safetensors.torch import save

    raw = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    (length,) = struct.unpack("<Q", raw[:8])
    table, buffer = json.loads(raw[8 : 8 + length]), memoryview(raw)[8 + length :]
    texts = {
        "format": "pt",
        SPEC + "sai_model_spec": "1.0.1",
        **metadata,
        SPEC + "hash_sha256": "0x" + hashlib.sha256(buffer).hexdigest(),
    }
    head = json.dumps({"__metadata__": dict(sorted(texts.items())), **table}, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.write(buffer)


def peft_configuration(layers: Mapping[str, LowRank]) -> dict[str, Any]:
    """Describe ranks and alphas per component the way diffusers stores PEFT configurations.

    Module paths are given without `text_model.`: transformers 5 leaves it out of some models, and PEFT compares ends.
    """
    result: dict[str, Any] = {}
    for component in dict.fromkeys(name.split(".", 1)[0] for name in layers):
        mine = {
            name.split(".", 1)[1].removeprefix("text_model."): layer
            for name, layer in layers.items()
            if name.startswith(component + ".")
        }
        rank = Counter(layer.rank for layer in mine.values()).most_common(1)[0][0]
        alpha = Counter(layer.alpha for layer in mine.values()).most_common(1)[0][0]
        values: dict[str, Any] = {
            "r": rank,
            "lora_alpha": _whole(alpha),
            "rank_pattern": {name: layer.rank for name, layer in mine.items() if layer.rank != rank},
            "alpha_pattern": {name: _whole(layer.alpha) for name, layer in mine.items() if layer.alpha != alpha},
            "target_modules": sorted(mine),
        }
        if any(layer.bias is not None for layer in mine.values()):
            values["lora_bias"] = True
        result.update({f"{component}.{key}": value for key, value in values.items()})
    return result


def _whole(number: float) -> int | float:
    return int(number) if number == int(number) else number
