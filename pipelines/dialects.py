"""How trainers spell adapter tensors, as tables: what is read, and what is refused by name.

A key is `<prefix><module spelling><suffix>`. Prefixes say the component, suffixes the part; the spelling in between
is looked up in the model's own module list (`ModuleIndex`), so no name is ever guessed back from underscores.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass
from functools import lru_cache

from .numbered_names import NAME

HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
KRONECKER = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

# (suffix, part of a layer as its kind calls it, dialect).
# Longest first where one ends another.
SUFFIXES: tuple[tuple[str, str, str], ...] = (
    (".lora_linear_layer.down.weight", "down", "diffusers, old"),
    (".lora_linear_layer.up.weight", "up", "diffusers, old"),
    (".lora_A.default.weight", "down", "PEFT"),
    (".lora_B.default.weight", "up", "PEFT"),
    (".lora_A.weight", "down", "PEFT"),
    (".lora_B.weight", "up", "PEFT"),
    (".lora_down.weight", "down", "kohya"),
    (".lora_up.weight", "up", "kohya"),
    (".lora.down.weight", "down", "diffusers, old"),
    (".lora.up.weight", "up", "diffusers, old"),
    ("_lora.down.weight", "down", "attention processors"),
    ("_lora.up.weight", "up", "attention processors"),
    (".down.weight", "down", "XLabs"),
    (".up.weight", "up", "XLabs"),
    (".lora_mid.weight", "mid", "kohya"),
    (".lora_B.default.bias", "bias", "PEFT"),
    (".lora_B.bias", "bias", "PEFT"),
    (".lora_up.bias", "bias", "kohya"),
    (".lora_magnitude_vector.default.weight", "magnitude", "PEFT"),
    (".lora_magnitude_vector.weight", "magnitude", "PEFT"),
    (".lora_magnitude_vector.default", "magnitude", "PEFT"),
    (".lora_magnitude_vector", "magnitude", "PEFT"),
    (".magnitude", "magnitude", "PEFT"),
    (".ia3_l.default", "ia3_l", "PEFT"),
    (".ia3_l", "ia3_l", "PEFT"),
    (".dora_scale", "dora_scale", "LyCORIS"),
    *((f".{part}", part, "LyCORIS") for part in (*HADAMARD, *KRONECKER)),
    *((f".{part}", part, "LyCORIS") for part in ("diff", "diff_b", "w_norm", "b_norm", "on_input")),
    (".alpha", "alpha", ""),
)
ANYWHERE = ("unet", "transformer", "text_encoder")
# (prefix, components to look in); the first prefix that fits is taken.
PREFIXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("lora_unet_unet_", ("unet",)),  # a broken conversion writes the component twice
    ("lora_unet_", ("unet", "transformer")),
    ("lora_transformer_", ("transformer",)),
    ("unet_unet_", ("unet",)),
    ("lora_te1_", ("text_encoder",)),
    ("lora_te2_", ("text_encoder_2",)),
    ("lora_te3_", ("text_encoder_3", "text_encoder_2")),  # T5: the third of SD3, the second of FLUX.1
    ("lora_te_", ("text_encoder",)),
    ("unet.base_model.model.", ("unet",)),
    ("unet.unet.", ("unet",)),
    ("unet.", ("unet",)),
    ("transformer.", ("transformer",)),
    ("text_encoder_3.", ("text_encoder_3",)),
    ("text_encoder_2.", ("text_encoder_2",)),
    ("text_encoder.", ("text_encoder",)),
    ("base_model.model.unet.", ("unet",)),
    ("base_model.model.transformer.", ("transformer",)),
    ("base_model.model.", ANYWHERE),
    ("diffusion_model.", ("unet", "transformer")),
    ("lycoris_", ANYWHERE),
    ("", ANYWHERE),  # bare paths
)


@dataclass(frozen=True)
class Key:
    """One tensor name taken apart; `module` keeps the file's own spelling."""

    components: tuple[str, ...]
    module: str
    part: str
    style: str


def split_key(name: str, names: Container[str] = ()) -> Key | None:
    """Take a tensor name apart, or give None when it ends like no adapter tensor.

    Args:
        name: The tensor's.
        names: All of the file: a plain `.weight` is one of (IA)3 if an `.on_input` stands beside it.
    """
    marked = name.endswith(".weight") and f"{name.removesuffix('.weight')}.on_input" in names
    return _apart(name, marked)


@lru_cache(maxsize=2**15)  # a file's names are held against every known model
def _apart(name: str, marked: bool) -> Key | None:
    if numbered := NAME.fullmatch(name):
        return Key((numbered[1],), f":{numbered[2]}", numbered[3], "lora_diffusion")
    for suffix, part, style in ((".weight", "ia3", "LyCORIS"),) if marked else SUFFIXES:
        if name.endswith(suffix):
            stem = name.removesuffix(suffix)
            prefix, components = next(row for row in PREFIXES if stem.startswith(row[0]))
            return Key(components, stem.removeprefix(prefix), part, style)
    return None


