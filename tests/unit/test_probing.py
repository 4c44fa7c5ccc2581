"""The probe: what it looks at, at which step and which words, for UNets and transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import composition_fakes as fakes
import pytest
import torch
from intarsia.composition.attention import layers
from intarsia.composition.composition import Composition
from intarsia.composition.probing import Probe, Sight, level, probed
from intarsia.composition.tokens import IDLE, ends, positions
from intarsia.pipelines.attach import attached
from intarsia.pipelines.errors import InputError
from torch import Tensor, nn

Tiny = Callable[..., Path]
FAMILIES = ("sd15", "sdxl", "sd3", "flux1")


def made(tiny: Tiny, family: str) -> Composition:
    return fakes.composition(fakes.tiny_model(tiny, family), 2)


def look(picture: Composition, words: Sequence[Sequence[int]], probe: Probe) -> Sight:
    with attached(picture.model.components, picture.attachments) as hung:
        (work,) = picture.begin([picture.encode(hung, picture.prompt, ())])
        with torch.no_grad():
            return probed(picture, hung, work, probe, words)


@pytest.mark.parametrize(
    ("family", "pixels", "grid"), [("sdxl", 16, (4, 4)), ("sdxl", 32, (2, 2)), ("sd15", 0, (4, 4))]
)
def test_a_unet_is_asked_for_its_last_step_with_the_prompt(
    tiny: Tiny, family: str, pixels: int, grid: tuple[int, int]
) -> None:
    picture = made(tiny, family)
    tokens = grid[0] * grid[1]
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.shape[1] == tokens:
            kept.append(output[1])  # the sample that has the prompt

    attn1 = [layer for path, layer in layers(picture.model.denoiser).items() if path.endswith("attn1")]
    handles = [layer.register_forward_hook(keep) for layer in attn1]
    try:
        sight = look(picture, [[word] for word in range(77)], Probe(2, pixels, None, 1000))
    finally:
        for handle in handles:
            handle.remove()
    assert sight.grid == grid and sight.scores.shape == (77, tokens)
    torch.testing.assert_close(sight.scores.sum(0), torch.ones(tokens))  # shares of the words
    last = kept[len(kept) // 2 :]
    assert len(last) == len(sight.features) > 0
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(sight.features, last, strict=True))


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_what_must_not_be_seen_is_not_asked_for(tiny: Tiny, family: str) -> None:
    """At its first step the negative prompt has had no part in the latents yet."""
    picture, probe = made(tiny, family), Probe(1, 16, None, 10.0)
    first = look(picture, [[2], [3]], probe)
    other = look(replace(picture, negative="dog, photo"), [[2], [3]], probe)
    assert torch.equal(first.scores, other.scores) and torch.equal(first.features[0], other.features[0])
    said = look(replace(picture, prompt="sks dog in red"), [[2], [3]], probe)
    assert not torch.allclose(first.scores, said.scores, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("family", "block"), [("flux1", None), ("sd3", 0), ("sd3", None)])
def test_a_transformer_is_asked_at_one_block(tiny: Tiny, family: str, block: int | None) -> None:
    picture = made(tiny, family)
    sight = look(picture, [[1], [2, 3]], Probe(1, 0, block, 10.0))
    assert sight.grid == picture.grid and sight.features[0].shape[0] == sight.scores.shape[1]
    torch.testing.assert_close(sight.scores.sum(1), torch.ones(2))
    assert sight.scores.std() > 0
    if family == "sd3":
        other = look(picture, [[1], [2, 3]], Probe(1, 0, 1, 10.0))
        assert torch.equal(other.scores, sight.scores) == (block is None)  # of two, the middle one is the second
    with pytest.raises(InputError, match="no joint layer 7"):
        look(picture, [[1]], Probe(1, 0, 7, 10.0))


def test_maps_are_coarse_unless_they_get_too_coarse() -> None:
    assert level((128, 128), 0) == level((128, 128), 32) == (32, 32)
    assert level((64, 64), 0) == (16, 16)
    assert level((32, 32), 0) == (16, 16) and level((32, 32), 32) == (8, 8)
    assert level((33, 70), 16) == (17, 35) and level((33, 70), 0) == (9, 18)


@pytest.mark.parametrize("family", FAMILIES)
def test_idle_words_of_a_phrase_and_its_commas_do_not_count(tiny: Tiny, family: str) -> None:
    model = fakes.tiny_model(tiny, family)
    prompt = "photo of a red apple, with the dog in a style"
    wanted = [place for word in ("red", "apple", "dog") for place in positions(model, prompt, word)]
    assert positions(model, prompt, "a red apple, with the dog", idle=IDLE) == sorted(wanted)
    assert positions(model, prompt, "with the", idle=IDLE) == positions(model, prompt, "with the")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", ["a cat", "a cat " * 400])
def test_the_end_of_a_prompt_is_its_end_token_in_every_sequence(tiny: Tiny, family: str, prompt: str) -> None:
    model = fakes.tiny_model(tiny, family)
    names = {"flux1": ["tokenizer_2"], "sd3": ["tokenizer", "tokenizer_3"]}.get(family, ["tokenizer"])
    limits = {"tokenizer": 77, "tokenizer_2": 512, "tokenizer_3": 256}
    start, wanted = 0, list[int]()
    for name in names:
        tokenizer: Any = model.components[name]
        read = tokenizer(prompt, truncation=True, max_length=limits[name])["input_ids"]
        assert read.index(tokenizer.eos_token_id) == len(read) - 1
        wanted.append(start + len(read) - 1)
        start += limits[name]
    assert ends(model, prompt) == wanted


def test_a_tokenizer_that_reads_less_cuts_the_prompt_there(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fakes.tiny_model(tiny, "sdxl")
    assert positions(model, "a cat of a dog", "dog") == [5]
    monkeypatch.setattr(model.components["tokenizer"], "model_max_length", 6)
    assert positions(model, "a cat of a dog", "cat") == [2] and ends(model, "a cat of a dog") == [5]
    with pytest.raises(InputError, match='cut off before the end of "dog"'):
        positions(model, "a cat of a dog", "dog")
