"""Composite: one prediction per concept at every step, averaged.

The mean of the guided predictions is the paper's eq. 3, guidance being linear. The concepts share one batch, each
sample with its own adapter; the paper's code runs them one after another.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from ...pipelines.options import Options, option
from ..method import CompositionMethod, Drawing

if TYPE_CHECKING:
    from torch import Tensor

    from ..composition import Composition


class CompositeOptions(Options):
    """Options of Composite."""

    average: Literal["equal", "weighted"] = option(
        "equal",
        label="Average",
        help="weighted: in parts of the concepts' weights, which then leave the adapters at 1.",
    )


@contextmanager
def _attach(composition: Composition, options: CompositeOptions) -> Generator[Drawing]:
    from ...pipelines.attach import attached
    from ...pipelines.step_ranges import StepRanges
    from ..composition import Fan, shares

    weights = [concept.attachment.weight for concept in composition.concepts]
    parts = shares(weights if options.average == "weighted" else [1.0] * len(weights))
    with attached(composition.model.components, composition.attachments) as hung:
        if options.average == "weighted":
            hung.weights = dict.fromkeys(composition.names, 1.0)
        prompt = composition.encode(hung, composition.prompt, hung.names)
        works = composition.begin([prompt] * len(parts))
        rows = [(name, *composition.style_names) for name in composition.names]
        fan = Fan(hung, works, rows, composition.together)

        def network(latents: Tensor, timestep: Tensor) -> Tensor:
            predictions = fan(latents, timestep)  # (concepts, ...)
            share = predictions.new_tensor(parts).view(-1, *[1] * (predictions.ndim - 1))
            return (share * predictions).sum(0, keepdim=True)

        yield Drawing(replace(works[0], network=network), (StepRanges(hung, composition.attachments),))


METHOD = CompositionMethod(
    "composite", "Composite", "At every step one prediction per concept, averaged.",
    "arXiv:2402.16843, section 2 (LoRA Composite)",
    CompositeOptions, _attach,
)  # fmt: skip
