"""Scores of the separation bench: how near a picture is to the right one, and what it kept of its two sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import instruments

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ...pipelines.judge import Judge
    from .arms import Pair

NARROW = 0.05  # of cosine: ends that the judge sees no farther apart give no scale to measure a way on


class Ruler:
    """Measures pictures against the three real pictures of a pair.

    Args:
        judge: Loaded.
        pair: What they show.
        real: The pictures by their names in `arms.CONTROLS`.
    """

    def __init__(self, judge: Judge, pair: Pair, real: dict[str, Image]) -> None:
        self.real = real
        self._judge = judge
        self._truth, self._content, self._style = (
            judge.embed([real[name]]) for name in ("truth", "content-picture", "style-picture")
        )
        self._lite0 = instruments.lite0([real["truth"]])
        self._label = judge.contents.index(pair.truth.content)
        self._old, self._new = judge.styles.index(pair.content.style), judge.styles.index(pair.style.style)

    def scores(self, images: Sequence[Image]) -> list[dict[str, float | None]]:
        """Measure pictures.

        Args:
            images: Drawn or real.

        Returns:
            Per picture: `content`, `lite0` and `style`, cosines to the truth; `rank` of the content among all the
            judge knows, from 1; `top1` and `style_hit`, whether content and style are the nearest; `st_lpips` to the
            truth; `style_leak`, the share of the way from the truth's style (0) to the content picture's (1);
            `style_caught`, whether the latter is the nearest; `content_leak`, the share of the way from the truth's
            content (0) to the style picture's (1). A share is None where the judge sees both ends as one.
        """
        seen = self._judge.embed(images)
        contents, styles = (
            self._judge.content_scores(seen),
            self._judge.style_scores(seen),
        )  # (n, contents), (n, styles)
        rank = 1 + (contents > contents[:, [self._label]]).sum(1)
        carried = (seen.content * self._style.content).sum(-1)
        columns: dict[str, Tensor | None] = {
            "content": (seen.content * self._truth.content).sum(-1),
            "top1": (rank == 1).float(),
            "rank": rank,
            "lite0": instruments.cosine(instruments.lite0(images), self._lite0),
            "style": (seen.style * self._truth.style).sum(-1),
            "style_hit": (styles.argmax(1) == self._new).float(),
            "st_lpips": instruments.st_lpips(images, [self.real["truth"]] * len(images)),
            "style_leak": share(self._leaning(seen), self._leaning(self._truth), self._leaning(self._content)),
            "style_caught": (styles.argmax(1) == self._old).float(),
            "content_leak": share(carried, (self._truth.content * self._style.content).sum(-1), carried.new_ones(1)),
        }
        return [  # adding 0 makes -0 a plain 0
            {key: None if values is None else round(float(values[index]), 6) + 0.0 for key, values in columns.items()}
            for index in range(len(images))
        ]

    def _leaning(self, seen: Any) -> Tensor:  # noqa: ANN401 - Embedded, whose module needs torch
        """How much nearer to the old style's prototype than to the new one's: `(n,)`."""
        scores = self._judge.style_scores(seen)
        return scores[:, self._old] - scores[:, self._new]


def share(value: Tensor, start: Tensor, end: Tensor) -> Tensor | None:
    """Say how far `value` `(n,)` has come on the way from `start` to `end` `(1,)`; None if that way is too short."""
    way = end - start
    return (value - start) / way if float(way.abs()) > NARROW else None
