"""Orthogonal sum: the exact sum of all adapters, with the crosstalk between them measured and their bases checked.

W = W0 + sum of lambda_i A_i B_i^T; adapters that were trained in disjoint columns of one orthogonal basis leave each
other's inputs alone (arXiv:2312.02432; lambda is 0.6 there). The sum is drawn whatever the bases are, and what they are
is told. Deviation: crosstalk is measured on the changes themselves, as |dW_i dW_j^T| / (|dW_i| |dW_j|), where the paper
reasons about inputs.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ...pipelines.options import Options, option
from ..method import CompositionMethod, Drawing

if TYPE_CHECKING:
    from ..composition import Composition
    from ..crosstalk import Crosstalk


class OrthogonalOptions(Options):
    """Options of the orthogonal sum."""

    scale: float = option(1.0, label="Scale", help="Lambda: of the whole sum; the paper uses 0.6.", low=0, high=2)
    layers: bool = option(False, label="Every layer", help="Tell the crosstalk of each layer, not only of each pair.")


def figures(pairs: Sequence[Crosstalk], layers: bool) -> dict[str, float]:
    """Crosstalk of all pairs, each pair, the worst layer and, if asked for, every layer's worst pair."""
    if not pairs:
        return {}
    worst: dict[str, float] = {}
    for pair in pairs:
        for path, value in pair.layers.items():
            worst[path] = max(value, worst.get(path, 0.0))
    told = {"crosstalk": max(pair.overall for pair in pairs)}
    told |= {f"crosstalk of {' and '.join(pair.names)}": pair.overall for pair in pairs}
    told["crosstalk of the worst layer"] = max(worst.values(), default=0.0)
    told["pairs in disjoint bases"] = float(sum(pair.disjoint for pair in pairs))
    return told | ({f"crosstalk in {path}": value for path, value in worst.items()} if layers else {})


@contextmanager
def _attach(composition: Composition, options: OrthogonalOptions) -> Generator[Drawing]:
    from ...pipelines.attach import attached
    from ...pipelines.step_ranges import StepRanges
    from ..crosstalk import crosstalk

    components, attachments = composition.model.components, composition.attachments
    if "orthogonal" not in composition.memo:
        composition.memo["orthogonal"] = crosstalk(components, attachments, composition.token)
    pairs: tuple[Crosstalk, ...] = composition.memo["orthogonal"]
    facts = figures(pairs, options.layers)
    with attached(components, attachments) as hung:
        hung.weights = {concept.name: concept.attachment.weight * options.scale for concept in composition.concepts}
        (work,) = composition.begin([composition.encode(hung, composition.prompt, hung.names)])
        remarks = tuple(pair.remark for pair in pairs)
        yield Drawing(work, (StepRanges(hung, attachments),), facts=lambda: facts, notices=remarks)


METHOD = CompositionMethod(
    "orthogonal", "Orthogonal sum", "The exact sum of all adapters, with their crosstalk and their bases told.",
    "arXiv:2312.02432", OrthogonalOptions, _attach,
)  # fmt: skip
