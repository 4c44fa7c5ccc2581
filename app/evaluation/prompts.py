"""What the report card asks a model to draw: single contents and scenes of two, in Intarsia's own caption form."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...pipelines.requests import MAX_SEED
from ...training.icons import SETS
from .layouts import ARRANGEMENTS, Arrangement, Scene

if TYPE_CHECKING:
    from ...pipelines.sources import ModelSource

STYLES = tuple(icon_set.style for icon_set in SETS)
LEFT_RIGHT, ABOVE_BELOW = (arrangement.boxes for arrangement in ARRANGEMENTS[2])
# Two renderings of the same drawings, which people cannot tell apart either: the one counts as the other.
TWINS = {"fluent-emoji": "fluent-3d"}
RELATIONS = (
    Arrangement("left", LEFT_RIGHT, "{0} left of {1}"),
    Arrangement("right", LEFT_RIGHT[::-1], "{0} right of {1}"),
    Arrangement("above", ABOVE_BELOW, "{0} above {1}"),
    Arrangement("below", ABOVE_BELOW[::-1], "{0} below {1}"),
)


@dataclass(frozen=True)
class Asked:
    """One picture to draw.

    Args:
        key: Its name among the records and files.
        prompt: The text.
        contents: What it shows, in the order of the text.
        style: In which style.
        seed: Of the picture.
        scene: What lies where; None for a single content.
    """

    key: str
    prompt: str
    contents: tuple[str, ...]
    style: str
    seed: int
    scene: Scene | None = None


def taught(source: ModelSource, everything: Sequence[str]) -> tuple[str, ...]:
    """The contents a model was taught: the list `contents` of the `card.json` in its folder, else `everything`.

    Args:
        source: The model.
        everything: All contents that may be asked for.
    """
    card = source.path / "card.json" if source.path and source.path.is_dir() else None
    if card is None or not card.is_file():
        return tuple(everything)
    listed: list[str] = json.loads(card.read_text("utf-8")).get("contents") or list(everything)
    known = set(everything)
    return tuple(content for content in listed if content in known)


def singles(kind: str, contents: Sequence[str], count: int, seed: int) -> list[Asked]:
    """Ask for `count` pairs of content and style, every pair once before any comes twice."""
    from ...training.scenes import named

    rng = random.Random(f"{kind} {seed}")
    grid = [(content, style) for content in contents for style in STYLES]
    order: list[tuple[str, str]] = []
    while grid and len(order) < count:
        order += rng.sample(grid, len(grid))
    return [
        Asked(f"{kind}/{i:04d}", f"{named(content)}, {style} style", (content,), style, rng.randrange(MAX_SEED))
        for i, (content, style) in enumerate(order[:count])
    ]


def scenes(contents: Sequence[str], count: int, seed: int) -> list[Asked]:
    """Ask for `count` scenes of two different contents with a stated relation."""
    rng = random.Random(f"scenes {seed}")
    made: list[Asked] = []
    for i in range(count if len(contents) > 1 else 0):
        first, second = rng.sample(list(contents), 2)
        scene = Scene(i, RELATIONS[i % len(RELATIONS)], (first, second), rng.choice(STYLES))
        made.append(Asked(f"scene/{i:04d}", scene.prompt, scene.contents, scene.style, rng.randrange(MAX_SEED), scene))
    return made
