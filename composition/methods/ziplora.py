"""ZipLoRA: content and style become one adapter, each with a learned coefficient for every input of every layer.

A layer changes by m_c * dW_c + m_s * dW_s, column by column; the coefficients begin at 1 and learn on the model at hand
to keep what each adapter predicts alone: |e(both, content prompt) - e(content)|^2 + the same of the style + lambda
|m_c m_s| (arXiv:2311.13600). Deviations: nobody has the training pictures here, so the noisy
inputs are the latents on the way along which each adapter draws its own prompt; means stand in place of sums, as in the
known code; inputs of convolutions have coefficients too. Layers that one adapter alone changes, and text encoders, keep
the coefficient 1. `export` writes the result as one ordinary LoRA file: scaling columns of dW is scaling columns of A.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from ...pipelines.options import Options, option
from ...pipelines.requests import MAX_SEED
from ..method import CompositionMethod, Drawing
from ..pair import check_pair, pair

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from ..composition import Composition
    from ..zipping import Zipped


class ZipLoraOptions(Options):
    """Options of ZipLoRA."""

    steps: int = option(100, label="Learning steps", help="0 is plain Merge.", low=0, high=2000, unit="steps")
    rate: float = option(0.01, label="Learning rate", help="Of the coefficients.", low=0, high=1)
    penalty: float = option(
        0.01, label="Penalty", help="lambda: how much content and style must not use the same inputs.", low=0, high=10
    )
    ways: int = option(
        1, label="Pictures to learn from", help="How many each adapter draws alone before the learning.", low=1, high=16
    )
    seed: int = option(
        0, label="Learning seed", help="All pictures of a layout share the coefficients of this seed.", low=0,
        high=MAX_SEED,
    )  # fmt: skip
    style_prompt: str = option(
        "",
        label="Style prompt",
        help="What the style draws alone. Empty: its own words, or else the prompt.",
        high=2000,
    )


@contextmanager
def _attach(composition: Composition, options: ZipLoraOptions) -> Generator[Drawing]:
    from ...pipelines.attach import attached
    from ...pipelines.step_ranges import StepRanges

    zipped = _learned(composition, options)
    content, style = (
        replace(attachment, adapter=adapter)
        for attachment, adapter in zip(pair(composition), zipped.adapters, strict=True)
    )
    with attached(composition.model.components, (content, style)) as hung:
        (work,) = composition.begin([composition.encode(hung, composition.prompt, hung.names)])
        yield Drawing(work, (StepRanges(hung, (content, style)),), facts=lambda: zipped.facts)


def export(composition: Composition, options: ZipLoraOptions, path: Path, dtype: torch.dtype | None = None) -> Path:
    """Write content and style, at their weights and learned coefficients, as one LoRA of the rank of both.

    Args:
        composition: As for a picture; what was learned for its pictures is used again.
        options: Of the method.
        path: Where to write; the folder must exist.
        dtype: What to store; None for float32.

    Raises:
        AdapterError: The adapters are no plain LoRAs, do not fit, or act in a part of the steps only.
        Cancelled: A stop was asked for; nothing was written.
    """
    from ..zipping import write_zipped

    return write_zipped(composition, _learned(composition, options), options, path, dtype)


def _learned(composition: Composition, options: ZipLoraOptions) -> Zipped:
    from ..zipping import Learning, learn

    if "ziplora" not in composition.memo:
        learning = Learning(
            options.steps, options.rate, options.penalty, options.ways, options.seed, options.style_prompt
        )
        composition.memo["ziplora"] = learn(composition, pair(composition), learning)
    return composition.memo["ziplora"]


METHOD = CompositionMethod(
    "ziplora", "ZipLoRA", "One content and one style, joined by coefficients learned before the first picture.",
    "arXiv:2311.13600", ZipLoraOptions, _attach, needs=frozenset({"gradients"}), most=2, check=check_pair,
)  # fmt: skip
