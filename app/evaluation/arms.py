"""What the separation bench compares: ways to draw the content of one picture in the style of another.

A recipe joins by one more entry in `ARMS`: a function that trains whatever it needs and says what is drawn with it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ...pipelines.errors import InputError
from ...pipelines.events import Event

if TYPE_CHECKING:
    from ...pipelines.adapter_types import AdapterFile
    from ...training.corpus import Captioned

HELD_OUT, HELD_OUT_STYLE = "held-out", "held-out-style"


@dataclass(frozen=True)
class Pair:
    """One question with its answer.

    Args:
        number: From 0.
        content: The picture whose content is wanted: a held-out content in a known style.
        style: The picture whose style is wanted: another content in a held-out style.
        truth: The real picture of that content in that style.
    """

    number: int
    content: Captioned
    style: Captioned
    truth: Captioned

    @property
    def prompt(self) -> str:
        """The wish in words the model was taught to read."""
        return caption(self.truth)


@dataclass(frozen=True)
class Wish:
    """What to draw: a prompt, and the adapters with their weights."""

    prompt: str
    adapters: tuple[tuple[AdapterFile, float], ...] = ()


class Teacher(Protocol):
    """Trains adapters, or finds them; `options` are the recipe's beyond those of the bench."""

    def __call__(
        self,
        recipe: str,
        name: str,
        pictures: Sequence[tuple[Captioned, str]],  # each with its caption
        **options: object,
    ) -> Generator[Event, None, tuple[AdapterFile, ...]]: ...


@dataclass(frozen=True)
class Arm:
    """One way to draw a pair.

    Args:
        name: On the command line and in records.
        title: For people.
        prepare: Trains what a pair needs and says what is drawn.
    """

    name: str
    title: str
    prepare: Callable[[Pair, Teacher], Generator[Event, None, Wish]]


def caption(row: Captioned) -> str:
    """Describe a picture as captions of the corpus do: "a burrito, twemoji style"."""
    from ...training.scenes import named

    return f"{named(row.content)}, {row.style} style"


def called(row: Captioned) -> str:
    """The name of what is learned from one picture alone, the same in every pair."""
    return f"{row.style} {row.code}"


def _prompt_only(pair: Pair, teach: Teacher) -> Generator[Event, None, Wish]:
    yield from ()
    return Wish(pair.prompt)


def _lora_sum(pair: Pair, teach: Teacher) -> Generator[Event, None, Wish]:
    """Each picture learned alone with its caption, both adapters at weight 1."""
    adapters: list[AdapterFile] = []
    for row in (pair.content, pair.style):
        adapters += yield from teach("lora", called(row), [(row, caption(row))])
    return Wish(pair.prompt, tuple((adapter, 1.0) for adapter in adapters))


def _blora(pair: Pair, teach: Teacher) -> Generator[Event, None, Wish]:
    """The content half of one picture with the style half of the other, called as the paper does (section 4.2)."""
    from ...training.recipe import recipes

    recipe = recipes()["blora"]
    names = [called(pair.content), called(pair.style)]
    while len({recipe.trigger(name, recipe.options()) for name in names}) < 2:
        names[1] += "'"  # the recipe makes one of 1000 words from a name; two halves must not share it
    halves: list[AdapterFile] = []
    for name, row, role in zip(names, (pair.content, pair.style), ("content", "style"), strict=True):
        made = yield from teach("blora", name, [(row, "")])
        halves += [adapter for adapter in made if adapter.role == role]
    content, style = halves
    return Wish(f"A {content.trigger} in {style.trigger} style", ((content, 1.0), (style, 1.0)))


ARMS = (
    Arm("prompt", "Prompt alone, no adapter", _prompt_only),
    Arm("lora-sum", "LoRA of each picture, both attached", _lora_sum),
    Arm("blora", "B-LoRA, content half and style half", _blora),
)

# Real pictures scored as if they had been drawn: what the scores mean.
CONTROLS: dict[str, tuple[str, Callable[[Pair], Captioned]]] = {
    "truth": ("The true picture itself", lambda pair: pair.truth),
    "content-picture": ("The content picture itself", lambda pair: pair.content),
    "style-picture": ("The style picture itself", lambda pair: pair.style),
}


