"""LoRA-Composer: losses cell by cell, attention against the plain layer, and the official procedure as the oracle."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import composition_fakes as fakes
import pytest
import torch
from intarsia.composition import composer_losses as losses
from intarsia.composition.attention import layers
from intarsia.composition.composer_attention import Estate, Parts
from intarsia.composition.composition import Composition, network_of
from intarsia.composition.draw import moments, prepared
from intarsia.composition.gradients import Glance
from intarsia.composition.layout import ComposeRequest, ConceptUse, MethodUse
from intarsia.composition.method import check_request, methods
from intarsia.composition.methods.lora_composer import ComposerOptions, begun
from intarsia.pipelines.attach import Attachment, attached
from intarsia.pipelines.denoise import denoise
from intarsia.pipelines.errors import InputError
from intarsia.pipelines.site import Gain
from torch import Tensor

Tiny = Callable[..., Path]
FAMILIES = ["sd15", "sdxl"]
ROOT = Path(__file__).parents[2]
OFF: dict[str, Any] = {"restart": False, "step_size": 0.0}  # attention alone
WHOLE = (0.0, 0.0, 1.0, 1.0)
RNG = torch.Generator().manual_seed(5)
MAP = torch.rand(8, 10, generator=RNG)
PLACE = torch.zeros(8, 10, dtype=torch.bool)
PLACE[1:6, 3:8] = True  # 25 cells, 5 of which are the strongest


def hill(row: int, column: int) -> float:
    y, x = -1 + 2 * (row - 1) / 4, -1 + 2 * (column - 3) / 4
    return math.exp(-(x * x + y * y) / 2)


def test_enhancement_is_one_minus_the_mean_of_the_strongest_cells_under_the_hill() -> None:
    cells = [float(MAP[r, c]) * hill(r, c) for r in range(1, 6) for c in range(3, 8)]
    expected = 1 - sum(sorted(cells)[-5:]) / 5
    assert float(losses.enhancement(MAP, PLACE)) == pytest.approx(expected, rel=1e-5)
    assert float(losses.enhancement(MAP * 100, PLACE)) == 0


def test_the_hill_has_its_peak_in_places_of_even_and_single_sides_too() -> None:
    for rows, columns in ((4, 6), (1, 3), (1, 1)):
        place = torch.zeros(8, 10, dtype=torch.bool)
        place[2 : 2 + rows, 1 : 1 + columns] = True
        found = losses.hill(place)
        assert float(found.max()) == 1 and (found > 0).equal(place)


def test_fill_compares_the_maxima_of_rows_and_of_columns() -> None:
    inside = [[float(MAP[r, c]) * float(PLACE[r, c]) for c in range(10)] for r in range(8)]
    rows = [abs(max(inside[r]) - float(PLACE[r].any())) for r in range(8)]
    columns = [abs(max(inside[r][c] for r in range(8)) - float(PLACE[:, c].any())) for c in range(10)]
    assert float(losses.fill(MAP, PLACE)) == pytest.approx(sum(rows) / 8 + sum(columns) / 10, rel=1e-5)
    assert float(losses.fill(PLACE.float(), PLACE)) == 0


def test_leak_is_what_the_place_looks_at_outside() -> None:
    own = torch.rand(80, 80, generator=RNG)
    inside = [r * 10 + c for r in range(8) for c in range(10) if PLACE[r, c]]
    outside = [cell for cell in range(80) if cell not in inside]
    expected = sum(sorted(float(own[q, k]) for q in inside for k in outside)[-5:]) / 5
    assert float(losses.leak(own, PLACE)) == pytest.approx(expected, rel=1e-5)
    assert float(losses.leak(own, torch.ones(8, 10, dtype=torch.bool))) == 0


def test_smoothing_is_the_sum_over_nine_cells_mirrored_at_the_edge() -> None:
    found = losses.smooth(MAP[None])[0]
    weight = {d: math.exp(-(d * d) / 0.5) for d in (-1, 0, 1)}
    norm = sum(weight.values()) ** 2

    def mirrored(at: int, count: int) -> int:
        return -at if at < 0 else 2 * (count - 1) - at if at >= count else at

    for r in range(8):
        for c in range(10):
            expected = sum(
                weight[dr] * weight[dc] / norm * float(MAP[mirrored(r + dr, 8), mirrored(c + dc, 10)])
                for dr in weight
                for dc in weight
            )
            assert float(found[r, c]) == pytest.approx(expected, rel=1e-5)
    thin = torch.rand(1, 1, 5)
    assert losses.smooth(thin).equal(thin)


def test_the_loss_is_the_weighted_sum_over_words_and_concepts() -> None:
    own = torch.rand(80, 80, generator=RNG)
    words = torch.rand(3, 8, 10, generator=RNG)
    other = ~PLACE
    found = losses.total([words[:2], words[2:]], own, [PLACE, other], (8.0, 2.0, 10.0))
    expected = 10 * (losses.leak(own, PLACE) + losses.leak(own, other))
    for word, place in zip(losses.smooth(words), (PLACE, PLACE, other), strict=True):
        expected = expected + 8 * losses.enhancement(word, place) + 2 * losses.fill(word, place)
    torch.testing.assert_close(found, expected)


def test_a_new_start_keeps_mean_and_deviation_and_copies_the_best_patch() -> None:
    latents = torch.randn(1, 4, 16, 24, generator=RNG) * 14.6 + 0.3
    score = torch.zeros(4, 6)
    score[0, 4] = score[1, 5] = 1.0  # the best 2 x 2 window begins at row 0, column 4
    place = torch.zeros(16, 24, dtype=torch.bool)
    place[8:16, 0:8] = True
    found = losses.restart(latents, [score], [place])
    assert float(found.mean()) == pytest.approx(float(latents.mean()), abs=1e-4)
    assert float(found.std()) == pytest.approx(float(latents.std()), rel=1e-5)
    moved = latents.clone()
    moved[:, :, 8:16, 0:8] = latents[:, :, 0:8, 16:24]
    torch.testing.assert_close(
        (found - found.mean()) / found.std(), (moved - moved.mean()) / moved.std(), rtol=1e-4, atol=1e-4
    )


def test_the_best_patch_is_the_one_with_the_greatest_sum() -> None:
    score = torch.rand(8, 8, generator=RNG)
    sums = {(r, c): float(score[r : r + 3, c : c + 4].sum()) for r in range(6) for c in range(5)}
    row, column = max(sums, key=lambda at: sums[at])
    assert losses.best(score, (12, 16), (32, 32)) == (row * 4, column * 4)
    assert losses.best(score, (32, 32), (32, 32)) == (0, 0)
    corner = torch.zeros(8, 8)
    corner[7, 7] = 1
    assert losses.best(corner, (5, 5), (30, 31)) == (25, 26), "a patch stays inside"


# Attention


@contextmanager
def places_of(made: Composition, **parts: bool) -> Generator[Estate]:
    with attached(made.model.components, made.attachments) as hung:
        _, plots = begun(made, hung)
        yield Estate(hung, plots, made.style_names, made.grid, Glance(0, on=False), Parts(**parts))


def without_places(made: Composition) -> Composition:
    return replace(made, concepts=tuple(replace(one, box=None) for one in made.concepts))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_places_it_is_the_plain_picture(tiny: Tiny, family: str) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, family))
    torch.testing.assert_close(
        fakes.latents(without_places(made), "lora_composer"), fakes.plain(made), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_one_place_over_the_canvas_is_that_concepts_keys_values_and_outcome(tiny: Tiny, family: str) -> None:
    """The second derivation: the ordinary loop, whose text is the concept's and whose adapter acts on those layers."""
    made = fakes.composition(fakes.tiny_model(tiny, family), 1)
    concept = replace(made.concepts[0], box=WHOLE)
    made = replace(made, concepts=(concept,))
    result = torch.empty(0)
    with attached(made.model.components, made.attachments) as hung:
        base, own = made.begin([made.encode(hung, made.prompt, ()), made.encode(hung, concept.prompt, [concept.name])])
        network = network_of(base)
        network._fixed["encoder_hidden_states"] = network_of(own).text  # type: ignore[reportPrivateUsage]

        def gains(path: str, output: Tensor) -> Mapping[str, Gain]:
            return {concept.name: 1.0} if path.endswith(("attn2.to_k", "attn2.to_v", "attn2.to_out.0")) else {}

        hung.spread(gains)
        for stepped in denoise(base, made.token):
            result = stepped.latents
    torch.testing.assert_close(fakes.latents(made, "lora_composer", **OFF), result, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(result, fakes.plain(made), atol=1e-2)


def test_all_layers_in_one_place_over_the_canvas_is_all_but_projections_and_convolutions(tiny: Tiny) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, "sd15"), 1)
    adapter = made.concepts[0].attachment.adapter
    kept = {
        path: layer
        for path, layer in adapter.layers.items()
        if any(part in path for part in (".attn1.", ".ff.", "attn2.to_k", "attn2.to_v", "attn2.to_out"))
    }
    concept = replace(
        made.concepts[0],
        box=WHOLE,
        prompt=made.prompt,
        attachment=replace(made.concepts[0].attachment, adapter=replace(adapter, layers=kept)),
    )
    made = replace(made, concepts=(concept,))
    found = fakes.latents(made, "lora_composer", **OFF, deltas=True)
    torch.testing.assert_close(found, fakes.plain(made, concept.name), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, fakes.latents(made, "lora_composer", **OFF), atol=1e-2)


