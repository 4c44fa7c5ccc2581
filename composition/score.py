"""Who is where in a composed picture: each box against every concept drawn alone, by the judge's embedding.

No labels are needed: what a concept should look like is shown by its own adapter, drawn alone with the same seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..pipelines.boxes import Box

if TYPE_CHECKING:
    from PIL import Image

    from ..pipelines.judge import Judge

ALIKE = 0.5  # least cosine with a concept drawn alone that counts as being it


@dataclass(frozen=True)
class Score:
    """What was found in one picture.

    Args:
        concepts: Names.
        presence: Of each, 1 if its own box shows it, and no other concept more; else 0.
        identity: Cosine of its box with it drawn alone, from -1 to 1.
        confusion: Row by concept, column by box: the cosine of that box with that concept drawn alone.
    """

    concepts: tuple[str, ...]
    presence: tuple[int, ...]
    identity: tuple[float, ...]
    confusion: tuple[tuple[float, ...], ...]


def score(
    judge: Judge, picture: Image.Image, names: Sequence[str], boxes: Sequence[Box], alone: Sequence[Image.Image]
) -> Score:
    """Score one picture.

    Args:
        judge: Loaded.
        picture: Composed.
        names: Of the concepts.
        boxes: Their places.
        alone: Each concept drawn alone on the whole canvas.
    """
    seen = judge.embed([picture] * len(boxes), list(boxes), style=False).content  # (boxes, width)
    real = judge.embed(list(alone), style=False).content  # (concepts, width)
    table = real @ seen.T  # (concepts, boxes)
    own = table.diagonal()
    found = (own >= ALIKE) & (table.argmax(0) == table.new_tensor(range(len(names))))
    return Score(
        tuple(names),
        tuple(int(here) for here in found.tolist()),
        tuple(round(value, 4) for value in own.tolist()),
        tuple(tuple(round(value, 4) for value in row) for row in table.tolist()),
    )