def chosen_arms(text: str) -> tuple[Arm, ...]:
    """Give the arms named in a text with commas; all of them if it is empty.

    Raises:
        InputError: There is no such arm.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = {arm.name: arm for arm in ARMS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"There is no arm called {unknown[0]}.", f"Arms: {', '.join(known)}.")
    return tuple(arm for arm in ARMS if not names or arm.name in names)


def choose_pairs(
    rows: Sequence[Captioned], count: int, seed: int, contents: Collection[str], styles: Collection[str]
) -> tuple[Pair, ...]:
    """Choose pairs, balanced over held-out styles, groups of contents and known styles.

    Every held-out style that has real pictures of held-out contents gets its turn; within it the groups of contents
    take turns, and contents that no pair has yet come first. The style picture shows a content of another group, so
    that what it leaves behind can be told from what was wanted.

    Args:
        rows: The real pictures.
        count: Fewer are chosen if there are not as many.
        seed: The choice follows from it.
        contents: What the judge can name.
        styles: What the judge can name.

    Raises:
        InputError: There is no held-out content that is drawn in a held-out style.
    """
    rng = random.Random(f"separation:{seed}")
    givens: dict[str, list[Captioned]] = {}  # content -> its pictures in known styles
    held: dict[str, list[Captioned]] = {}  # held-out style -> its pictures
    for row in sorted(rows, key=lambda row: (row.style, row.code)):
        if row.split == HELD_OUT and row.content in contents and row.style in styles:
            givens.setdefault(row.content, []).append(row)
        elif row.split == HELD_OUT_STYLE and row.style in styles:
            held.setdefault(row.style, []).append(row)
    queues = {style: _in_turns([row for row in there if row.content in givens], rng) for style, there in held.items()}
    queues = {style: queue for style, queue in queues.items() if queue}
    if not queues:
        raise InputError(
            "The corpus has no held-out content in a held-out style that the judge knows.",
            "Leave --corpus out to use the pictures that come along, or build the corpus again.",
        )
    used: dict[str, int] = {}  # how often a content, a style and a style picture had its turn
    pairs: list[Pair] = []
    while len(pairs) < count and queues:
        for style in list(queues)[: count - len(pairs)]:
            queue = queues[style]
            truth = queue.pop(_least(used, [f"content {row.content}" for row in queue]))
            if not queue:
                del queues[style]
            given = _picked(givens[truth.content], [f"known {row.style}" for row in givens[truth.content]], used, rng)
            others = [row for row in held[style] if row.content != truth.content]
            others = [row for row in others if row.group != truth.group] or others
            if not others:
                continue
            beside = _picked(others, [f"beside {row.code}" for row in others], used, rng)
            used[f"content {truth.content}"] = used.get(f"content {truth.content}", 0) + 1
            pairs.append(Pair(len(pairs), given, beside, truth))
    return tuple(pairs)


def without_truth(rows: Sequence[Captioned]) -> tuple[str, ...]:
    """Name the held-out styles no held-out content is drawn in: they can be in no pair."""
    hidden = {row.content for row in rows if row.split == HELD_OUT}
    held = {row.style for row in rows if row.split == HELD_OUT_STYLE}
    return tuple(sorted(held - {row.style for row in rows if row.split == HELD_OUT_STYLE and row.content in hidden}))


def _in_turns(rows: Sequence[Captioned], rng: random.Random) -> list[Captioned]:
    """Shuffle, then let the groups take turns."""
    groups: dict[str, list[Captioned]] = {}
    for row in rng.sample(list(rows), len(rows)):
        groups.setdefault(row.group, []).append(row)
    longest = max((len(group) for group in groups.values()), default=0)
    return [group[turn] for turn in range(longest) for group in groups.values() if turn < len(group)]


def _least(used: dict[str, int], keys: Sequence[str]) -> int:
    """The first index among those used least."""
    return min(range(len(keys)), key=lambda index: (used.get(keys[index], 0), index))


def _picked(rows: Sequence[Captioned], keys: Sequence[str], used: dict[str, int], rng: random.Random) -> Captioned:
    """Draw one of the rows whose key was used least, and count it."""
    least = min(used.get(key, 0) for key in keys)
    index = rng.choice([i for i, key in enumerate(keys) if used.get(key, 0) == least])
    used[keys[index]] = used.get(keys[index], 0) + 1
    return rows[index]
