"""The modules an adapter can sit on: lists of the published models, and look-up by any spelling of their names.

The lists (assets/architectures) hold every linear, convolution and norm layer with the shape of its weight. They let a
file be identified without a model; with a model at hand, `ModuleIndex` is built from the model's own shapes instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from .numbered_names import in_order
from .transformer_names import Piece, Shape
from .transformer_names import spellings as spellings_of_transformer

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")

# One spelling of other trainers for what stands here on the left, inside a resnet block (Stability's original names).
SGM_RESNET = {
    "norm1": "in_layers_0",
    "conv1": "in_layers_2",
    "norm2": "out_layers_0",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
SGM_SINGLE = {
    "conv_in": "input_blocks_0_0",
    "conv_norm_out": "out_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}
# Old diffusers files name the attention processor, not the layer.
PROCESSOR = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out_0": "to_out"}
TEXT_PROCESSOR = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


class ModuleIndex:
    """The layers of one model, found by canonical path or by any spelling with `_` for `.`.

    Args:
        shapes: Weight or module path, component in front (`unet.conv_in` or `unet.conv_in.weight`), to weight shape.
            Norms are among them; biases and embeddings are left out.
    """

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self.shapes: dict[str, Shape] = {}
        self._orders: dict[str, list[str]] = {}
        for name, shape in shapes.items():
            path = name.removesuffix(".weight")
            if len(shape) in (1, 2, 4) and not path.endswith(("token_embedding", "position_embedding")):
                self.shapes[canonical(path)] = tuple(shape)
        self._spellings: dict[str, dict[str, str]] = {}
        for path in self.shapes:
            component, inner = path.split(".", 1)
            spellings = self._spellings.setdefault(component, {})
            spellings[inner.replace(".", "_")] = path
        inner = {path.removeprefix("transformer."): shape for path, shape in self.shapes.items()}
        named = spellings_of_transformer(self.family, inner) if "transformer" in self._spellings else ()
        self._fused = {spelling.replace(".", "_"): pieces for spelling, pieces in named}
        for component, spellings in self._spellings.items():
            if component == "transformer":
                continue
            more = _text_spellings if component in TEXT_ENCODERS else _unet_spellings
            for spelling, path in more(spellings):
                spellings.setdefault(spelling, path)

    @property
    def family(self) -> str:
        """Key of FAMILIES these layers belong to, "" if it cannot be told."""
        if "transformer" in self._spellings:
            starts = {path.split(".")[1] for path in self.shapes if path.startswith("transformer.")}
            return "flux1" if "single_transformer_blocks" in starts else "wan" if "blocks" in starts else "sd3"
        if "unet" not in self._spellings:
            return ""
        large = "text_encoder_2" in self._spellings or "unet.add_embedding.linear_1" in self.shapes
        return "sdxl" if large else "sd15"

    def find(self, component: str, spelling: str) -> str | None:
        """Give the canonical path for a spelling (dots or underscores), or None."""
        return self._spellings.get(component, {}).get(spelling.replace(".", "_"))

    def _numbered(self, component: str) -> list[str]:
        if component not in self._orders:
            inner = [path.partition(".")[2] for path in self.shapes if path.startswith(f"{component}.")]
            self._orders[component] = [f"{component}.{path}" for path in in_order(component, inner)]
        return self._orders[component]

    def pieces(self, component: str, spelling: str) -> tuple[Piece, ...]:
        """Give the layers a spelling stands for: mostly one, several where the file's layer is a fused one."""
        if spelling.startswith(":"):  # numbered
            order, number = self._numbered(component), int(spelling[1:])
            path = order[number] if number < len(order) else None
        else:
            path = self.find(component, spelling)
        if path is not None:
            return (Piece(path, (), self.shapes[path]),)
        return self._fused.get(spelling.replace(".", "_"), ()) if component == "transformer" else ()


def canonical(path: str) -> str:
    """Text encoders always carry `text_model.`, which transformers 5 leaves out of some saved models."""
    component, _, inner = path.partition(".")
    t5 = inner.startswith(("encoder.block.", "shared", "encoder.final_layer_norm", "encoder.embed_tokens"))
    if component in TEXT_ENCODERS and not t5 and not inner.startswith(("text_model.", "text_projection")):
        return f"{component}.text_model.{inner}"
    return path


