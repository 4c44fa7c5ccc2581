"""Rewrite a tiny diffusers folder as a single checkpoint file, with Stability's original tensor names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
VAE = [
    (r"coder\.mid_block\.resnets\.0", "coder.mid.block_1"), (r"coder\.mid_block\.resnets\.1", "coder.mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"), (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"), (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"), (r"group_norm", "norm"), (r"to_out\.0", "proj_out"),
    (r"attn_1\.to_([qkv])", r"attn_1.\1"),
]  # fmt: skip


def single_file(folder: Path, family: str, path: Path, layers_per_block: int) -> Path:
    """Write the weights of a tiny "sd15" or "sdxl" folder into one file."""
    tensors = {f"model.diffusion_model.{k}": v for k, v in stability_names(_read(folder / "unet"), layers_per_block)}
    tensors |= {f"first_stage_model.{k}": v for k, v in _vae(_read(folder / "vae"))}
    front = "cond_stage_model." if family == "sd15" else "conditioner.embedders.0."
    for name, value in _read(folder / "text_encoder").items():
        tensors[f"{front}transformer.text_model.{name.removeprefix('text_model.')}"] = value
    if family == "sdxl":
        tensors |= {f"conditioner.embedders.1.model.{k}": v for k, v in _open_clip(_read(folder / "text_encoder_2"))}
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


def _read(folder: Path) -> dict[str, Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def stability_names(weights: dict[str, Tensor], layers: int) -> Iterator[tuple[str, Tensor]]:
    """A UNet's weights under Stability's names; `layers` are the resnets of a down block."""
    attentive = {match[1] for name in weights if (match := re.match(r"up_blocks\.(\d)\.attentions", name))}
    for name, value in weights.items():
        stem, _, kind = name.rpartition(".")
        yield f"{UNET.get(stem) or _unet_block(stem, layers, attentive)}.{kind}", value


def _unet_block(stem: str, layers: int, attentive: set[str]) -> str:
    side, *rest = stem.split(".")
    if side == "mid_block":
        place = "1" if rest[0] == "attentions" else str(2 * int(rest[1]))
        return f"middle_block.{place}.{_inner(rest[0], rest[2:])}"
    block, kind, index = int(rest[0]), rest[1], int(rest[2])
    first, name = (1, "input_blocks") if side == "down_blocks" else (0, "output_blocks")
    if kind == "downsamplers":
        return f"input_blocks.{(layers + 1) * (block + 1)}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{(layers + 1) * block + layers}.{2 if str(block) in attentive else 1}.conv"
    place = 1 if kind == "attentions" else 0
    return f"{name}.{(layers + 1) * block + index + first}.{place}.{_inner(kind, rest[3:])}"


def _inner(kind: str, parts: list[str]) -> str:
    return RESNET[parts[0]] if kind == "resnets" else ".".join(parts)


def _vae(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, value in weights.items():
        new = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block", name)
        new = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", new)
        for pattern, replacement in VAE:
            new = re.sub(pattern, replacement, new)
        attention = "attn_1" in new and "norm" not in new and value.ndim == 2
        yield new, value[:, :, None, None] if attention else value


def _open_clip(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    plain: Any = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    for name, value in weights.items():
        if name == "text_projection.weight":
            yield "text_projection", value.T
        elif name in plain:
            yield plain[name], value
        elif ".k_proj." not in name and ".v_proj." not in name:
            new = name.replace("text_model.encoder.layers", "transformer.resblocks").replace("self_attn", "attn")
            for old, kept in (("layer_norm", "ln_"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
                new = new.replace(old, kept)
            if ".q_proj." in name:
                value = torch.cat([weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
                new = new.replace("q_proj.", "in_proj_")
            yield new, value
