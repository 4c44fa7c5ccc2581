"""What an adapter is once it has been read: low-rank factors per layer, and where they came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Role = Literal["concept", "content", "style"]


@dataclass(frozen=True)
class LowRank:
    """One adapted layer: delta = scale * up @ down.

    Args:
        down: `(rank, in)`, or `(rank, in, kernel, kernel)` for a convolution.
        up: `(out, rank)`, or `(out, rank, 1, 1)`.
        alpha: As in the file; a file without alpha has alpha = rank.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class AdapterFile:
    """An adapter that was read, checked and brought to canonical names.

    Args:
        path: Where it was read from.
        family: Key of FAMILIES: "sd15", "sdxl".
        role: What it depicts; B-LoRA halves are "content" and "style".
        trigger: Words the prompt should hold, "" if none.
        layers: Canonical module path with its component in front, such as
            `unet.up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q`, to factors.
        sha256: Of the whole file.
        metadata: The file's own header texts.
    """

    path: Path
    family: str
    role: Role
    trigger: str
    layers: Mapping[str, LowRank]
    sha256: str
    metadata: Mapping[str, str]
