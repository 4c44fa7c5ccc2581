"""Where the words of a concept stand among the tokens of a prompt, as the denoiser's text axis counts them."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from ..pipelines.errors import InputError
from ..pipelines.text import T5_LIMITS

if TYPE_CHECKING:
    from ..pipelines.models import Model

IDLE_WORDS = """a an the and or but nor so yet of in on at to for with by from as into through during before after
above below between under over it its this that these those their his her my your our is are was were be been being
has have had having which who whom whose where when while"""
IDLE = frozenset(IDLE_WORDS.split())  # say nothing of a concept
ARTICLES = re.compile(r"(?:a|an|the)\s+", re.IGNORECASE)


def positions(model: Model, prompt: str, phrase: str, articles: bool = True, idle: Collection[str] = ()) -> list[int]:
    """Give the positions of a phrase along the text axis of `Network.text`, in rising order.

    UNets read one CLIP sequence, the start token counted, which both encoders of SDXL share; FLUX.1 reads T5's, SD3
    CLIP's and behind it T5's, where the phrase has positions in both.

    Args:
        model: Loaded, with the adapters' own words taught if they bring some.
        prompt: As it is encoded.
        phrase: Its first place counts, where it stands as whole words if it does anywhere; case does not matter.
        articles: False leaves out an article that the phrase begins with: its map says nothing of the concept.
        idle: Words that are left out of the phrase, wherever in it, and its punctuation with them, unless nothing else
            is in it; in lower case.

    Raises:
        InputError: The phrase is not in the prompt, or no encoder reads all of it because the prompt is too long.
    """
    first, last = span(prompt, phrase)
    article = None if articles else ARTICLES.match(prompt, first, last)
    if article is not None and article.end() < last:
        first = article.end()
    start = 0
    found: list[int] = []
    parts = _telling(prompt, (first, last), idle) if idle else [(first, last)]
    for tokenizer, limit in _sequences(model):
        there = sorted({place for part in parts for place in _within(tokenizer, prompt, part)})
        if there and there[-1] < limit - 1:  # the last place holds the end token
            found += [start + place for place in there]
        start += limit
    if not found:
        raise InputError(
            f'The prompt is too long: it is cut off before the end of "{phrase}".',
            "Shorten it, or move these words forward.",
        )
    return found


def ends(model: Model, prompt: str) -> list[int]:
    """Give the positions of the end of a prompt, one for each sequence that is read."""
    start = 0
    found: list[int] = []
    for tokenizer, limit in _sequences(model):
        if tokenizer is not None:
            found.append(start + min(len(tokenizer(prompt, truncation=False, verbose=False)["input_ids"]), limit) - 1)
        start += limit
    return found


def span(prompt: str, phrase: str) -> tuple[int, int]:
    """Give the first and the last character (not included) of a phrase in a prompt.

    Raises:
        InputError: It is not there.
    """
    words = r"\s+".join(re.escape(word) for word in phrase.split())
    found = None
    if words:
        whole = re.search(rf"(?<!\w){words}(?!\w)", prompt, re.IGNORECASE)
        found = whole or re.search(words, prompt, re.IGNORECASE)
    if found is None:
        raise InputError(
            f'The prompt does not hold "{phrase}".', "Write these words into it, or set the concept's words."
        )
    return found.span()


def with_trigger(prompt: str, phrase: str, trigger: str) -> tuple[str, str]:
    """Write an adapter's trigger words in front of a concept's own, behind its article, where the prompt lacks them.

    Args:
        prompt: Holds the phrase.
        phrase: The concept's words.
        trigger: "" changes nothing; one that holds the concept's words takes their place.

    Returns:
        The prompt, and the concept's words in it.

    Raises:
        InputError: The phrase is not there.
    """
    first, last = span(prompt, phrase)
    trigger = " ".join(trigger.split())
    if not trigger or trigger.casefold() in prompt.casefold():
        return prompt, prompt[first:last]
    article = ARTICLES.match(prompt, first, last)
    if article is not None and article.end() < last:
        first = article.end()
    words = prompt[first:last]
    said = trigger if words.casefold() in trigger.casefold() else f"{trigger} {words}"
    return f"{prompt[:first]}{said}{prompt[last:]}", said


def _sequences(model: Model) -> list[tuple[Any, int]]:
    """The token sequences the denoiser reads, one behind the other: tokenizer and length; a missing encoder's is
    nobody's."""
    parts, spec = model.components, model.spec
    clip = parts.get("tokenizer")
    short = (clip, 77 if clip is None else int(clip.model_max_length))
    if spec.denoiser == "unet":
        return [short]
    long = (parts.get(spec.tokenizers[-1]), T5_LIMITS[spec.name])
    return [long] if spec.name == "flux1" else [short, long]


def _telling(prompt: str, span: tuple[int, int], idle: Collection[str]) -> list[tuple[int, int]]:
    """The words within a span that are not idle; the whole of it if all are."""
    words = [match for match in re.compile(r"\w+").finditer(prompt, *span) if match.group().casefold() not in idle]
    return [match.span() for match in words] or [span]


def _within(tokenizer: Any, prompt: str, span: tuple[int, int]) -> list[int]:  # noqa: ANN401
    if tokenizer is None:
        return []
    read = tokenizer(prompt, return_offsets_mapping=True, truncation=False, verbose=False)
    offsets: list[tuple[int, int]] = read["offset_mapping"]
    return [place for place, (first, last) in enumerate(offsets) if first < span[1] and last > max(span[0], first)]
