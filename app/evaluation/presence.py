"""Find taught contents in a picture: is each there, where, how often, and in whose box.

The judge looks through a fixed set of windows of four sizes. A content is found in a window if it is among the `TOP`
contents the judge finds most likely there, of all it knows, and if its score reaches a threshold. The threshold is
calibrated on scenes of real pictures of other contents, and its own errors are kept with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from ...pipelines.boxes import Box
from ...pipelines.errors import InputError
from .layouts import Scene

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ...pipelines.events import CancelToken
    from ...pipelines.judge import Embedded, Judge

TOP = 5
ALARMS = 0.005  # share of the contents that are not in a scene which may be found in it
SAME_THING = 0.1  # windows that share more than this part of the smaller one show one thing
SAME_PLACE = 0.25  # least intersection over union of a window with the box it belongs to
SIDES = ((1 / 3, 1 / 9), (1 / 2, 1 / 8), (3 / 4, 1 / 8), (1.0, 1.0))  # of windows, with the distance between two


@cache
def windows() -> tuple[Box, ...]:
    """The windows a picture is looked at through, small ones first."""
    found: list[Box] = []
    for side, stride in SIDES:
        count = round((1 - side) / stride) + 1
        starts = [index * stride for index in range(count)]
        found += [(x, y, min(1.0, x + side), min(1.0, y + side)) for y in starts for x in starts]
    return tuple(found)


def overlap(one: Box, other: Box) -> float:
    """Area two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def belongs(window: Box, box: Box) -> bool:
    """Whether a window shows what lies in a box: its centre is inside, and they share enough of their union."""
    x, y = (window[0] + window[2]) / 2, (window[1] + window[3]) / 2
    if not (box[0] < x < box[2] and box[1] < y < box[3]):
        return False
    shared = overlap(window, box)
    return shared / (area(window) + area(box) - shared) >= SAME_PLACE


@dataclass(frozen=True)
class Sight:
    """What the judge saw of one picture: all windows, then the boxes of its scene.

    Args:
        scores: `(windows + boxes, contents)` cosine to every content's prototype.
        seen: The embeddings of the boxes alone.
    """

    scores: Tensor
    seen: Embedded


@dataclass(frozen=True)
class Found:
    """One content in one picture.

    Args:
        score: Highest of all windows.
        window: Where that is.
        times: How many things in the picture are this content; 0 is absent.
        boxes: For every box of the scene, whether the content is found in its crop.
    """

    score: float
    window: Box
    times: int
    boxes: tuple[bool, ...]


class Finder:
    """Looks for contents.

    Args:
        judge: Whose contents include all that is looked for.
        threshold: Least score, by `calibrate`.
    """

    def __init__(self, judge: Judge, threshold: float = -1.0) -> None:
        self.judge = judge
        self.threshold = threshold
        self._column = {content: index for index, content in enumerate(judge.contents)}

    def column(self, content: str) -> int:
        """Where a content stands among the judge's.

        Raises:
            InputError: The judge does not know it.
        """
        if content not in self._column:
            raise InputError(f"The judge does not know {content}.", "Use the pictures the judge was made for.")
        return self._column[content]

    def look(self, picture: Image.Image, boxes: Sequence[Box]) -> Sight:
        """Look at a picture through every window and at every box."""
        import torch

        wide = self.judge.embed([picture] * len(windows()), windows(), style=False)
        seen = self.judge.embed([picture] * len(boxes), boxes)
        return Sight(torch.cat([self.judge.content_scores(one) for one in (wide, seen)]), seen)

    def named(self, scores: Tensor, content: str) -> Tensor:
        """Where a content counts as found.

        Args:
            scores: Of every content, `(n, contents)`.
            content: Which.

        Returns:
            Its score where it is found, else -1: `(n,)`.
        """
        mine = scores[:, self.column(content)]
        better = (scores > mine[:, None]).sum(dim=1)
        return mine.masked_fill((better >= TOP) | (mine < self.threshold), -1.0)

    def find(self, sight: Sight, content: str) -> Found:
        """Say where a content is, and how often."""
        hits, count = self.named(sight.scores, content), len(windows())
        scores = sight.scores[:count, self.column(content)]
        best = int(hits[:count].argmax() if float(hits[:count].max()) > -1 else scores.argmax())
        return Found(
            score=float(scores[best]),
            window=windows()[best],
            times=len(self._things(hits[:count])),
            boxes=tuple(value > -1 for value in hits[count:].tolist()),
        )

    @staticmethod
    def _things(hits: Tensor) -> list[Box]:
        """Of the windows with a hit, the best of every group that shows one thing (non-maximum suppression)."""
        values: list[float] = hits.tolist()
        order = sorted((index for index, value in enumerate(values) if value > -1), key=lambda i: -values[i])
        kept: list[Box] = []
        for index in order:
            box = windows()[index]
            if all(overlap(box, other) <= SAME_THING * min(area(box), area(other)) for other in kept):
                kept.append(box)
        return kept