def _layer(made: Composition, cross: bool) -> tuple[str, Any]:
    return next((path, module) for path, module in layers(made.model.denoiser).items() if ("attn2" in path) is cross)


@pytest.mark.parametrize("family", FAMILIES)
def test_background_rows_are_those_of_the_plain_layers(tiny: Tiny, family: str) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, family))
    boxes = ((0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0))
    made = replace(made, concepts=tuple(replace(o, box=b) for o, b in zip(made.concepts, boxes, strict=True)))
    for cross in (False, True):
        path, module = _layer(made, cross)
        with torch.no_grad(), places_of(made) as estate:
            hidden = torch.randn(2, 16, module.to_q.in_features, generator=RNG)
            text = torch.randn(2, 77, module.to_k.in_features, generator=RNG) if cross else None
            found = estate.processors(made.model.denoiser)[path](module, hidden, text)
            plain = module.processor(module, hidden, text)
            cells = estate.cells(16)
        outside = ~cells.any(0)
        assert outside.sum() == 8
        torch.testing.assert_close(found[:, outside], plain[:, outside])
        for inside in cells:
            assert (found[:, inside] - plain[:, inside]).abs().amax((0, 2)).min() > 1e-3


def test_a_place_looks_at_itself_and_the_background_alone(tiny: Tiny) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, "sd15"))
    boxes = ((0.0, 0.0, 0.75, 0.5), (0.5, 0.0, 1.0, 0.5))  # one column of four is shared
    made = replace(made, concepts=tuple(replace(o, box=b) for o, b in zip(made.concepts, boxes, strict=True)))
    path, module = _layer(made, False)
    homes = [
        {n for n, (left, _, right, low) in enumerate(boxes) if left <= (cell % 4 + 0.5) / 4 < right and cell < 16 * low}
        for cell in range(16)
    ]
    with torch.no_grad(), places_of(made) as estate:
        bias = estate.bias(torch.zeros(1, 1, 16, 4))
        assert bias is not None
        for q in range(16):
            for k in range(16):
                apart = bool(homes[q]) and bool(homes[k]) and not homes[q] & homes[k]
                assert math.isinf(float(bias[q, k])) == apart
        hidden = torch.randn(1, 16, module.to_q.in_features, generator=RNG)
        changed = hidden.clone()
        changed[0, 3] += 3  # a cell of the second place alone
        looking = estate.processors(made.model.denoiser)[path]
        same = (looking(module, hidden) - looking(module, changed))[0].abs().amax(1) < 1e-6
    assert [cell for cell in range(16) if same[cell]] == [0, 1, 4, 5], "the first place without its shared cells"
    with places_of(made, isolation=False) as estate:
        assert estate.bias(torch.zeros(1, 1, 16, 4)) is None


