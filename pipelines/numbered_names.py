"""The lora_diffusion package (cloneofsimo) numbers layers in the order its search met them; this finds it again.

It looked for linear layers inside CrossAttention and GEGLU of the UNet and CLIPAttention of the text encoder, walking
the modules as diffusers 0.9 to 0.11 and transformers registered them: the middle block last, the feed-forward between
the two attentions, key and value before query in the text encoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

BLOCKS = ("down_blocks", "up_blocks", "mid_block")
IN_BLOCK = (
    *(f"attn1.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    *(f"attn2.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")),
)
IN_ATTENTION = ("k_proj", "v_proj", "q_proj", "out_proj")
NAME = re.compile(r"(unet|text_encoder):(\d+):(up|down)")
EMBEDDING = re.compile(r"<[^<>]+>")  # learned words, which these files may carry


def in_order(component: str, paths: Iterable[str]) -> list[str]:
    """Order the layers of a component as lora_diffusion numbers them.

    Args:
        component: "unet" or "text_encoder".
        paths: Inside the component.
    """
    if component == "text_encoder":
        layers = [path.rpartition(".") for path in paths if ".self_attn." in path]
        there = {stem: int(stem.split(".")[-2]) for stem, _, last in layers if last in IN_ATTENTION}
        return [f"{stem}.{part}" for stem in sorted(there, key=there.__getitem__) for part in IN_ATTENTION]
    known = set(paths)
    stems = {match[1] for path in known if (match := re.match(r"(.+\.transformer_blocks\.\d+)\.", path))}

    def place(stem: str) -> tuple[int, ...]:
        return (BLOCKS.index(stem.split(".")[0]), *map(int, re.findall(r"\d+", stem)))

    ordered = sorted((stem for stem in stems if stem.startswith(BLOCKS)), key=place)
    return [path for stem in ordered for part in IN_BLOCK if (path := f"{stem}.{part}") in known]
