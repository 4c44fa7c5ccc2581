"""Layouts of several contents: which goes into which box, how a prompt says so, how real pictures are laid out."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...pipelines.boxes import Box
from ...pipelines.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

SMALLEST = 0.85  # side of a pasted picture, as a share of its box: scenes of the training corpus vary as much
COLOURS = ("#d62d30", "#2f6ed2", "#2f9a50", "#a245b4")  # of drawn boxes, in the order of the contents


@dataclass(frozen=True)
class Arrangement:
    """Square boxes, and the words for them.

    Args:
        boxes: One per content.
        words: How a caption says it, `{0}` being the content of the first box. As training/scenes.py words it, where
            it has such scenes; it has none of four, nor of two above one.
    """

    name: str
    boxes: tuple[Box, ...]
    words: str


def _square(x: float, y: float, side: float) -> Box:
    """A box by its centre and side."""
    half = side / 2
    return (max(0.0, x - half), max(0.0, y - half), min(1.0, x + half), min(1.0, y + half))  # no rounding beyond


ALONE = Arrangement("alone", ((0.0, 0.0, 1.0, 1.0),), "{0}")
ARRANGEMENTS: Mapping[int, tuple[Arrangement, ...]] = {
    2: (
        Arrangement("left-right", (_square(0.25, 0.5, 0.5), _square(0.75, 0.5, 0.5)), "{0} left of {1}"),
        Arrangement("above-below", (_square(0.5, 0.25, 0.5), _square(0.5, 0.75, 0.5)), "{0} above {1}"),
    ),
    3: (
        Arrangement("row", tuple(_square((i + 0.5) / 3, 0.5, 1 / 3) for i in range(3)), "{0}, {1} and {2}"),
        Arrangement(
            "two-above-one",
            (_square(0.25, 0.25, 0.5), _square(0.75, 0.25, 0.5), _square(0.5, 0.75, 0.5)),
            "{0} and {1} above {2}",
        ),
    ),
    4: (
        Arrangement(
            "grid",
            tuple(_square(x, y, 0.5) for y in (0.25, 0.75) for x in (0.25, 0.75)),
            "{0} and {1} above {2} and {3}",
        ),
    ),
}


@dataclass(frozen=True)
class Scene:
    """Contents in the boxes of an arrangement, all in one style.

    Args:
        number: Tells scenes of one bench apart.
        contents: Labels, in the order of the boxes.
    """

    number: int
    arrangement: Arrangement
    contents: tuple[str, ...]
    style: str

    @property
    def boxes(self) -> tuple[Box, ...]:
        return self.arrangement.boxes

    @property
    def name(self) -> str:
        return f"{len(self.contents)}-{self.number:02d}-{self.arrangement.name}"

    @property
    def prompt(self) -> str:
        return f"{self.arrangement.words.format(*map(_named, self.contents))}, {self.style} style"

    def alone(self, index: int) -> Scene:
        """One content of the scene as the only one, filling the canvas."""
        return replace(self, arrangement=ALONE, contents=(self.contents[index],))

    def moved(self) -> Scene:
        """Every content in the next one's box: everything is there, nothing where it belongs."""
        return replace(self, contents=(self.contents[-1], *self.contents[:-1]))


def _named(content: str) -> str:
    from ...training.scenes import named

    return named(content)


def choose(groups: Mapping[str, str], count: int) -> tuple[str, ...]:
    """Choose contents in turn from every group, so that they differ as much as they can.

    Args:
        groups: Content to its group, in an order that decides.
        count: How many.

    Raises:
        InputError: There are not as many.
    """
    if len(groups) < count:
        raise InputError(
            f"The bench needs {count} held-out contents drawn in enough styles; these pictures hold {len(groups)}.",
            "Build the corpus with `intarsia corpus build`, or leave --corpus out.",
        )
    queues = [[c for c, g in groups.items() if g == group] for group in sorted(set(groups.values()))]
    longest = max(len(queue) for queue in queues)
    turns = [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]
    return tuple(turns[:count])