def test_shared_cells_are_averaged(tiny: Tiny) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, "sd15"))
    path, module = _layer(made, True)
    hidden = torch.randn(2, 16, module.to_q.in_features, generator=RNG)
    text = torch.randn(2, 77, module.to_k.in_features, generator=RNG)

    def through(*chosen: int) -> Tensor:
        some = replace(made, concepts=tuple(replace(made.concepts[at], box=WHOLE) for at in chosen))
        with torch.no_grad(), places_of(some) as estate:
            return estate.processors(made.model.denoiser)[path](module, hidden, text)

    torch.testing.assert_close(through(0, 1), (through(0) + through(1)) / 2)


def test_a_place_thinner_than_a_cell_and_a_painted_one_have_cells_everywhere(tiny: Tiny) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, "sd15"))
    mask = torch.zeros(64, 64)
    mask[40:44, 40:44] = 1
    painted = replace(made.concepts[0], box=None, mask=mask)
    thin = replace(made.concepts[1], box=(0.0, 0.1, 0.01, 0.11))
    with places_of(replace(made, concepts=(painted, thin))) as estate:
        for tokens in (64, 16, 4):
            assert estate.cells(tokens).sum(1).tolist() == [1, 1]
        assert set(estate.masks()) == set(made.names)


# The whole method