def _text_spellings(spellings: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    for spelling, path in list(spellings.items()):
        short = spelling.removeprefix("text_model_")
        yield short, path
        for layer, processor in TEXT_PROCESSOR.items():
            if short.endswith("self_attn_" + layer):
                stem = short.removesuffix(layer)
                yield stem + processor, path
                yield "text_model_" + stem + processor, path


def _unet_spellings(spellings: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    inner = [path.removeprefix("unet.") for path in spellings.values()]
    per_block = max((int(p.split(".")[3]) + 1 for p in inner if p.startswith("down_blocks.0.resnets.")), default=2)
    for spelling, path in list(spellings.items()):
        for layer, processor in PROCESSOR.items():
            stem = spelling.removesuffix(layer)
            if stem != spelling and "_attn" in stem:
                yield f"{stem}processor_{processor}", path
                yield stem + processor, path
        sgm = sgm_spelling(path.removeprefix("unet."), per_block, inner)
        if sgm:
            yield sgm, path


def sgm_spelling(path: str, per_block: int, paths: Iterable[str]) -> str | None:
    """Spell a diffusers UNet path the way kohya spells SDXL: Stability's block names, `_` for `.`.

    Args:
        path: Such as `down_blocks.1.attentions.0.proj_in`.
        per_block: Resnets per down block (up blocks have one more).
        paths: All paths of the UNet; says which up blocks have attention.
    """
    if path in SGM_SINGLE:
        return SGM_SINGLE[path]
    parts = path.split(".")
    if parts[0] == "mid_block" and parts[1] in ("resnets", "attentions"):
        place = 1 if parts[1] == "attentions" else 2 * int(parts[2])
        return "_".join(["middle_block", str(place), _sgm_inside(parts[1], parts[3:])])
    if parts[0] not in ("down_blocks", "up_blocks") or len(parts) < 4:
        return None
    block, kind, index = int(parts[1]), parts[2], int(parts[3])
    down = parts[0] == "down_blocks"
    count, first, name = (per_block + 1, 1, "input_blocks") if down else (per_block + 1, 0, "output_blocks")
    if kind in ("resnets", "attentions"):
        place = "1" if kind == "attentions" else "0"
        return "_".join([name, str(count * block + index + first), place, _sgm_inside(kind, parts[4:])])
    if kind == "downsamplers":
        return f"{name}_{count * (block + 1)}_0_op"
    if kind == "upsamplers":
        attention = any(other.startswith(f"up_blocks.{block}.attentions.") for other in paths)
        return f"{name}_{count * (block + 1) - 1}_{2 if attention else 1}_conv"
    return None


def _sgm_inside(kind: str, parts: list[str]) -> str:
    inner = "_".join(parts)
    return SGM_RESNET.get(inner, inner) if kind == "resnets" else inner


@cache
def reference(family: str) -> ModuleIndex:
    """The layers of a published model: a key of UNETS or TRANSFORMERS."""
    text = files("intarsia.assets").joinpath(f"architectures/{family}.json").read_text("utf-8")
    return ModuleIndex({path: tuple(shape) for path, shape in json.loads(text).items()})


UNET_SHARED: dict[str, Any] = {"sample_size": 64, "act_fn": "silu"}
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
T5: dict[str, Any] = {
    "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
# file in assets/architectures -> class in diffusers and its arguments, where they are not the class's own
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux1": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "sd3": (  # 3.5 medium, whose layers are those of 3 medium and a second attention in the first 13 blocks
        "SD3Transformer2DModel",
        {
            "sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
    ),
    "sd35-large": (
        "SD3Transformer2DModel",
        {
            "sample_size": 128, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
            "pooled_projection_dim": 2048, "pos_embed_max_size": 192, "qk_norm": "rms_norm",
        },
    ),
    "wan-1.3b": ("WanTransformer3DModel", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
    "wan-14b": ("WanTransformer3DModel", {"in_channels": 36, "added_kv_proj_dim": 5120, "image_dim": 1280}),
}  # fmt: skip
TEXTS: dict[str, dict[str, tuple[dict[str, Any], bool]]] = {
    "sd15": {"text_encoder": (CLIP_L, False)},
    "sdxl": {"text_encoder": (CLIP_L, False), "text_encoder_2": (CLIP_G, True)},
    "flux1": {"text_encoder": (CLIP_L, False), "text_encoder_2": (T5, False)},
    "sd3": {"text_encoder": (CLIP_L, True), "text_encoder_2": (CLIP_G, True), "text_encoder_3": (T5, False)},
    "sd35-large": {"text_encoder": (CLIP_L, True), "text_encoder_2": (CLIP_G, True), "text_encoder_3": (T5, False)},
}


def build_reference(family: str) -> dict[str, Shape]:
    """Build a family's layer list from the published configurations, without any weights (torch's meta device)."""
    import diffusers
    import torch
    import transformers

    library: Any = diffusers  # its lazy names are invisible to type checkers

    with torch.device("meta"):
        modules: dict[str, torch.nn.Module] = {}
        if family in UNETS:
            modules["unet"] = library.UNet2DConditionModel(**UNET_SHARED, **UNETS[family])
        else:
            kind, values = TRANSFORMERS[family]
            modules["transformer"] = getattr(library, kind)(**values)
        for name, (values, projected) in TEXTS.get(family, {}).items():
            if values is T5:
                modules[name] = transformers.T5EncoderModel(transformers.T5Config(**values))
                continue
            config = transformers.CLIPTextConfig(**values)
            kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
            modules[name] = kind(config)
    shapes = {
        f"{component}.{name}": tuple(parameter.shape)
        for component, module in modules.items()
        for name, parameter in module.named_parameters()
        if name.endswith(".weight")
    }
    return ModuleIndex(shapes).shapes


def write_references(folder: Path) -> None:
    """Write one file for each known architecture, one layer a line (what assets/architectures holds)."""
    for family in (*UNETS, *TRANSFORMERS):
        lines = [f"{json.dumps(path)}: {json.dumps(shape)}" for path, shape in build_reference(family).items()]
        (folder / f"{family}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
