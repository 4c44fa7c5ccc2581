"""Positions of a phrase: counted along the axis that the denoiser's attention reads, for every family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import composition_fakes as fakes
import pytest
import torch
from intarsia.composition.tokens import positions, span
from intarsia.pipelines.errors import InputError

Tiny = Callable[..., Path]
PROMPT = "a Red  apple and a cat, photo of a dog"
CLIP, T5 = 77, {"sd3": 256, "flux1": 512}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_unet_counts_the_start_token_and_reads_one_sequence(tiny: Tiny, family: str) -> None:
    model = fakes.tiny_model(tiny, family)
    assert positions(model, PROMPT, "red apple") == [2, 3]  # start, a, red, apple, a-n-d, a, cat
    assert positions(model, PROMPT, "cat") == [8]
    assert positions(model, PROMPT, "a cat") == [7, 8]
    assert positions(model, PROMPT, "a cat", articles=False) == [8]
    assert positions(model, PROMPT, "a", articles=False) == [1], "a phrase that is nothing but an article stays"
    assert positions(model, PROMPT, "and") == [4, 5, 6], "a word of several tokens has them all"


def test_both_encoders_of_sdxl_read_the_same_tokens(tiny: Tiny) -> None:
    model = fakes.tiny_model(tiny, "sdxl")
    first, second = (model.components[name](PROMPT)["input_ids"] for name in ("tokenizer", "tokenizer_2"))
    assert first == second


def test_flux_counts_in_t5_and_sd3_in_clip_and_then_in_t5(tiny: Tiny) -> None:
    flux, sd3 = fakes.tiny_model(tiny, "flux1"), fakes.tiny_model(tiny, "sd3")
    alone = positions(flux, PROMPT, "cat")
    pieces = flux.components["tokenizer_2"].convert_ids_to_tokens(flux.components["tokenizer_2"](PROMPT)["input_ids"])
    assert [pieces[place] for place in alone] == ["▁cat"]
    assert positions(sd3, PROMPT, "cat") == [8, CLIP + alone[0]]


def test_sd3_without_its_third_encoder_has_clips_positions_only(tiny: Tiny) -> None:
    model = fakes.tiny_model(tiny, "sd3")
    short = replace(model, components={k: v for k, v in model.components.items() if not k.endswith("_3")})
    assert positions(short, PROMPT, "cat") == [8]


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux1"])
def test_a_changed_word_changes_the_text_at_its_positions_and_nothing_before(tiny: Tiny, family: str) -> None:
    """CLIP reads forwards only, so what differs first is the word's first position; T5 reads both ways, so there it
    is what differs most."""
    model = fakes.tiny_model(tiny, family)
    before, after = "a cat and apple", "a dog and apple"
    texts = [_text(model, prompt) for prompt in (before, after)]
    change = (texts[0] - texts[1]).abs().sum(-1)[0]
    assert len(change) == (T5["flux1"] if family == "flux1" else CLIP + T5.get(family, 0))
    found = positions(model, before, "cat")
    assert found == positions(model, after, "dog")
    if family != "flux1":
        assert change[: found[0]].max() == 0 < change[found[0]]
    if family in T5:
        start = CLIP if family == "sd3" else 0
        assert start + int(change[start:].argmax()) == found[-1]


def _text(model: Any, prompt: str) -> torch.Tensor:  # noqa: ANN401
    with torch.no_grad():
        embedded = model.engine.encode(prompt, "", 1.0).embeddings
    return embedded["prompt_embeds"]


def test_whole_words_come_first_and_parts_of_words_serve_where_there_are_none() -> None:
    assert span("a catalogue of a cat", "cat") == (17, 20)
    assert span("two cats", "cat") == (4, 7)
    assert span("an  Old\n man", "old man") == (4, 12)
    assert span("c++ (a)", "(a)") == (4, 7), "signs of patterns mean themselves"


@pytest.mark.parametrize("phrase", ["dog", "", "  "])
def test_a_phrase_that_is_not_there_is_refused_in_words(tiny: Tiny, phrase: str) -> None:
    with pytest.raises(InputError, match="does not hold"):
        positions(fakes.tiny_model(tiny, "sd15"), "a cat", phrase)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux1"])
def test_a_phrase_that_was_cut_off_is_refused_and_the_last_place_that_is_read_is_not(tiny: Tiny, family: str) -> None:
    model = fakes.tiny_model(tiny, family)
    limit = T5.get(family, CLIP)
    room = limit - (2 if family == "flux1" or family == "sd3" else 3)  # T5 has no start token
    last = positions(model, "a " * room + "cat", "cat")
    assert last[-1] == limit - 2 + (CLIP if family == "sd3" else 0)
    if family == "sd3":
        assert len(last) == 1, "CLIP has stopped reading long before"
    with pytest.raises(InputError, match="cut off"):
        positions(model, "a " * (room + 1) + "cat", "cat")
    with pytest.raises(InputError, match="cut off"):
        positions(model, "a " * room + "cat dog", "cat dog")
