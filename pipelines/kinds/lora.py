"""LoRA and LoCon: the change is a product of two thin matrices, for a convolution with its kernel in the first.

Papers: arXiv:2106.09685; LoCon and its Tucker form, arXiv:2309.14859, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..kind import Change, Kind, Shape, Shapes, flat, show

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """One adapted layer: delta = scale * up @ down.

    Args:
        down: `(rank, in)`, or `(rank, in, kernel, kernel)` for a convolution.
        up: `(out, rank)`, or `(out, rank, 1, 1)`.
        alpha: As in the file; a file without alpha has alpha = rank.
        bias: `(out,)`, added with the same scale (PEFT's `lora_bias`); None if there is none.
    """

    down: Tensor
    up: Tensor
    alpha: float
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def change(self, weight: Tensor, bias: Tensor | None = None) -> Change:
        delta = self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1))
        added = None if self.bias is None else self.scale * self.bias.float()
        return Change(delta.reshape(weight.shape).to(weight.device), added)


def _rank(shapes: Shapes) -> int:
    return shapes["up"][1] if len(shapes["up"]) > 1 else 0


def _fit(shapes: Shapes, target: Shape | None) -> str | None:
    """Hold the pair against each other and against the layer; a Tucker core's kernel counts as down's."""
    down, up, core = flat(shapes["down"]), flat(shapes["up"]), shapes.get("mid")
    if core is not None:
        if len(down) != 2 or len(core) != 4 or core[0] != core[1] or core[0] != down[0]:
            return f"down {show(down)} and mid {show(core)} are no Tucker factors"
        down = flat((*down, *core[2:]))
    if len(down) not in (2, 4) or len(up) != 2 or 0 in down + up:
        return f"down {show(down)} and up {show(up)} are no low-rank factors"
    rank = down[0]
    if up[1] != rank:
        return f"down has rank {rank}, up has rank {up[1]}"
    if target is None:
        return None
    if len(target) < 2:
        return f"a LoRA cannot change a layer of shape {show(target)}"
    if down[1:] != flat(target)[1:]:
        return f"down expected {show(('r', *flat(target)[1:]))} but has {show(('r', *down[1:]))}"
    if up[0] != target[0]:
        return f"up expected {show((target[0], 'r'))} but has {show((up[0], 'r'))}"
    if "bias" in shapes and shapes["bias"] != target[:1]:
        return f"its bias is {show(shapes['bias'])} but the layer has {target[0]} outputs"
    return None


def _read(parts: Mapping[str, Tensor], alpha: float | None, target: Shape | None) -> LowRank:
    """Make the factors; a Tucker core is multiplied into down, which changes nothing but rounding."""
    import torch

    down, up, core = parts["down"], parts["up"], parts.get("mid")
    if core is not None:
        down = torch.einsum("rihw,io->rohw", core, down.flatten(1))  # (rank, in, kernel, kernel)
    if target is not None and len(target) == 4 and down.ndim == 2:  # stored flat, sits on a 1x1 convolution
        down = down[:, :, None, None]
    if target is not None and len(target) == 2 and down.ndim == 4:
        down = down[:, :, 0, 0]
    if down.ndim == 4 and up.ndim == 2:
        up = up[:, :, None, None]
    if down.ndim == 2 and up.ndim == 4:
        up = up[:, :, 0, 0]
    return LowRank(down, up, float(down.shape[0]) if alpha is None else alpha, parts.get("bias"))


KIND = Kind(
    name="lora",
    title="LoRA",
    paper="arXiv:2106.09685",
    required=(frozenset({"down", "up"}),),
    optional=frozenset({"mid", "bias"}),
    rank=_rank,
    fit=_fit,
    read=_read,
)
