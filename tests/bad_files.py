"""Files people drop by mistake or strangers make to do harm, each with the words by which it must be refused."""

from __future__ import annotations

import pickle
import sys
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from adapter_files import Arrays, kohya, lora, peft
from hostile_files import LINEAR, SD15, SOME, SOME_XL, STEM, Part, Parts, assemble, part, parts, sgm, sound_files, zeros
from intarsia.app.cli import main

Build = Callable[[Path], Path]
DOWN, UP = ".lora_down.weight", ".lora_up.weight"
TRANSFORMER = "transformer.transformer_blocks"


@dataclass(frozen=True)
class Bad:
    """One file that must be refused.

    Args:
        build: Makes it in an empty folder.
        words: What the sentence must say.
        hint: What the way out must say.
    """

    build: Build
    words: tuple[str, ...]
    hint: str


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["intarsia", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    assert isinstance(left.value.code, int)
    return left.value.code


def raw(content: bytes, name: str = "file.safetensors") -> Build:
    def build(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content)
        return path

    return build


def holding(arrays: Arrays, metadata: dict[str, str] | None = None) -> Build:
    return raw(parts(arrays, metadata).bytes())


def named(names: Iterable[str], shape: tuple[int, ...] = (2, 8)) -> Build:
    """Tensors of which the names alone matter."""
    return holding({name: np.ones(shape, np.float32) for name in names})


def pairs(stems: Iterable[str], width: int, down: str = "lora_A", up: str = "lora_B") -> Build:
    """Plain low-rank pairs of one width."""
    arrays: Arrays = {}
    for stem in stems:
        arrays |= {f"{stem}.{down}.weight": np.ones((2, width), np.float16),
                   f"{stem}.{up}.weight": np.ones((width, 2), np.float16)}  # fmt: skip
    return holding(arrays)


def _zip(folder: Path) -> Path:
    path = folder / "file.safetensors"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"x")
    return path


def _loop(folder: Path) -> Path:
    path = folder / "file.safetensors"
    path.symlink_to(path)
    return path


def _sound() -> bytes:
    return sound_files()["peft"].bytes()


def _nan(value: float) -> Build:
    arrays = lora(SOME, peft)
    next(iter(arrays.values())).flat[0] = value
    return holding(arrays)


def _typed(dtype: str) -> Build:
    """One pair of factors stored in a type."""
    rows = [(STEM + DOWN, zeros(dtype, (2, 320))), (STEM + UP, zeros(dtype, (320, 2)))]
    return raw(assemble(rows))


def _unet_and_transformer(folder: Path) -> Path:
    both = sound_files()["peft"].tensors | sound_files()["flux1 fused"].tensors
    return raw(Parts(both).bytes())(folder)


SD2 = {path: (shape[0], 1024) if "attn2.to_k" in path else shape for path, shape in SOME.items()}
LOGIN = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"

# What is no safetensors file at all.
CONTAINERS: dict[str, Bad] = {
    "nothing": Bad(raw(b""), ("is empty",), "Download it again"),
    "cut off in its tensors": Bad(raw(_sound()[:-5]), ("cut off",), "Download it again"),
    "cut off in its header": Bad(raw(_sound()[:99]), ("ends inside its header",), "Download it again"),
    "a Git LFS pointer": Bad(raw(POINTER), ("Git LFS pointer",), "git lfs pull"),
    "a login page": Bad(raw(LOGIN), ("web page",), "browser"),
    "a login page after a mark": Bad(raw(b"\xef\xbb\xbf \r\n" + LOGIN.lower()), ("web page",), "browser"),
    "a site's error": Bad(raw(b'{"error":"Unauthorized"}'), ("error message of the site",), "Log in"),
    "a zip": Bad(_zip, ("a zip", "could run code"), "adapters convert"),
    "a pickle": Bad(raw(pickle.dumps({"a": 1})), ("a pickle", "could run code"), "adapters convert"),
    "a pickle by its name": Bad(raw(_sound(), "file.pt"), ("a pickle", "could run code"), "adapters convert"),
    "a GGUF file": Bad(raw(b"GGUF\x03\x00\x00\x00" + bytes(64)), ("GGUF",), ".safetensors"),
    "a packed archive": Bad(raw(b"7z\xbc\xaf\x27\x1c" + bytes(64)), ("packed archive",), "Unpack"),
    "a picture": Bad(raw(b"\x89PNG\r\n\x1a\n" + bytes(64)), ("a picture",), ".safetensors"),
    "a text": Bad(raw(b"hello, this is a text"), ("not a safetensors file",), ".safetensors"),
    "a loop of links": Bad(_loop, ("link that leads back",), "Give the file"),
    "no file": Bad(lambda folder: folder / "none.safetensors", ("no file",), "Check"),
    "an endless name": Bad(lambda folder: folder / ("x" * 300 + ".safetensors"), ("too long",), "Check"),
    "a name twice": Bad(
        raw(assemble([("a.lora_A.weight", part(np.ones(2))), ("a.lora_A.weight", part(np.ones(2)))])),
        ("same tensor twice",),
        "another source",
    ),
    "a zero byte in a name": Bad(raw(assemble([("a\x00b", part(np.ones(2)))])), ("cannot be shown",), "another"),
    "a terminal's commands in a name": Bad(raw(assemble([("\x1b[2J", part(np.ones(2)))])), ("cannot be shown",), ""),
    "half a letter in a name": Bad(raw(assemble([("\ud800", part(np.ones(2)))])), ("cannot be shown",), "another"),
    "half a letter in a text": Bad(
        raw(assemble([("a", part(np.ones(2)))], {"modelspec.title": "\ud800"})), ("not plain text",), "another"
    ),
    "a number as a text": Bad(raw(assemble([], {"a": 1})), ("not plain text",), "another"),
    "complex numbers": Bad(raw(assemble([("a", Part("C64", (1,), bytes(8)))])), ("C64",), "F16"),
}