@dataclass(frozen=True)
class Calibration:
    """A threshold and what it gets wrong on scenes of real pictures.

    Args:
        threshold: Least score of a content that counts as found.
        hits: Share of the contents of the scenes that are found in their own box.
        false_alarms: Share of the contents that are not in a scene that are found anywhere in it.
        present: How many were there.
        absent: How many were not.
    """

    threshold: float
    hits: float
    false_alarms: float
    present: int
    absent: int


def calibrate(
    judge: Judge, scenes: Iterable[tuple[Scene, Image.Image]], token: CancelToken | None = None
) -> Calibration:
    """Choose the least threshold that keeps false alarms to `ALARMS`, and see what share of what is there reaches it.

    Args:
        judge: To be calibrated; every content it knows that is not in a scene counts as absent there.
        scenes: With their pictures.
        token: Checked before every scene.

    Raises:
        Cancelled: A stop was asked for.
    """
    import torch

    finder = Finder(judge)
    there: list[float] = []
    not_there: list[Tensor] = []
    for scene, picture in scenes:
        if token is not None:
            token.check()
        scores = finder.look(picture, scene.boxes).scores[: len(windows())]  # (windows, contents)
        least = scores.topk(min(TOP, scores.shape[1]), dim=1).values[:, -1:]
        hits = scores.masked_fill(scores < least, -1.0)
        for content, box in zip(scene.contents, scene.boxes, strict=True):
            inside = [index for index, window in enumerate(windows()) if belongs(window, box)]
            there.append(float(hits[inside, finder.column(content)].max()))
        absent = torch.ones(scores.shape[1], dtype=torch.bool)
        absent[[finder.column(content) for content in scene.contents]] = False
        not_there.append(hits.amax(dim=0)[absent])
    positive, negative = torch.tensor(there), torch.cat(not_there)
    threshold = bound(negative)
    return Calibration(
        threshold=threshold,
        hits=float((positive >= threshold).float().mean()),
        false_alarms=float((negative >= threshold).float().mean()),
        present=len(positive),
        absent=len(negative),
    )


def bound(absent: Tensor, share: float = ALARMS) -> float:
    """Give the least threshold that at most this share of the scores of absent contents reach.

    There are thousands of absent contents for every one that is there, so this bound hardly depends on which scenes
    were drawn; the least score of a few contents that are there would.
    """
    allowed = int(share * len(absent))  # so many may reach it
    highest = absent.sort(descending=True).values
    return float(highest[: allowed + 1].min()) + 1e-6


def measure(finder: Finder, sight: Sight, scene: Scene, others: Sequence[str]) -> dict[str, list[object]]:
    """Measure where the contents of a scene are; every list has one entry per content.

    Args:
        finder: Calibrated.
        sight: Of the picture.
        scene: What was asked for.
        others: Contents that were not: finding one is a false alarm.

    Returns:
        `present` and `placed` (bool), `score`, `duplicates` (things beyond the one asked for), `inside` (a list per
        content: is it found in the crop of each box), `chosen` (of all taught contents, the one its box is most like:
        a number into the scene's contents, -1 for one of `others`), and `false_alarm` (bool, per one of `others`).
    """
    found = [finder.find(sight, content) for content in scene.contents]
    asked = [scene.contents.count(content) for content in scene.contents]
    return {
        "present": [one.times > 0 for one in found],
        "placed": [one.times > 0 and belongs(one.window, box) for one, box in zip(found, scene.boxes, strict=True)],
        "score": [round(one.score, 4) for one in found],
        "duplicates": [max(0, one.times - wanted) for one, wanted in zip(found, asked, strict=True)],
        "inside": [list(one.boxes) for one in found],
        "chosen": _chosen(finder, sight, scene, others),
        "false_alarm": [finder.find(sight, content).times > 0 for content in others],
    }


def _chosen(finder: Finder, sight: Sight, scene: Scene, others: Sequence[str]) -> list[object]:
    """Let the judge choose for every box among the contents that were taught, however little it is like any."""
    names = [*scene.contents, *others]
    boxes = sight.scores[len(windows()) :][:, [finder.column(name) for name in names]]
    best: list[int] = boxes.argmax(dim=1).tolist()
    return [index if index < len(scene.contents) else -1 for index in best]
