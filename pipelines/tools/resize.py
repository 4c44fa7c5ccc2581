"""LoRA-Squeeze: cut an adapter to a lower rank, or to as many ranks per layer as keep a share of its energy.

Paper: arXiv:2602.10993 (Post-Squeeze). The singular values come from two QR decompositions of the factors, which is
exact; PEFT's and kohya's tools make the whole change first.
"""

from __future__ import annotations

from ..factors import Factors, reduced, together
from ..options import option
from ..tool import FileOptions, Inputs, Parts, Tool, Work, layer_by_layer


class ResizeOptions(FileOptions):
    """Options of resizing."""

    rank: int = option(8, label="Rank", help="The most a layer may have; 0 for no limit.", low=0, high=4096)
    energy: float = option(
        1.0, label="Energy", help="Share of each layer's squared norm to keep, with the smallest rank that does.",
        low=0.01, high=1,
    )  # fmt: skip


def _work(inputs: Inputs, options: ResizeOptions) -> Work:
    def cut(path: str, parts: Parts) -> Factors:
        return reduced(together(parts), options.rank, options.energy)

    return (yield from layer_by_layer(inputs, options, "resize", cut))


TOOL = Tool(
    "resize",
    "Resize",
    "The nearest adapter of a lower rank.",
    "arXiv:2602.10993",
    ResizeOptions,
    1,
    1,
    "adapter",
    _work, weighted=True,
)  # fmt: skip