@dataclass(frozen=True)
class Foreign:
    """A kind of file that is recognised and refused: any tensor name that matches `pattern` is enough.

    Args:
        name: Short name for machine output, such as "loha".
        title: Name for people.
        pattern: Regular expression, searched in tensor names.
        hint: What the person can do.
        itself: In a table of families, the file is that, not an adapter for it.
    """

    name: str
    title: str
    pattern: str
    hint: str = "Use a plain LoRA of the same subject, or convert it with the tool that made it."
    itself: bool = False


WHOLE = "Give it as the model (--model FILE, or the Model box), not as an adapter."
OTHER_MODEL = "Use an adapter made for SD 1.5, SDXL, SD 3, FLUX.1, Wan or Mini."

IP_ADAPTER = r"^image_proj(_model)?\.|^ip_adapter|\.ip_adapter_|_ip\.weight$"

# Order matters: the more telling marker first. Searched before plain LoRA is tried.
ALGORITHMS: tuple[Foreign, ...] = (
    Foreign("control-lora", "a control-LoRA (Stability)", r"^lora_controlnet$"),
    Foreign(
        "pivotal",
        "a LoRA with bundled embeddings (OneTrainer)",
        r"^bundle_emb\.",
        "Export it again without the embeddings.",
    ),
    Foreign("dora", "DoRA in a spelling that is not known here", r"\.w_magnitude(\.|$)"),
    Foreign("boft", "BOFT", r"\.boft_(R|s)"),
    Foreign("oft", "OFT (orthogonal finetuning)", r"\.oft_(blocks|diag|[rR])(\.|$)"),
    Foreign("glora", "GLoRA (LyCORIS)", r"\.(a1|a2|b1|b2|bm)\.weight$"),
    Foreign("reshaped", "a LoRA that changes layer sizes (reshape_weight)", r"\.reshape_weight$"),
    Foreign("vera", "VeRA", r"vera_lambda_[bd]"),
)
FAMILIES: tuple[Foreign, ...] = (
    Foreign("ip-adapter", "an IP-Adapter", IP_ADAPTER, OTHER_MODEL, itself=True),
    Foreign("chroma", "Chroma", r"distilled_guidance_layer", OTHER_MODEL),
    Foreign(
        "hunyuan-video",
        "HunyuanVideo",
        r"double_blocks.(19|[2-9]\d)[._]|"
        r"(?<!transformer_)single_blocks.(3[89]|[4-9]\d)[._]|token_refiner",
        OTHER_MODEL,
    ),
    Foreign("flux2", "FLUX.2", r"to_qkv_mlp_proj|double_stream_modulation|ff_context[._]linear_in", OTHER_MODEL),
    Foreign(
        "flux1-control",
        "a FLUX.1 control adapter (Black Forest Labs)",
        r"(double|single)_blocks\.\d+\..*(query|key)_norm\.scale",
        OTHER_MODEL,
        itself=True,
    ),
    Foreign(  # it has 60 blocks, of which SD 3.5 has 38 and FLUX.1 19
        "qwen-image",
        "Qwen-Image",
        r"transformer_blocks[._](\d+[._](img|txt)_(mlp|mod)|(3[89]|[45]\d)[._]attn[._])",
        OTHER_MODEL,
    ),
    Foreign("flux1", "FLUX.1", r"(^|[._])(double|single)_blocks[._]\d+[._]|single_transformer_blocks[._]", OTHER_MODEL),
    Foreign(
        "sd3",
        "Stable Diffusion 3",
        r"(^|[._])joint_blocks[._]|"
        r"transformer_blocks[._]\d+[._]attn[._](add_[kqv]_proj|to_add_out)",
        OTHER_MODEL,
    ),
    Foreign(
        "wan",
        "Wan",
        r"(^|[._])blocks[._]\d+[._]((self|cross)_attn[._]([qkvo]|[kv]_img)|ffn[._])|"
        r"^transformer\.blocks\.\d+\.attn[12]\.",
        OTHER_MODEL,
    ),
    Foreign(
        "z-image",
        "Z-Image or Lumina 2",
        r"(^|[._])layers[._]\d+[._]"
        r"(attention[._](to_)?(qkv|q|k|v|out)|feed_forward[._]w[123])",
        OTHER_MODEL,
    ),
    Foreign("sd3", "Stable Diffusion 3", r"^lora_te3_|^text_encoder_3\.", OTHER_MODEL),
    Foreign(
        "language-model",
        "a language model",
        r"(^|[._])(distil|ro|al)?bert(a|[._])|(^|[._])(gpt_neox|llama|mistral)[._]|"
        r"^base_model\.model\.(model\.layers|transformer\.(h|layer|encoder))\.",
        OTHER_MODEL,
    ),
    Foreign(  # which of them, their widths tell
        "dit",
        "LTX-Video, CogVideoX, PixArt, Sana or a relative of theirs",
        r"^(transformer\.|diffusion_model\.|base_model\.model\.|lora_(unet|transformer)_)?transformer_blocks[._]\d+[._]"
        r"attn[12][._]",
        OTHER_MODEL,
    ),
    Foreign(
        "transformer",
        "a transformer model that is not known here",
        r"^(transformer\.|lora_transformer_|"
        r"diffusion_model\.(transformer_)?blocks\.)",
        OTHER_MODEL,
    ),
)
# Looked at first in files where no tensor is named as an adapter's.
TEXT_WIDTHS = (768, 1024, 1280, 2048, 4096)  # of one row of an embedding
PART = "It is a part of a model: give the whole model (--model FOLDER, or the Model box)."
MODELS: tuple[Foreign, ...] = (
    Foreign(
        "textual-inversion",
        "a textual inversion embedding",
        r"^(emb_params|string_to_param(\..*)?|string_to_token|clip_[lg]|t5xxl|<[^<>]+>)$",
        "Embeddings are not adapters; they cannot be used here.",
    ),
    Foreign("ip-adapter", "an IP-Adapter", IP_ADAPTER, OTHER_MODEL),
    Foreign("controlnet", "a ControlNet", r"controlnet|^control_model\.|^(input_hint_block|zero_convs)\.", OTHER_MODEL),
    Foreign("t2i-adapter", "a T2I-Adapter", r"^(adapter\.)?body\.\d+\.", OTHER_MODEL),
    Foreign("hypernetwork", "a hypernetwork", r"^(320|640|768|1024|1280|2048)\.\d+\.|^hypernet", OTHER_MODEL),
    Foreign(
        "checkpoint",
        "a whole model",
        r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.",
        WHOLE,
    ),
    Foreign(
        "transformer",
        "the transformer of a whole model",
        r"^(double_blocks|single_blocks|joint_blocks|transformer_blocks|single_transformer_blocks|blocks|layers)\.\d+\.",
        PART,
    ),
    Foreign("unet", "a whole UNet", r"^((unet\.)?(down|up)_blocks\.\d+\..*|(unet\.)?conv_in)\.(weight|bias)$", PART),
    Foreign(
        "text-encoder",
        "a text encoder",
        r"^(text_model|encoder\.block|encoder\.layers|model\.layers|transformer\.text_model)\.|^shared\.weight$",
        PART,
    ),
    Foreign("vae", "an autoencoder (VAE)", r"^(encoder|decoder|vae)\.", "Autoencoders belong to a model folder."),
)