def draw_scenes(drawn: Mapping[str, Sequence[str]], styles: Sequence[str], each: int, seed: int) -> tuple[Scene, ...]:
    """Draw the scenes of a bench: `each` of 2, 3 and 4 contents, as far as there are as many contents.

    Arrangements and styles take turns; every content is used about equally often.

    Args:
        drawn: Content to the styles it exists in.
        styles: To be used; a scene takes the next one all its contents exist in.
        each: Scenes per number of contents.
        seed: Draws who meets whom.

    Raises:
        InputError: A scene's contents share none of the styles.
    """
    made: list[Scene] = []
    for count, arrangements in ARRANGEMENTS.items():
        if count > len(drawn):
            continue
        rng = random.Random(f"scenes of {count}, {seed}")
        queue: list[str] = []
        for number in range(each):
            members = tuple(_next(queue, list(drawn), rng, count))
            turn = sum(divmod(number, len(arrangements)))  # so that every arrangement meets every style
            order = [*styles[turn % len(styles) :], *styles[: turn % len(styles)]]
            style = next((s for s in order if all(s in drawn[content] for content in members)), None)
            if style is None:
                raise InputError(
                    f"{', '.join(members)} are not all drawn in any of: {', '.join(styles)}.", "Choose other styles."
                )
            made.append(Scene(number, arrangements[number % len(arrangements)], members, style))
    return tuple(made)


def _next(queue: list[str], everyone: list[str], rng: random.Random, count: int) -> list[str]:
    """Take `count` different names from a queue that is filled up with everyone in a new order."""
    taken: list[str] = []
    while len(taken) < count:
        if not any(name not in taken for name in queue):
            queue.extend(rng.sample(everyone, len(everyone)))
        chosen = next(name for name in queue if name not in taken)
        queue.remove(chosen)
        taken.append(chosen)
    return taken


def pasted(
    pictures: Sequence[Image.Image], boxes: Sequence[Box], size: tuple[int, int], seed: int | None = None
) -> Image.Image:
    """Lay pictures on white into their boxes.

    Args:
        pictures: RGB on white, one per box.
        boxes: Fractions of the canvas.
        size: (width, height) of the canvas in pixels.
        seed: Draws each picture's size (85 to 100 % of its box) and place within the box; None fills the boxes.
    """
    from PIL import Image

    canvas = Image.new("RGB", size, "white")
    rng = random.Random(seed)
    for picture, (left, top, right, bottom) in zip(pictures, boxes, strict=True):
        share = 1.0 if seed is None else rng.uniform(SMALLEST, 1)
        x, y = (0.0, 0.0) if seed is None else (rng.random() * (1 - share), rng.random() * (1 - share))
        width, height = (right - left) * size[0], (bottom - top) * size[1]
        small = picture.convert("RGB").resize(
            (max(1, round(width * share)), max(1, round(height * share))), Image.Resampling.LANCZOS
        )
        canvas.paste(small, (round(left * size[0] + x * width), round(top * size[1] + y * height)))
    return canvas


def outlined(picture: Image.Image, scene: Scene, marks: Sequence[str], side: int = 256) -> Image.Image:
    """Draw the boxes of a scene onto an enlarged copy of a picture, each with its content's name and a mark."""
    from PIL import Image, ImageDraw

    scale = max(1, round(side / max(picture.size)))
    large = picture.convert("RGB").resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(large)
    for index, (box, content, mark) in enumerate(zip(scene.boxes, scene.contents, marks, strict=True)):
        colour = COLOURS[index % len(COLOURS)]
        left, top, right, bottom = (round(v * s) for v, s in zip(box, (*large.size, *large.size), strict=True))
        pen.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=2)
        text = f"{mark} {content}"
        pen.rectangle((left, top, left + pen.textlength(text) + 4, top + 12), fill=colour)
        pen.text((left + 2, top), text, fill="white")
    return large