# What is a sound file, but no adapter.
OTHERS: dict[str, Bad] = {
    "no tensors": Bad(holding({}), ("no tensors",), "Download"),
    "an embedding of SD": Bad(named(["emb_params"], (4, 768)), ("textual inversion",), "not adapters"),
    "an embedding of SDXL": Bad(
        holding({"clip_l": np.ones((2, 768)), "clip_g": np.ones((2, 1280))}), ("textual inversion",), "not adapters"
    ),
    "an embedding of diffusers": Bad(named(["<cat-toy>"], (1, 768)), ("textual inversion",), "not adapters"),
    "an embedding by a plain word": Bad(named(["sks"], (768,)), ("textual inversion",), "not adapters"),
    "an embedding of old": Bad(named(["string_to_param.*"], (1, 768)), ("textual inversion",), "not adapters"),
    "a checkpoint of SD 1.5": Bad(
        named(["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.x", "first_stage_model.y"]),
        ("a whole model",),
        "--model",
    ),
    "a checkpoint of SDXL": Bad(
        named(["model.diffusion_model.label_emb.0.0.weight", "conditioner.embedders.0.x"]),
        ("a whole model",),
        "--model",
    ),
    "a UNet of diffusers": Bad(
        named(["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "mid_block.attentions.0.proj_in.bias"]),
        ("a whole UNet",),
        "--model",
    ),
    "FLUX.1 as its authors keep it": Bad(
        named(["double_blocks.0.img_attn.norm.query_norm.scale", "single_blocks.0.linear1.weight", "img_in.weight"]),
        ("transformer of a whole model",),
        "--model",
    ),
    "FLUX.1 as diffusers keeps it": Bad(
        named(["transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.0.proj_mlp.weight"]),
        ("transformer of a whole model",),
        "--model",
    ),
    "Wan as its authors keep it": Bad(
        named(["blocks.0.self_attn.q.weight", "patch_embedding.weight"]), ("transformer of a whole model",), "--model"
    ),
    "a VAE": Bad(named(["encoder.conv_in.weight", "decoder.conv_in.weight"]), ("autoencoder",), "model folder"),
    "a VAE within": Bad(named(["first_stage_model.encoder.conv_in.weight"]), ("a whole model",), "--model"),
    "a CLIP text encoder": Bad(
        named(["text_model.encoder.layers.0.self_attn.q_proj.weight"]), ("a text encoder",), "--model"
    ),
    "a T5 text encoder": Bad(
        named(["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"]), ("a text encoder",), "--model"
    ),
    "a ControlNet": Bad(
        named(["control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"]), ("ControlNet",), "Use"
    ),
    "a ControlNet of diffusers": Bad(
        named(["controlnet_cond_embedding.conv_in.weight", "conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"]),
        ("a ControlNet",),
        "Use",
    ),
    "a ControlNet of FLUX": Bad(
        named(["controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight"]), ("a ControlNet",), "Use"
    ),
    "a control-LoRA": Bad(
        named(["lora_controlnet", "input_blocks.0.0.weight", "input_blocks.1.1.proj_in.down"]), ("control-LoRA",), "Use"
    ),
    "a T2I-Adapter": Bad(named(["body.0.block1.weight", "conv_in.weight"]), ("T2I-Adapter",), "Use"),
    "a T2I-Adapter of diffusers": Bad(named(["adapter.body.0.resnets.0.block1.weight"]), ("T2I-Adapter",), "Use"),
    "an IP-Adapter": Bad(named(["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"]), ("an IP-Adapter",), "Use"),
    "an IP-Adapter with LoRA": Bad(
        named(["image_proj.proj.weight", "ip_adapter.0.to_q_lora.down.weight"]), ("is an IP-Adapter",), "Use"
    ),
    "an IP-Adapter of FLUX": Bad(
        named(
            ["ip_adapter_proj_model.proj.weight", "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"]
        ),
        ("an IP-Adapter",),
        "Use",
    ),
    "a hypernetwork": Bad(named(["768.0.linear.0.weight", "768.1.linear.0.weight"]), ("hypernetwork",), "Use"),
    "an upscaler": Bad(named(["conv_first.weight", "body.weight"]), ("no adapter layers that are known",), "Use"),
    "paths as names": Bad(
        named(["../../etc/passwd", "..\\..\\x", "/etc/passwd", "C:\\x", "\\\\host\\x"]), ("no adapter layers",), "Use"
    ),
}

# Adapters of models that are not drawn with here.
FOREIGN: dict[str, Bad] = {
    "a language model": Bad(
        pairs(["base_model.model.model.layers.0.self_attn.q_proj"], 4096), ("an adapter for a language model",), "Use"
    ),
    "Llama": Bad(pairs(["base_model.model.llama.layers.0.q_proj"], 4096), ("a language model",), "Use"),
    "SD 2": Bad(holding(lora(SD2, peft)), ("Stable Diffusion 2",), "Use"),
    "FLUX.2": Bad(pairs(["transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj"], 6144), ("FLUX.2",), "Use"),
    "FLUX.2 by its width": Bad(
        pairs(["lora_unet_double_blocks_0_img_attn_qkv"], 6144, "lora_down", "lora_up"), ("FLUX.2",), "Use"
    ),
    "FLUX.2 Klein by its width": Bad(pairs([f"{TRANSFORMER}.0.attn.to_q"], 4096), ("FLUX.2",), "Use"),
    "Qwen-Image": Bad(
        pairs([f"{TRANSFORMER}.0.attn.to_q", f"{TRANSFORMER}.0.img_mlp.net.2"], 3072), ("Qwen-Image",), "Use"
    ),
    "Qwen-Image's attention alone": Bad(
        pairs([f"{TRANSFORMER}.{n}.attn.to_q" for n in (0, 59)], 3072), ("Qwen-Image",), "Use"
    ),
    "Z-Image": Bad(pairs(["diffusion_model.layers.0.attention.to_q"], 3840), ("Z-Image",), "Use"),
    "HunyuanVideo": Bad(
        pairs(["lora_unet_single_blocks_39_linear1"], 3072, "lora_down", "lora_up"), ("HunyuanVideo",), "Use"
    ),
    "LTX-Video": Bad(pairs([f"{TRANSFORMER}.0.attn1.to_q"], 2048), ("LTX-Video",), "Use"),
    "LTX-Video of its authors": Bad(pairs(["diffusion_model.transformer_blocks.0.attn1.to_q"], 4096), ("LTX",), "Use"),
    "CogVideoX": Bad(pairs([f"{TRANSFORMER}.0.attn1.to_q"], 3072), ("CogVideoX",), "Use"),
    "PixArt": Bad(pairs(["base_model.model.transformer_blocks.0.attn1.to_q"], 1152), ("PixArt",), "Use"),
    "a relative of theirs": Bad(pairs([f"{TRANSFORMER}.0.attn1.to_q"], 777), ("or a relative",), "Use"),
    "a FLUX.1 control adapter": Bad(
        named(["double_blocks.0.img_attn.qkv.lora_A.weight", "double_blocks.0.img_attn.norm.query_norm.scale"]),
        ("is a FLUX.1 control adapter",),
        "Use",
    ),
    "SD 1.5 and SDXL": Bad(
        holding(lora(SOME, kohya) | lora(SOME_XL, sgm)), ("mixes layers of", "SD 1.5", "SDXL"), "one model"
    ),
    "a UNet and a transformer": Bad(_unet_and_transformer, ("mixes layers of", "FLUX.1", "SD 1.5"), "one model"),
}

# Adapters whose values or tensors are wrong.
BROKEN: dict[str, Bad] = {
    "not a number": Bad(_nan(float("nan")), ("NaN or infinity", ".lora_A.weight"), "training failed"),
    "infinity": Bad(_nan(float("inf")), ("NaN or infinity",), "training failed"),
    "float8": Bad(_typed("F8_E4M3"), ("as F8_E4M3, which is not read",), "F16"),
    "whole bytes": Bad(_typed("I8"), ("as I8, which is not read",), "F16"),
    "an alpha of many numbers": Bad(
        holding(lora(SOME, kohya) | {STEM + ".alpha": np.ones(2, np.float32)}), ("not one number",), "damaged"
    ),
    "an absurd alpha": Bad(
        holding(lora(SOME, kohya) | {STEM + ".alpha": np.array(1e30, np.float32)}), ("not one number",), "damaged"
    ),
    "ranks that differ": Bad(
        holding(lora(SOME, kohya) | {STEM + UP: np.ones((320, 3), np.float32)}), ("up has rank 3",), "damaged"
    ),
    "no rank": Bad(
        holding({STEM + DOWN: np.ones((0, 320), np.float32), STEM + UP: np.ones((320, 0), np.float32)}),
        ("is empty",),
        "damaged",
    ),
    "half a pair": Bad(holding({STEM + DOWN: np.ones((2, 320), np.float32)}), ("lack some",), "Use"),
    "a tensor too many": Bad(
        holding(lora(SOME, peft) | {"unet.conv_in.something": np.ones(2)}), ("no part of an adapter",), "Use"
    ),
    "one layer in two spellings": Bad(
        holding(lora({LINEAR: SD15[LINEAR]}, kohya) | lora({LINEAR: SD15[LINEAR]}, peft)), ("twice",), ""
    ),
}
