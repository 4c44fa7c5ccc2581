"""Merge: every adapter at once, each layer adding the exact sum of their changes."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ...pipelines.options import Options, option
from ..method import CompositionMethod, Drawing

if TYPE_CHECKING:
    from ..composition import Composition


class MergeOptions(Options):
    """Options of Merge."""

    scale: float = option(1.0, label="Scale", help="Of the whole sum; the paper's code uses 0.8.", low=0, high=2)


@contextmanager
def _attach(composition: Composition, options: MergeOptions) -> Generator[Drawing]:
    from ...pipelines.attach import attached
    from ...pipelines.step_ranges import StepRanges

    with attached(composition.model.components, composition.attachments) as hung:
        hung.weights = {concept.name: concept.attachment.weight * options.scale for concept in composition.concepts}
        (work,) = composition.begin([composition.encode(hung, composition.prompt, hung.names)])
        yield Drawing(work, (StepRanges(hung, composition.attachments),))


METHOD = CompositionMethod(
    "merge", "Merge", "All adapters act everywhere, as their exact sum.", "arXiv:2402.16843, section 2 (LoRA Merge)",
    MergeOptions, _attach,
)  # fmt: skip
