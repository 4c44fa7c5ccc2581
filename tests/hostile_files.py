"""Files for tests of the reader: sound ones of every dialect and kind, taken apart so that anything can be bent."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from adapter_files import Arrays, Spelling, kohya, linear_layer, lora, lycoris, matrices, old_diffusers, peft, processor
from intarsia.pipelines.architectures import reference, sgm_spelling
from intarsia.pipelines.headers import BITS

DTYPES = {"float16": "F16", "float32": "F32", "float64": "F64", "int64": "I64", "uint8": "U8", "bool": "BOOL"}
SD15 = matrices("sd15")
SDXL = matrices("sdxl")
BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
LINEAR, CROSS, CONV = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", "unet.down_blocks.0.resnets.0.conv1"
STEM = "lora_unet_" + LINEAR.removeprefix("unet.").replace(".", "_")
TEXT = "text_encoder.text_model.encoder.layers.3.self_attn.q_proj"
SOME = {path: SD15[path] for path in (LINEAR, CROSS, CONV, TEXT)}
SOME_XL = {
    path: SDXL[path]
    for path in (
        "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k",
        "unet.mid_block.attentions.0.proj_in",
        "text_encoder_2.text_model.encoder.layers.31.mlp.fc1",
    )
}


@dataclass(frozen=True)
class Part:
    """One tensor as a file holds it; the bytes need not fit what is said of them."""

    dtype: str
    shape: tuple[int, ...]
    raw: bytes


@dataclass(frozen=True)
class Parts:
    """A whole file, taken apart."""

    tensors: dict[str, Part]
    metadata: dict[str, str] = field(default_factory=dict[str, str])

    def bytes(self) -> bytes:
        """Put it together as a safetensors file."""
        return assemble(list(self.tensors.items()), self.metadata)


def assemble(tensors: list[tuple[str, Part]], metadata: Mapping[str, Any] | None = None) -> bytes:
    """Write a safetensors file of named parts; names may occur twice."""
    at, rows = 0, [f'"__metadata__":{json.dumps(dict(metadata))}'] if metadata else []
    for name, part in tensors:
        span = [at, at + len(part.raw)]
        rows.append(
            json.dumps(name) + ":" + json.dumps({"dtype": part.dtype, "shape": part.shape, "data_offsets": span})
        )
        at = span[1]
    head = ("{" + ",".join(rows) + "}").encode()
    return struct.pack("<Q", len(head)) + head + b"".join(part.raw for _, part in tensors)


def part(value: Any) -> Part:  # noqa: ANN401 - anything numpy takes
    """Store an array as it is."""
    array = np.asarray(value)
    return Part(DTYPES[array.dtype.name], array.shape, array.tobytes())


def zeros(dtype: str, shape: tuple[int, ...]) -> Part:
    """A tensor of any type, all of its bytes zero."""
    return Part(dtype, shape, bytes(prod(shape) * BITS[dtype] // 8))


def parts(arrays: Arrays, metadata: dict[str, str] | None = None) -> Parts:
    return Parts({name: part(value) for name, value in arrays.items()}, metadata or {})


def save(path: Path, arrays: Arrays, metadata: dict[str, str] | None = None) -> Path:
    path.write_bytes(parts(arrays, metadata).bytes())
    return path


def sgm(path: str) -> tuple[str, str, str]:
    """SDXL as kohya spells it."""
    if not path.startswith("unet."):
        return kohya(path)
    inner = [name.removeprefix("unet.") for name in SDXL if name.startswith("unet.")]
    stem = f"lora_unet_{sgm_spelling(path.removeprefix('unet.'), 2, inner)}"
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"


def _kinds() -> dict[str, Arrays]:
    """One layer of every kind beside LoRA, as LyCORIS and PEFT name their parts."""
    rng = np.random.default_rng(0)
    stem, conv = STEM, "lora_unet_" + CONV.removeprefix("unet.").replace(".", "_")

    def some(*shape: int) -> Any:  # noqa: ANN401
        return rng.standard_normal(shape).astype(np.float32)

    factors = {f"{stem}.lora_down.weight": some(2, 320), f"{stem}.lora_up.weight": some(320, 2)}
    hada = {f"{stem}.hada_w{n}_{part}": some(*size) for n in "12" for part, size in (("a", (320, 2)), ("b", (2, 320)))}
    return {
        "dora": factors | {f"{stem}.dora_scale": some(320, 1), f"{stem}.alpha": some()},
        "peft dora": {
            f"{LINEAR}.lora_A.weight": some(2, 320),
            f"{LINEAR}.lora_B.weight": some(320, 2),
            f"{LINEAR}.lora_B.bias": some(320),
            f"{LINEAR}.lora_magnitude_vector": some(320),
        },
        "tucker": {
            f"{conv}.lora_down.weight": some(2, 320, 1, 1),
            f"{conv}.lora_mid.weight": some(2, 2, 3, 3),
            f"{conv}.lora_up.weight": some(320, 2, 1, 1),
        },
        "loha": hada | {f"{stem}.alpha": some()},
        "loha tucker": {
            f"{conv}.hada_{name}": some(*((2, 2, 3, 3) if name[0] == "t" else (2, 320)))
            for name in ("t1", "t2", "w1_a", "w1_b", "w2_a", "w2_b")
        },
        "lokr": {
            f"{stem}.lokr_w1": some(4, 4),
            f"{stem}.lokr_w2_a": some(80, 2),
            f"{stem}.lokr_w2_b": some(2, 80),
            f"{stem}.alpha": some(),
        },
        "lokr tucker": {
            f"{conv}.lokr_w1_a": some(4, 2),
            f"{conv}.lokr_w1_b": some(2, 4),
            f"{conv}.lokr_t2": some(2, 2, 3, 3),
            f"{conv}.lokr_w2_a": some(2, 80),
            f"{conv}.lokr_w2_b": some(2, 80),
        },
        "ia3": {f"{stem}.weight": some(320), f"{stem}.on_input": np.array(1)},
        "peft ia3": {f"{LINEAR}.ia3_l": some(320, 1)},
        "difference": {f"{stem}.diff": some(320, 320), f"{stem}.diff_b": some(320)},
        "norm": {"lora_unet_conv_norm_out.w_norm": some(320), "lora_unet_conv_norm_out.b_norm": some(320)},
        "numbered": {"unet:0:up": some(320, 2), "unet:0:down": some(2, 320), "<s1>": some(768)},
    }


def _transformers() -> dict[str, Arrays]:
    def pair(stem: str, out: int, inside: int, down: str = "lora_down", up: str = "lora_up") -> Arrays:
        one = np.ones
        return {f"{stem}.{down}.weight": one((1, inside), np.float16), f"{stem}.{up}.weight": one((out, 1), np.float16)}

    return {
        "flux1 fused": pair("lora_unet_double_blocks_0_img_attn_qkv", 9216, 3072)
        | {"lora_unet_double_blocks_0_img_attn_qkv.alpha": np.array(2.0, np.float32)},
        "flux1 swapped": pair("lora_unet_final_layer_adaLN_modulation_1", 6144, 3072),
        "xlabs": pair("double_blocks.0.processor.qkv_lora1", 9216, 3072, "down", "up"),
        "sd3": pair("lora_unet_joint_blocks_0_x_block_attn_qkv", 4608, 1536),
        "wan": pair("diffusion_model.blocks.0.self_attn.q", 1536, 1536, "lora_A", "lora_B"),
    }


def sound_files() -> dict[str, Parts]:
    """One small sound file for each dialect and kind that is read."""
    spelled: dict[str, tuple[Mapping[str, tuple[int, ...]], Spelling]] = {
        "peft": (SOME, peft),
        "old diffusers": (SOME, old_diffusers),
        "linear layers": (SOME, linear_layer),
        "kohya": (SOME, lambda path: kohya(path, text="lora_te_")),
        "kohya xl": (SOME_XL, sgm),
        "lycoris": (SOME, lycoris),
        "processors": ({path: SOME[path] for path in (LINEAR, CROSS)}, processor),
    }
    made = {
        name: lora(shapes, spelling, rank=1, alpha=None if name == "processors" else 1.0)
        for name, (shapes, spelling) in spelled.items()
    }
    told = {"unet.r": 1, "unet.lora_alpha": 2, "unet.alpha_pattern": {"to_q": 4}, "unet.rank_pattern": {}}
    texts = {
        "lora_adapter_metadata": json.dumps(told),
        "ss_tag_frequency": json.dumps({"10_cat": {"cat": 3}}),
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": "A cat",
    }
    return {
        **{name: parts(arrays, texts if name == "peft" else None) for name, arrays in made.items()},
        **{name: parts(arrays) for name, arrays in (_kinds() | _transformers()).items()},
    }


def touched() -> dict[str, tuple[int, ...]]:
    """The layers of SD 1.5 that its sound files above touch: a model small enough to try every change on."""
    shapes = reference("sd15").shapes
    return {path: shapes[path] for path in (*SOME, "unet.conv_norm_out")}
