"""CLoRA: loss, masks and limit cases computed a second time, and the official procedure as the oracle of a picture."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import composition_fakes as fakes
import pytest
import torch
from intarsia.composition.composition import Composition
from intarsia.composition.contrast import changed, contrast, fused, loss_of, spread_out, territories
from intarsia.composition.draw import moments, prepared
from intarsia.composition.method import methods
from intarsia.composition.methods.clora import CloraOptions, branches, updates
from intarsia.composition.tokens import with_trigger
from intarsia.pipelines.attach import Attachment
from intarsia.pipelines.errors import InputError
from torch import Tensor

Tiny = Callable[..., Path]
FAMILIES = ["sd15", "sdxl"]
ROOT = Path(__file__).parents[2]
STILL: dict[str, Any] = {"until": 0.0, "cell": "32"}


def brute_force(embeddings: Tensor, labels: list[int], temperature: float) -> float:
    """The formula, pair by pair."""
    found: list[float] = []
    vectors = embeddings.double().tolist()

    def cosine(a: int, b: int) -> float:
        dot = sum(x * y for x, y in zip(vectors[a], vectors[b], strict=True))
        return dot / math.dist(vectors[a], [0.0] * len(vectors[a])) / math.dist(vectors[b], [0.0] * len(vectors[b]))

    for a, label in enumerate(labels):
        for p in range(len(labels)):
            if a == p or labels[p] != label:
                continue
            positive = math.exp(cosine(a, p) / temperature)
            negatives = sum(math.exp(cosine(a, n) / temperature) for n in range(len(labels)) if labels[n] != label)
            found.append(-math.log(positive / (positive + negatives)))
    return sum(found) / len(found)


@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [0, 1, 0, 2, 1, 0, 2], [0, 0, 0, 1]])
@pytest.mark.parametrize("temperature", [0.5, 0.05])
def test_the_loss_is_the_formula_pair_by_pair(labels: list[int], temperature: float) -> None:
    embeddings = torch.rand(len(labels), 9, generator=torch.Generator().manual_seed(3))
    expected = brute_force(embeddings, labels, temperature)
    assert float(contrast(embeddings, labels, temperature)) == pytest.approx(expected, rel=1e-5)


def test_words_that_attend_alike_cost_less_than_concepts_that_do() -> None:
    left, right = torch.tensor([1.0, 0.9, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, 0.8])
    apart = contrast(torch.stack([left, left, right, right]), [0, 0, 1, 1], 0.5)
    mixed = contrast(torch.stack([left, right, left, right]), [0, 0, 1, 1], 0.5)
    assert apart < mixed


def test_entries_are_brought_to_one_range_and_every_branch_gives_its_words() -> None:
    maps = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0))
    places = [[[1], [1, 2], [1]], [[4], [5], [4, 5]]]
    entries = [maps[b, :, w] for concept in places for b, words in enumerate(concept) for w in words]
    scaled = torch.stack([(e - e.min()) / (e.max() - e.min()) for e in entries])
    expected = brute_force(scaled, [0, 0, 0, 0, 1, 1, 1, 1], 0.5)
    assert float(loss_of(maps, places, 0.5)) == pytest.approx(expected, rel=1e-5)


def test_constant_maps_and_a_single_concept_give_numbers_and_gradients() -> None:
    maps = torch.full((2, 4, 5), 0.2, requires_grad=True)
    value = loss_of(maps, [[[1], [1]], [[2], [2]]], 0.5)
    (gradient,) = torch.autograd.grad(value, maps)
    assert torch.isfinite(value) and torch.equal(gradient, torch.zeros_like(maps))
    assert torch.equal(spread_out(torch.full((1, 4), 7.0)), torch.zeros(1, 4))
    half = torch.rand(2, 4, 5, requires_grad=True)
    with torch.no_grad():
        half[:, :, 1] = 0.3
    (gradient,) = torch.autograd.grad(loss_of(half, [[[1], [1]], [[2], [2]]], 0.5), half)
    assert torch.isfinite(gradient).all() and gradient[:, :, 2].abs().max() > 0
    alone = torch.rand(2, 4, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss_of(alone, [[[1], [2]]], 0.5), alone)
    assert torch.equal(gradient, torch.zeros_like(alone))


def test_masks_are_the_union_of_words_and_the_plain_branch_has_what_is_left() -> None:
    first = torch.tensor([[[1.0, 0.2], [0.0, 0.0]], [[0.0, 0.0], [0.5, 0.1]]])  # two words
    second = torch.tensor([[[0.9, 0.0], [0.0, 0.0]]])
    found = territories([first, second], 0.3, "none")
    assert found.tolist() == [
        [[0.0, 1.0], [0.0, 1.0]],
        [[1.0, 0.0], [1.0, 0.0]],
        [[1.0, 0.0], [0.0, 0.0]],
    ]
    assert territories([first, second], 0.3, "dilate").tolist() == [[[0.0] * 2] * 2, [[1.0] * 2] * 2, [[1.0] * 2] * 2]


def test_masks_grow_and_shrink_by_a_cell_and_the_edge_shrinks_none() -> None:
    masks = torch.zeros(1, 7, 7)
    masks[0, :4, 2:5] = 1
    masks[0, 6, 6] = 1

    def around(row: int, column: int) -> list[float]:
        return [
            float(masks[0, r, c])
            for r in range(max(0, row - 1), min(7, row + 2))
            for c in range(max(0, column - 1), min(7, column + 2))
        ]

    grown = torch.tensor([[[max(around(r, c)) for c in range(7)] for r in range(7)]])
    shrunk = torch.tensor([[[min(around(r, c)) for c in range(7)] for r in range(7)]])
    assert torch.equal(changed(masks, "dilate"), grown)
    assert torch.equal(changed(masks, "erode"), shrunk)
    assert torch.equal(changed(masks, "open"), changed(changed(masks, "erode"), "dilate"))
    assert torch.equal(changed(masks, "close"), changed(changed(masks, "dilate"), "erode"))
    assert changed(masks, "open")[0, 6, 6] == 0, "a lone cell goes"
    assert torch.equal(changed(masks, "none"), masks)


def test_overlaps_are_averaged_on_the_repeated_cells() -> None:
    predictions = torch.rand(3, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    masks = torch.tensor([[[0.0, 1.0, 0.0]], [[1.0, 0.0, 1.0]], [[0.0, 0.0, 1.0]]])
    found = fused(predictions, masks)[0]
    for row in range(4):
        for column in range(6):
            here = [branch for branch in range(3) if masks[branch, 0, column // 2]]
            expected = torch.stack([predictions[branch, :, row, column] for branch in here]).mean(0)
            torch.testing.assert_close(found[:, row, column], expected)


def blind(made: Composition) -> Composition:
    """The same with adapters that have no part in the text encoder, so that all branches read the same prompt."""
    concepts = tuple(
        replace(
            one, attachment=replace(one.attachment, adapter=fakes.random_adapter(made.model, number + 1, text=False))
        )
        for number, one in enumerate(made.concepts)
    )
    return replace(made, concepts=concepts)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_updates_and_masks_it_is_composite_with_a_plain_branch_more(tiny: Tiny, family: str) -> None:
    made = blind(fakes.composition(fakes.tiny_model(tiny, family)))
    idle = Attachment("idle", fakes.random_adapter(made.model, 9, text=False), weight=0.0)
    expected = fakes.latents(
        replace(made, concepts=(replace(made.concepts[0], attachment=idle), *made.concepts)), "composite"
    )
    found = fakes.latents(made, "clora", **STILL, masks_from=1.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, fakes.latents(made, "clora", **STILL), atol=1e-2), "masks do nothing"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("branch", [0, 1, 2])
def test_a_branch_that_has_the_whole_canvas_is_that_branch(
    tiny: Tiny, family: str, branch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, family))
    masks = torch.zeros(3, 2, 2)
    masks[branch] = 1

    def always(maps: object, threshold: float, change: str) -> Tensor:
        return masks

    monkeypatch.setattr("intarsia.composition.contrast.territories", always)
    expected = fakes.plain(made, *[made.names[branch - 1]] if branch else [])
    torch.testing.assert_close(fakes.latents(made, "clora", **STILL), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def naive(monkeypatch: pytest.MonkeyPatch) -> Callable[[Composition, CloraOptions], Tensor]:
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    from benchmarks.composition_naive import clora

    return clora


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {"order": "recomputed", "graphs": "one"},
        {"order": "recomputed", "graphs": "all"},
        {"order": "release", "change": "close"},
        {"order": "release", "graphs": "all", "masks_from": 0.5, "iterations": 13},
    ],
)
def test_it_draws_what_the_official_procedure_draws(
    tiny: Tiny, family: str, options: dict[str, Any], naive: Callable[[Composition, CloraOptions], Tensor]
) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, family))
    chosen = CloraOptions.parse({"until": 0.75, "every": 0.5, "iterations": 26, "step_size": 1000, **options})
    found = fakes.latents(made, "clora", **chosen.model_dump())
    torch.testing.assert_close(found, naive(made, chosen), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, fakes.latents(made, "clora", **chosen.model_dump() | {"until": 0}), atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_falls_with_every_update_of_a_step(tiny: Tiny, family: str) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, family))
    found: list[float] = []
    for iterations in (0, 25, 50):  # at 4 steps none, 2 and 4 more
        options = CloraOptions(until=0.1, iterations=iterations, step_size=20)
        with prepared(made, methods()["clora"], options) as drawing:
            moment = next(moments(made, drawing))
            found.append(drawing.facts()["loss"])
            assert drawing.facts()["updates"] == updates(options, 0, moment.stepped.total) >= 1 + iterations // 13
            assert set(drawing.masks()) == set(made.names)
    assert found[0] > found[1] > found[2], found


def test_updates_come_at_parts_of_the_steps() -> None:
    release = CloraOptions(until=0.6)
    at = [updates(release, index, 50) for index in range(50)]
    assert [index for index, count in enumerate(at) if count == 21] == [0, 10, 20]
    assert sum(at) == 90 and at[29] == 1 and at[30] == 0
    shorter = [updates(CloraOptions(), index, 20) for index in range(20)]
    assert [index for index, count in enumerate(shorter) if count == 9] == [0, 4, 8]
    assert sum(shorter) == 34
    assert [updates(CloraOptions(every=0.0), index, 20) for index in range(12)] == [1] * 10 + [0] * 2
    assert updates(CloraOptions(step_size=0), 0, 20) == 0


def test_triggers_stand_before_a_concepts_words_in_its_own_branch_alone(tiny: Tiny) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, "sd15"))
    adapter = replace(made.concepts[0].attachment.adapter, trigger="sks")
    first = replace(made.concepts[0], attachment=replace(made.concepts[0].attachment, adapter=adapter))
    prompts, words = branches(replace(made, concepts=(first, made.concepts[1])))
    assert prompts == [fakes.PROMPT, fakes.PROMPT.replace("apple", "sks apple"), fakes.PROMPT]
    assert words == [["apple", "sks apple", "apple"], ["cat", "cat", "cat"]]


def test_a_trigger_is_written_once_and_takes_the_place_of_words_it_holds() -> None:
    assert with_trigger("a Red cat sits", "a red cat", "sks") == ("a sks Red cat sits", "sks Red cat")
    assert with_trigger("a cat sits", "cat", "a photo of sks  cat") == (
        "a a photo of sks cat sits",
        "a photo of sks cat",
    )
    assert with_trigger("a sks cat", "cat", "SKS") == ("a sks cat", "cat")
    assert with_trigger("a cat", "cat", "") == ("a cat", "cat")
    with pytest.raises(InputError, match="does not hold"):
        with_trigger("a dog", "cat", "sks")


def test_styles_act_in_every_branch_and_ranges_are_kept(tiny: Tiny) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, "sd15"), 2)
    style = Attachment("style", fakes.random_adapter(made.model, 5))
    alone = fakes.latents(made, "clora", iterations=0)
    styled = fakes.latents(replace(made, styles=(style,)), "clora", iterations=0)
    assert not torch.allclose(alone, styled, atol=1e-2)
    late = tuple(replace(one, attachment=replace(one.attachment, steps=(0.5, 1.0))) for one in made.concepts)
    early = fakes.latents(replace(made, concepts=late), "clora", iterations=0)
    idle = tuple(replace(one, attachment=replace(one.attachment, weight=0.0)) for one in made.concepts)
    never = fakes.latents(replace(made, concepts=idle), "clora", iterations=0)
    assert not torch.allclose(early, alone, atol=1e-2) and not torch.allclose(early, never, atol=1e-2)


def test_words_behind_the_end_of_the_prompt_are_refused(tiny: Tiny) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, "sd15"), prompt="a " * 80 + fakes.PROMPT)
    with pytest.raises(InputError, match="cut off"):
        fakes.latents(made, "clora")
