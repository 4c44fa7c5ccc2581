"""What an adapter is once it has been read: a change for each layer, and where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .kind import Layer
from .kinds.lora import LowRank

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AdapterFile", "Layer", "LowRank", "Role"]
Role = Literal["concept", "content", "style"]


@dataclass(frozen=True)
class AdapterFile:
    """An adapter that was read, checked and brought to canonical names.

    Args:
        path: Where it was read from.
        family: Key of FAMILIES: "sd15", "sdxl".
        role: What it depicts; B-LoRA halves are "content" and "style".
        trigger: Words the prompt should hold, "" if none.
        layers: Canonical module path with its component in front, such as
            `unet.up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q`, to its change.
        sha256: Of the whole file.
        metadata: The file's own header texts.
        words: Words it brings along, each with its embedding `(width,)`; see learned_words.py.
    """

    path: Path
    family: str
    role: Role
    trigger: str
    layers: Mapping[str, Layer]
    sha256: str
    metadata: Mapping[str, str]
    words: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"])