# How wide what enters an attention is -> family and title, where names alone do not tell.
ENTRANCE = re.compile(
    r"(attn1?[._]to_q|img_attn[._]qkv|single_blocks[._]\d+[._]linear1)\.(lora_down|lora_A|lora_A\.default)\.weight$"
)
WIDTHS: dict[str, dict[int, tuple[str, str]]] = {
    "dit": {
        1152: ("pixart", "PixArt"), 1920: ("cogvideox", "CogVideoX"), 2048: ("ltx-video", "LTX-Video"),
        2240: ("sana", "Sana"), 3072: ("cogvideox", "CogVideoX"), 4096: ("ltx-video", "LTX-Video"),
    },
    **{name: {4096: ("flux2", "FLUX.2"), 6144: ("flux2", "FLUX.2")} for name in ("flux1", "transformer")},
}  # fmt: skip


def recognise(names: Iterable[str], table: tuple[Foreign, ...]) -> Foreign | None:
    """Give the first row of a table that any tensor name matches."""
    known = list(names)
    for row in table:
        search = re.compile(row.pattern).search
        if any(search(name) for name in known):
            return row
    return None


# What trainers write into `ss_base_model_version` and `modelspec.architecture`, by how it starts.
BASES: tuple[tuple[str, str], ...] = (
    ("sdxl", "sdxl"), ("stable-diffusion-xl", "sdxl"),
    ("sd_v1", "sd15"), ("sd_1", "sd15"), ("stable-diffusion-v1", "sd15"),
    ("sd_v2", "sd2"), ("stable-diffusion-v2", "sd2"),
    ("sd3", "sd3"), ("stable-diffusion-3", "sd3"), ("flux", "flux1"), ("chroma", "chroma"),
)  # fmt: skip


def claimed_family(metadata: dict[str, str]) -> str:
    """Give the family the metadata claims, "" if none: shapes are believed before it."""
    for key in ("intarsia.family", "ss_base_model_version", "modelspec.architecture"):
        value = metadata.get(key, "").lower()
        for start, family in BASES:
            if value == family or value.startswith(start):
                return family
    return ""
