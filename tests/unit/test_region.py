"""Region: limit cases that equal Merge and the plain picture, brute force, and places that do not touch each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import composition_fakes as fakes
import pytest
import torch
from intarsia.composition.attention import keys_values, layers, outcome, queries
from intarsia.composition.composition import Composition, Concept, network_of
from intarsia.composition.method import methods
from intarsia.composition.regions import NEVER, Regions, Shares, keeping_apart, readings
from intarsia.pipelines.attach import Attachment, attached
from intarsia.pipelines.errors import InputError
from torch import Tensor

Tiny = Callable[..., Path]
WHOLE = (0.0, 0.0, 1.0, 1.0)
UNETS = ("sd15", "sdxl")
ALL = (*UNETS, "sd3", "flux1")


def one(model: fakes.Model, box: tuple[float, float, float, float], seed: int = 1, weight: float = 1.0) -> Concept:
    """A concept whose adapter leaves the text encoders alone, so that only the picture tells."""
    return Concept(Attachment("apple", fakes.random_adapter(model, seed, text=False), weight), "", "", box)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("apart", [0.0, 1.0])
def test_one_place_that_fills_the_canvas_is_merge(tiny: Tiny, family: str, apart: float) -> None:
    model = fakes.tiny_model(tiny, family)
    made = fakes.composition(model, concepts=(one(model, WHOLE),))
    merged = fakes.latents(made, "merge")
    assert (fakes.latents(made, "region", edge=0, apart=apart) - merged).abs().max() < 2e-4 * merged.abs().max()
    assert (merged - fakes.plain(made)).abs().max() > 0.05


@pytest.mark.parametrize("family", ALL)
def test_places_without_adapters_and_words_are_the_plain_picture(tiny: Tiny, family: str) -> None:
    model = fakes.tiny_model(tiny, family)
    concepts = tuple(
        replace(one(model, box, seed, weight=0.0), attachment=Attachment(name, fakes.random_adapter(model, seed), 0.0))
        for name, seed, box in (("a", 1, (0.0, 0.0, 0.5, 1.0)), ("b", 2, (0.5, 0.0, 1.0, 1.0)))
    )
    made = fakes.composition(model, concepts=concepts)
    free = fakes.latents(made, "region", apart=0)
    assert (free - fakes.plain(made)).abs().max() < 2e-4 * free.abs().max()
    assert (fakes.latents(made, "region", apart=1) - free).abs().max() > 1e-3


@pytest.mark.parametrize("family", ALL)
def test_each_of_its_options_changes_the_picture(tiny: Tiny, family: str) -> None:
    model = fakes.tiny_model(tiny, family)
    made = fakes.composition(model, 2)
    usual = fakes.latents(made, "region")
    for options in ({"edge": 2}, {"apart": 0.5}, {"until": 0.5, "apart": 1}, {"towards": 2}):
        assert not torch.equal(fakes.latents(made, "region", **options), usual), options
    if family in UNETS:
        for reads in ("own", "both"):
            assert not torch.equal(fakes.latents(made, "region", reads=reads), usual), reads
    else:
        with pytest.raises(InputError, match="whole prompt"):
            fakes.latents(made, "region", reads="own")


def prepared(made: Composition, edge: float = 0.0) -> tuple[Shares, Tensor, Tensor]:
    """Shares, texts and how places lean to words, as the method makes them."""
    with attached(made.model.components, made.attachments) as hung:
        works = [made.begin([made.encode(hung, made.prompt, names)])
                 for names in ((), *((name,) for name in made.names))]  # fmt: skip
    texts, leaning = readings(made, [[network_of(work).text for work in part] for part in works], True, 1.5)
    return Shares.of(made, edge), texts, leaning


@pytest.mark.parametrize("family", UNETS)
def test_every_token_reads_the_prompt_of_its_place_by_brute_force(tiny: Tiny, family: str) -> None:
    model = fakes.tiny_model(tiny, family)
    made = fakes.composition(model, 3)
    shares, texts, leaning = prepared(made, edge=1.0)
    path, attn = next((p, m) for p, m in layers(model.denoiser).items() if p.endswith("attn2"))
    tokens = 16
    x = torch.randn(2, tokens, attn.to_q.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), attached(model.components, made.attachments) as hung:
        regions = Regions(hung, shares, texts, leaning, 1.0, 1.0)
        hung.spread(regions.gains)
        got = regions.read(attn, path, queries(attn, x))
    masks = shares.tokens(tokens)
    expected = torch.zeros_like(got)
    with torch.no_grad():
        for place in range(4):
            share = 1 - masks.sum(0) if place == 0 else masks[place - 1]
            own = made.attachments if place == 0 else (made.attachments[place - 1],)
            with attached(model.components, own) as hung:
                hung.activate(() if place == 0 else hung.names)
                k, v = keys_values(attn, texts[:, place])
            with attached(model.components, made.attachments) as hung:
                hung.spread(regions.gains)
                q = queries(attn, x)
            for half in range(2):
                for token in range(tokens):
                    scores = (q[half, :, token, None] * k[half]).sum(-1) / q.shape[-1] ** 0.5  # (heads, words)
                    lean = leaning[place, half]
                    scores = (scores + lean).masked_fill(lean == NEVER, -torch.inf)
                    expected[half, :, token] += share[token] * (scores.softmax(-1)[..., None] * v[half]).sum(1)
    assert torch.allclose(got, expected, atol=1e-5)


def test_the_words_of_others_are_hidden_and_ones_own_are_not(tiny: Tiny) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, "sdxl"), 2)
    _, _, leaning = prepared(made)
    assert not leaning[:, 0].any(), "nothing leans without the prompt"
    leaning = leaning[:, 1]
    hidden = leaning == NEVER
    assert (leaning[1] == 1.5).sum() == (hidden[2] & ~hidden[1]).sum() > 0, "own words, which the other does not read"
    apple, cat = (set(torch.nonzero(hidden[place])[:, 0].tolist()) for place in (2, 1))
    assert apple and cat and not apple & cat
    assert set(torch.nonzero(hidden[0])[:, 0].tolist()) == apple | cat, "the background reads of no concept"


def test_a_token_is_not_moved_by_what_lies_in_another_place(tiny: Tiny) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, "sdxl"), 2)
    shares = Shares.of(made, 0)
    attn = next(m for p, m in layers(made.model.denoiser).items() if p.endswith("attn1"))
    x = torch.randn(1, 16, attn.to_q.in_features, generator=torch.Generator().manual_seed(1))
    masks = shares.tokens(16)
    bias = keeping_apart(masks, 1.0)

    def look(x: Tensor) -> Tensor:
        q, (k, v) = queries(attn, x), keys_values(attn, x)
        return outcome(attn, torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias))

    moved = x.clone()
    moved[:, masks[1] == 1] += 1
    with torch.no_grad():
        before, after = look(x), look(moved)
    assert torch.equal(before[:, masks[0] == 1], after[:, masks[0] == 1])
    assert not torch.allclose(before[:, masks[1] == 1], after[:, masks[1] == 1])


def test_keeping_apart_is_the_logarithm_of_what_is_left() -> None:
    masks = torch.tensor([[1.0, 0.5, 0.0, 0.0], [0.0, 0.5, 1.0, 0.0]])
    bias = keeping_apart(masks, 0.8)
    for query in range(4):
        for key in range(4):
            other = sum(masks[i, query] * masks[j, key] for i in range(2) for j in range(2) if i != j)
            assert bias[query, key] == pytest.approx(float(torch.log(1 - 0.8 * torch.as_tensor(other))), abs=1e-6)
    assert keeping_apart(masks, 1.0)[0, 2] == NEVER


@pytest.mark.parametrize("family", UNETS)
def test_an_adapter_touches_the_tokens_of_its_place_alone(tiny: Tiny, family: str) -> None:
    model = fakes.tiny_model(tiny, family)
    made = fakes.composition(model, 2)
    shares, texts, leaning = prepared(made)
    name = next(p for p in layers(model.denoiser) if p.endswith("attn1"))
    layer = model.denoiser.get_submodule(f"{name}.to_q")
    x = torch.randn(2, 16, layer.in_features, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain = layer(x)
        alone: list[Tensor] = []
        for attachment in made.attachments:
            with attached(model.components, [attachment]):
                alone.append(layer(x))
        with attached(model.components, made.attachments) as hung:
            hung.spread(Regions(hung, shares, texts, leaning, 1.0, 1.0).gains)
            got = layer(x)
    left, right = shares.tokens(16)
    assert torch.allclose(got[:, left == 1], alone[0][:, left == 1], atol=1e-5)
    assert torch.allclose(got[:, right == 1], alone[1][:, right == 1], atol=1e-5)
    assert (got - plain).abs().max() > 0.05


def test_the_higher_place_wins_where_two_overlap(tiny: Tiny) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, "sdxl"), 3)
    masks = Shares.of(made, 0).masks
    assert masks.sum(0).max() <= 1 and masks[2].sum() == 16
    lower = replace(made.concepts[2], order=-1)
    masks = Shares.of(replace(made, concepts=(*made.concepts[:2], lower)), 0).masks
    assert masks[2].sum() == 0


def test_the_masks_it_shows_are_the_places(tiny: Tiny) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, "sdxl"), 2)
    method = methods()["region"]
    with method.attach(made, method.options.parse({"edge": 0})) as drawing:
        shown = drawing.masks()
    assert list(shown) == ["apple", "cat"] and shown["apple"][:, :4].eq(1).all() and shown["apple"][:, 4:].eq(0).all()
