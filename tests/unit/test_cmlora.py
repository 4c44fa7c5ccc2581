"""CMLoRA: its schedule against formulas written out, its limits against other methods, its whole loop by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import composition_fakes as fakes
import numpy as np
import pytest
import torch
from intarsia.composition import frequency, spectra
from intarsia.composition.composition import Composition
from intarsia.composition.draw import moments, prepared, render
from intarsia.composition.layout import ComposeRequest, ConceptUse, MethodUse
from intarsia.composition.method import check_request, methods
from intarsia.composition.methods.cmlora import CmloraOptions, Cycle, emphasis, parts, refreshes
from intarsia.composition.middle import Middle
from intarsia.pipelines.attach import Attachment, attached
from intarsia.pipelines.errors import InputError
from torch import Tensor, nn

Tiny = Callable[..., Path]
NAMES = ("apple", "cat", "dog")
UNETS = ("sd15", "sdxl")
ALL = (*UNETS, "sd3", "flux1")


def made(tiny: Tiny, family: str, count: int = 3, **changes: Any) -> Composition:  # noqa: ANN401
    if family in UNETS:
        changes = {"scheduler": "euler"} | changes  # PNDM, the tiny model's own, takes a step more than it was asked
    return fakes.composition(fakes.tiny_model(tiny, family), count, **changes)


def cycle(count: int, total: int, **options: Any) -> Cycle:  # noqa: ANN401
    return Cycle(range(count), CmloraOptions.parse(options), total)


def dominants(count: int, total: int, early: int, **options: Any) -> list[int]:  # noqa: ANN401
    going = cycle(count, total, **options)
    return [going.turn(index, index < early).dominant for index in range(total)]


# The schedule


def test_the_published_schedule_has_92_refreshes_in_220_steps() -> None:
    found = refreshes(220, 0)
    assert len(found) == 92
    for first, last, every in ((0, 82, 2), (82, 192, 3), (192, 220, 2)):
        inside = sorted(step for step in found if first <= step < last)
        assert inside[0] == first
        assert {later - step for step, later in pairwise(inside)} == {every}


@pytest.mark.parametrize("interval", [1, 2, 5])
def test_an_interval_of_its_own_refreshes_every_so_many_steps(interval: int) -> None:
    assert refreshes(20, interval) == {step for step in range(20) if step % interval == 0}


@pytest.mark.parametrize(("count", "dominant", "other"), [(2, 0.60, 0.40), (3, 0.56, 0.22), (4, 0.54, 0.15),
                                                          (5, 0.53, 0.12)])  # fmt: skip
def test_the_first_weights_are_those_of_the_paper(count: int, dominant: float, other: float) -> None:
    found = parts(count, 1, emphasis(count, 0, CmloraOptions()))
    assert found[1] == pytest.approx(dominant, abs=0.006)
    assert all(share == pytest.approx(other, abs=0.006) for index, share in enumerate(found) if index != 1)
    c = count - 0.5
    w = count / (c + count - 1)
    assert found == pytest.approx([(c if index == 1 else 1) * w / count for index in range(count)])


@pytest.mark.parametrize("turns", [0, 1, 2, 5, 30])
@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_the_emphasis_falls_by_halving_steps_and_never_below_one(count: int, turns: int) -> None:
    expected = max(1.0, count - 0.5 - sum(0.5**k for k in range(turns)))
    assert emphasis(count, turns, CmloraOptions()) == pytest.approx(expected)
    assert emphasis(count, turns, CmloraOptions(decay=False)) == count - 0.5
    assert emphasis(count, turns, CmloraOptions(compat="release")) == count - 0.5
    assert sum(parts(count, 0, expected)) == pytest.approx(1)


def test_dominance_goes_round_the_high_ones_and_then_slides_to_the_low_one() -> None:
    assert dominants(3, 8, 4, interval=2) == [0, 0, 1, 1, 1, 1, 2, 2]
    assert dominants(4, 8, 4, interval=1) == [0, 1, 2, 0, 2, 3, 1, 2]
    assert dominants(2, 6, 3, interval=2) == [0, 0, 0, 1, 1, 1]
    assert dominants(3, 6, 3, interval=1, low=0) == [0, 1, 2, 0, 1, 2]
    assert dominants(4, 6, 3, interval=1, low=2) == [0, 1, 0, 3, 2, 3]


def test_the_order_says_whose_turn_is_whose() -> None:
    going = Cycle([2, 0, 1], CmloraOptions(interval=1), 4)
    assert [going.turn(index, index < 2).dominant for index in range(4)] == [2, 0, 0, 1]


def test_the_paper_renews_the_dominant_one_at_every_step() -> None:
    going = cycle(3, 20)
    for index in range(20):
        turn = going.turn(index, index < 11)
        assert turn.partial
        assert turn.stale == {turn.dominant}


def test_renewing_all_drops_everything_where_a_turn_begins() -> None:
    going, wanted = cycle(3, 20, renew="all"), refreshes(20, 0)
    for index in range(20):
        assert len(going.turn(index, index < 11).stale) == (3 if index in wanted else 1)


def test_the_release_keeps_nothing_at_the_intervals_0_and_1_and_renews_nothing_late() -> None:
    assert not cycle(3, 20, compat="release", interval=0).turn(0, True).partial
    assert not cycle(3, 20, compat="release", interval=1).turn(0, True).partial
    going = cycle(3, 20, compat="release", interval=2)
    turns = [going.turn(index, index < 11) for index in range(20)]
    assert all(turn.partial for turn in turns)
    assert [bool(turn.stale) for turn in turns] == [index % 2 == 0 and index < 11 for index in range(20)]
    assert len({tuple(sorted(turn.shares)) for turn in turns}) == 1


# The limits


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("compat", ["paper", "release"])
def test_interval_1_and_equal_weights_equal_composite(tiny: Tiny, family: str, compat: str) -> None:
    composition = made(tiny, family)
    found = fakes.latents(composition, "cmlora", interval=1, emphasis=1, order="given", compat=compat)
    torch.testing.assert_close(found, fakes.latents(composition, "composite"), atol=1e-5, rtol=1e-5)
    heavier = fakes.latents(composition, "cmlora", interval=1, emphasis=3, decay=False, order="given")
    assert (found - heavier).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["sd15", "flux1"])
def test_styles_and_ranges_of_steps_act_as_in_composite(tiny: Tiny, family: str) -> None:
    composition = made(tiny, family, 2)
    style = Attachment("style", fakes.random_adapter(composition.model, 9), 0.5, steps=(0.0, 0.5))
    first, second = composition.concepts
    late = replace(first, attachment=replace(first.attachment, steps=(0.5, 1.0)))
    styled = replace(composition, concepts=(late, second), styles=(style,))
    options: dict[str, Any] = {"interval": 1, "emphasis": 1, "order": "given"}
    found = fakes.latents(styled, "cmlora", **options)
    torch.testing.assert_close(found, fakes.latents(styled, "composite"), atol=1e-5, rtol=1e-5)
    for without in (replace(styled, styles=()), replace(styled, concepts=composition.concepts)):
        assert (found - fakes.latents(without, "cmlora", **options)).abs().max() > 1e-3


@pytest.mark.parametrize("family", ALL)
def test_copies_of_one_adapter_equal_it_whoever_dominates(tiny: Tiny, family: str) -> None:
    composition = fakes.with_seeds(made(tiny, family, 2), 1, 1)
    parts = [replace(c, attachment=replace(c.attachment, adapter=_denoiser_only(c.attachment.adapter)))
             for c in composition.concepts]  # fmt: skip
    composition = replace(composition, concepts=tuple(parts))
    found = fakes.latents(composition, "cmlora", interval=1, order="given")
    torch.testing.assert_close(found, fakes.plain(composition, "apple"), atol=2e-4, rtol=1e-4)


def _denoiser_only(adapter: Any) -> Any:  # noqa: ANN401 - two copies would act twice on the text
    return replace(adapter, layers={p: x for p, x in adapter.layers.items() if not p.startswith("text")})


@pytest.mark.parametrize("family", UNETS)
def test_nothing_kept_equals_no_keeping_at_all(tiny: Tiny, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    composition = made(tiny, family, steps=8)
    uncached = fakes.latents(composition, "cmlora", compat="release", order="given")
    cached = fakes.latents(composition, "cmlora", decay=False, order="given")
    assert (cached - uncached).abs().max() > 1e-3
    monkeypatch.setattr(Middle, "kept", property(lambda self: {}))
    emptied = fakes.latents(composition, "cmlora", decay=False, order="given")
    torch.testing.assert_close(emptied, uncached, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", UNETS)
@pytest.mark.parametrize("options", [{}, {"renew": "all"}, {"compat": "release", "interval": 3}])
def test_batches_of_one_give_the_same(tiny: Tiny, family: str, options: dict[str, Any]) -> None:
    composition = made(tiny, family, steps=6)
    options = options | {"order": "given"}
    one = fakes.latents(replace(composition, together=1), "cmlora", **options)
    torch.testing.assert_close(one, fakes.latents(composition, "cmlora", **options), atol=2e-4, rtol=1e-4)


def counting(sizes: list[int]) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(_: nn.Module, args: Any, output: Tensor) -> None:  # noqa: ANN401
        sizes.append(len(output))

    return hook


def test_only_the_dominant_one_is_computed_in_full_after_the_first_step(tiny: Tiny) -> None:
    composition = made(tiny, "sd15", steps=8)
    ran: dict[str, list[int]] = {"mid": [], "last": []}
    unet = composition.model.denoiser
    handles = [
        unet.mid_block.register_forward_hook(counting(ran["mid"])),
        unet.up_blocks[-1].register_forward_hook(counting(ran["last"])),
    ]
    facts: list[float] = []
    try:
        method = methods()["cmlora"]
        with prepared(composition, method, CmloraOptions(order="given")) as drawing:
            facts = [drawing.facts()["computed in full"] for _ in moments(composition, drawing)]
    finally:
        for handle in handles:
            handle.remove()
    assert ran["mid"] == [6, *[2] * 7]  # both branches of guidance in one batch
    assert ran["last"] == [6, *[2, 4] * 7]
    assert facts == [3, *[1] * 7]


@pytest.mark.parametrize("family", UNETS)
def test_the_whole_loop_equals_the_paper_by_hand(tiny: Tiny, family: str) -> None:
    """One pass per adapter, always of the whole UNet, whose last up block is given what was kept by a hook."""
    composition = made(tiny, family, steps=8)
    model, unet = composition.model, composition.model.denoiser
    order = [2, 0, 1]
    swapped = replace(composition, concepts=tuple(composition.concepts[index] for index in order))
    early, window, begins = round(0.55 * 8), 2, {0, 2, 3, 6, 7}  # 8 steps: thirds from 3 on, every second from 7 on
    assert refreshes(8, 0) == begins
    kept: dict[str, Tensor] = {}
    with attached(model.components, swapped.attachments) as hung, torch.no_grad():
        (work,) = swapped.begin([swapped.encode(hung, swapped.prompt, hung.names)])
        latents, turns = work.latents, 0
        for index, clock in enumerate(work.timesteps):
            turns += index in begins
            dominant = swapped.names[(turns - 1) % window + (index >= early)]
            c = max(1.0, 2.5 - sum(0.5**k for k in range(turns - 1)))
            total = torch.zeros_like(latents)
            for name in swapped.names:
                hung.activate([name])
                full = name == dominant or name not in kept

                def see(_: Any, args: Any, inputs: Any, name: str = name, full: bool = full) -> Any:  # noqa: ANN401
                    if full:
                        kept[name] = inputs["hidden_states"].clone()
                    return args, inputs | {"hidden_states": kept[name]}

                handle = unet.up_blocks[-1].register_forward_pre_hook(see, with_kwargs=True)
                try:
                    predicted = work.network(latents, clock)
                finally:
                    handle.remove()
                total += predicted * (c if name == dominant else 1.0) / (c + 2)
            latents = work.scheduler.step(total, clock, latents, return_dict=False)[0]
    found = fakes.latents(swapped, "cmlora", order="given")
    torch.testing.assert_close(found, latents, atol=2e-4, rtol=1e-4)


# Profiles


def test_high_frequencies_come_first_whatever_the_names(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    rough = {"apple": 0.2, "cat": 60.0, "dog": 10.0}

    def drawn(composition: Composition, concept: Any, prompt: str, steps: int) -> Tensor:  # noqa: ANN401
        noise = torch.randn(64, 64, 3, generator=torch.Generator().manual_seed(1))
        return torch.full((64, 64, 3), 128.0) + 60 * torch.sin(torch.arange(64) / 9)[:, None, None] + noise * rough[
            concept.name
        ]  # fmt: skip

    monkeypatch.setattr(spectra, "_drawn", drawn)
    composition = made(tiny, "sd15", steps=6)
    computed = fakes.latents(composition, "cmlora", interval=1)
    scores = composition.memo["cmlora"]["spectrum"]["scores"]
    assert scores[1] > scores[2] > scores[0]
    order = [1, 2, 0]
    by_hand = replace(composition, concepts=tuple(composition.concepts[index] for index in order))
    torch.testing.assert_close(
        computed, fakes.latents(by_hand, "cmlora", interval=1, order="given"), atol=2e-4, rtol=1e-4
    )
    assert (computed - fakes.latents(composition, "cmlora", interval=1, order="given")).abs().max() > 1e-3


def test_every_adapter_is_drawn_once_for_all_seeds(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    drawing = spectra._drawn  # pyright: ignore[reportPrivateUsage]

    def counted(composition: Composition, concept: Any, prompt: str, steps: int) -> Tensor:  # noqa: ANN401
        asked.append(concept.name)
        return drawing(composition, concept, prompt, steps)

    monkeypatch.setattr(spectra, "_drawn", counted)
    composition = made(tiny, "sdxl", 2)
    fakes.latents(composition, "cmlora", preview_steps=2)
    fakes.latents(replace(composition, seed=8), "cmlora", preview_steps=2)
    assert asked == ["apple", "cat"]
    fakes.latents(fakes.with_seeds(composition, 1, 5), "cmlora", preview_steps=2)
    assert asked == ["apple", "cat", "cat"]
    fakes.latents(composition, "cmlora", preview_steps=3)
    assert asked == ["apple", "cat", "cat", "apple", "cat"]


@pytest.mark.parametrize("family", ALL)
def test_the_spectrum_for_the_page_is_plain_and_that_of_each_picture(tiny: Tiny, family: str) -> None:
    composition = made(tiny, family, 2)
    fakes.latents(composition, "cmlora", preview_steps=3)
    told = composition.memo["cmlora"]["spectrum"]
    assert json.loads(json.dumps(told)) == told
    assert told.keys() == {"names", "edges", "profiles", "scores", "cut"}
    assert told["names"] == ["apple", "cat"] and told["cut"] == frequency.CUT
    assert {len(values) for values in told["profiles"]} == {len(told["edges"]) - 1}
    alone = replace(
        composition.concepts[1], attachment=Attachment("cat", composition.concepts[1].attachment.adapter, 1.0)
    )
    alone_made = replace(composition, concepts=(alone,), prompt=alone.prompt, seed=spectra.SEED, steps=3)
    pixels = torch.from_numpy(np.array(render(alone_made, methods()["merge"], methods()["merge"].options())))
    size = (composition.size[1], composition.size[0])
    assert told["scores"][1] == pytest.approx(frequency.high(frequency.picture_profile(pixels), size), abs=1e-6)


def test_a_given_order_draws_no_pictures(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "_drawn", None)
    composition = made(tiny, "sd15", 2)
    fakes.latents(composition, "cmlora", order="given")
    assert "spectrum" not in composition.memo.get("cmlora", {})


# By the latents


def online(composition: Composition, **options: Any) -> list[tuple[float, float]]:  # noqa: ANN401
    method = methods()["cmlora"]
    given = method.options.parse({"phases": "online", "order": "given", "interval": 1} | options)
    with prepared(composition, method, given) as drawing:
        return [
            (drawing.facts()["dominant"], drawing.facts()["high frequencies"]) for _ in moments(composition, drawing)
        ]


@pytest.mark.parametrize("family", ["sd15", "flux1"])
def test_online_the_late_part_begins_when_the_score_is_below_the_threshold(tiny: Tiny, family: str) -> None:
    composition = made(tiny, family, 2, steps=6)
    scores = [score for _, score in online(composition, threshold=0)]
    assert [who for who, _ in online(composition, threshold=0)] == [1] * 6
    assert [who for who, _ in online(composition, threshold=1)] == [1, *[2] * 5]  # before the first step: noise
    assert all(0 < score < 1 for score in scores)
    between = (scores[0] + scores[1]) / 2 if scores[1] < scores[0] else scores[0] + 1e-6
    told = online(composition, threshold=between)
    for (_, score), (who, _) in pairwise(told):
        assert who == (1 if score >= between else 2)
    assert {who for who, _ in told} == {1, 2}


def test_online_the_release_is_late_after_the_first_step(tiny: Tiny) -> None:
    composition = made(tiny, "sd15", 2, steps=5)
    assert [who for who, _ in online(composition, compat="release", threshold=0)] == [1, 2, 2, 2, 2]


def test_all_low_is_refused() -> None:
    uses = tuple(ConceptUse(adapter=f"a{i}", prompt=f"a thing{i}") for i in range(2))
    request = ComposeRequest(concepts=uses, methods=(MethodUse(method="cmlora", options={"low": 2}),))
    with pytest.raises(InputError, match="cannot let 2 of 2 concepts wait"):
        check_request(request, "sd15")
    given = request.model_copy(update={"methods": (MethodUse(method="cmlora", options={"low": 0}),)})
    check_request(given, "sd15")