@pytest.fixture
def naive(monkeypatch: pytest.MonkeyPatch) -> Callable[[Composition, ComposerOptions], Tensor]:
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    from benchmarks.composition_naive import lora_composer

    return lora_composer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"deltas": True, "patience": 1.0, "cell": "16"}, {"fill": 0, "keep": 0}])
def test_it_draws_what_the_official_procedure_draws(
    tiny: Tiny, family: str, options: dict[str, Any], naive: Callable[[Composition, ComposerOptions], Tensor]
) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, family))
    made = replace(made, styles=(Attachment("style", fakes.random_adapter(made.model, 5)),))
    chosen = ComposerOptions.parse({"step_size": 100, "until": 0.8, **options})
    found = fakes.latents(made, "lora_composer", **chosen.model_dump())
    torch.testing.assert_close(found, naive(made, chosen), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["regions", "isolation", "restart", "step_size", "enhance", "fill", "keep"])
def test_every_part_can_be_left_out_and_matters(tiny: Tiny, family: str, part: str) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, family))
    boxes = ((0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0))  # a background beside them
    made = replace(made, concepts=tuple(replace(o, box=b) for o, b in zip(made.concepts, boxes, strict=True)))
    options: dict[str, Any] = {"step_size": 100.0, "patience": 1.0}
    without = options | {part: 0 if part in ("step_size", "enhance", "fill", "keep") else False}
    found, left = (fakes.latents(made, "lora_composer", **chosen) for chosen in (options, without))
    assert torch.isfinite(left).all()
    assert (found - left).abs().max() > 1e-4


def _facts(made: Composition, **options: Any) -> list[dict[str, float]]:  # noqa: ANN401
    method = methods()["lora_composer"]
    with prepared(made, method, ComposerOptions.parse(options)) as drawing:
        return [dict(drawing.facts()) for _ in moments(made, drawing)]


def test_updates_lower_the_loss_and_end_when_it_rises_or_at_their_part(tiny: Tiny) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, "sdxl"), steps=10)
    still = [f["loss"] for f in _facts(made, step_size=1e-9, patience=1.0, until=1.0)]
    moved = [f["loss"] for f in _facts(made, step_size=50, patience=1.0, until=1.0)]
    assert all(after < before for before, after in zip(still[1:5], moved[1:5], strict=True))
    assert _facts(made, patience=1.0, until=0.5)[-1]["updates"] == 5
    rising = [index for index in range(1, 10) if still[index] > still[index - 1]]
    assert rising, "the oracle needs a loss that rises at some step"
    for patience in (0.0, rising[-1] / 10):
        first = next(index for index in rising if index / 10 >= patience)
        facts = _facts(made, step_size=1e-9, patience=patience, until=1.0)
        assert facts[-1]["updates"] == first, "the step whose loss rose makes no update"


def test_checkpointing_changes_nothing(tiny: Tiny) -> None:
    model = fakes.tiny_model(tiny, "sdxl")
    made = fakes.composition(model)
    expected = fakes.latents(made, "lora_composer", step_size=100)
    model.denoiser.enable_gradient_checkpointing()
    try:
        found = fakes.latents(made, "lora_composer", step_size=100)
    finally:
        model.denoiser.disable_gradient_checkpointing()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_adapters_keep_their_part_of_the_steps(tiny: Tiny) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, "sdxl"), 1)
    adapter = fakes.random_adapter(made.model, 1, text=False)
    read = {path: layer for path, layer in adapter.layers.items() if path.endswith(("attn2.to_k", "attn2.to_v"))}
    blind = replace(made.concepts[0].attachment, adapter=replace(adapter, layers=read))  # keys and values are kept

    def drawn(**changes: Any) -> Tensor:  # noqa: ANN401
        concept = replace(made.concepts[0], attachment=replace(blind, **changes))
        return fakes.latents(replace(made, concepts=(concept,)), "lora_composer", **OFF)

    always, never, late = drawn(), drawn(weight=0.0), drawn(steps=(0.5, 1.0))
    assert not torch.allclose(always, never, atol=1e-2)
    assert not torch.allclose(late, always, atol=1e-3) and not torch.allclose(late, never, atol=1e-3)


def test_a_concept_without_a_prompt_is_refused_in_words() -> None:
    uses = (ConceptUse(adapter="a", prompt="a cat", box=WHOLE), ConceptUse(adapter="b", words="dog", box=WHOLE))
    request = ComposeRequest(prompt="a cat, dog", concepts=uses, methods=(MethodUse(method="lora_composer"),))
    with pytest.raises(InputError, match="needs a prompt for b"):
        check_request(request, "sd15")
