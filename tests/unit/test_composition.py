"""Merge, Switch and Composite: exact limit cases, turns by the formula, many predictions as one batch or in chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import composition_fakes as fakes
import pytest
import torch
from intarsia.composition.composition import Fan, shares
from intarsia.composition.draw import prepared, render
from intarsia.composition.method import UNETS, methods
from intarsia.composition.methods.switch import turn
from intarsia.pipelines.attach import attached
from intarsia.pipelines.errors import InputError, MemoryLimitError
from torch import Tensor

Tiny = Callable[..., Path]
FAMILIES = (*UNETS, "sd3", "flux1")
CLOSE = 1e-4  # of the largest value: other batch sizes choose other kernels


def same(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() < CLOSE * other.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_is_the_sum_of_the_changes_written_into_the_weights(tiny: Tiny, family: str) -> None:
    from intarsia.pipelines.merged import merged

    made = fakes.composition(fakes.tiny_model(tiny, family), 2)
    by_hooks = fakes.latents(made, "merge")
    with merged(made.model.components, made.attachments):
        nothing = replace(made, concepts=tuple(
            replace(one, attachment=replace(one.attachment, weight=0.0)) for one in made.concepts
        ))  # fmt: skip
        by_weights = fakes.latents(nothing, "merge")
    assert same(by_hooks, by_weights) and not same(by_hooks, fakes.plain(made))


def test_merge_scaled_is_merge_at_smaller_weights(tiny: Tiny) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, "sdxl"), 2)
    smaller = replace(made, concepts=tuple(
        replace(one, attachment=replace(one.attachment, weight=0.8)) for one in made.concepts
    ))  # fmt: skip
    assert torch.equal(fakes.latents(made, "merge", scale=0.8), fakes.latents(smaller, "merge"))


@pytest.mark.parametrize("family", FAMILIES)
def test_switch_with_long_turns_or_one_concept_is_that_concept(tiny: Tiny, family: str) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, family), 2)
    first = fakes.plain(made, "apple")
    assert torch.equal(fakes.latents(made, "switch", every=10), first)
    assert torch.equal(fakes.latents(made.alone("apple"), "switch", every=1), first)
    assert not torch.equal(fakes.latents(made, "switch", every=2), first)


@pytest.mark.parametrize(("every", "count"), [(1, 2), (5, 3), (3, 4), (7, 1)])
def test_turns_are_those_of_the_formula(every: int, count: int) -> None:
    for t in range(1, 61):  # floor(((t - 1) mod (k tau)) / tau) + 1
        assert turn(t - 1, every, count) == ((t - 1) % (count * every)) // every
    changes = [t for t in range(1, 60) if turn(t, every, count) != turn(t - 1, every, count)]
    assert changes == ([] if count == 1 else list(range(every, 60, every)))


def test_switch_is_recorded_turn_by_turn(tiny: Tiny) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, "sdxl"), 3, steps=6)
    method, seen = methods()["switch"], list[int]()
    with prepared(made, method, method.options.parse({"every": 2})) as drawing:
        turns: Any = drawing.hooks[0]
        from intarsia.composition.draw import moments

        for _ in moments(made, drawing):
            seen.append(turns.now)
            assert turns.hung.active == {made.names[turns.now]}
    assert seen == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_composite_of_copies_is_the_one_and_of_weights_one_and_nothing_the_first(tiny: Tiny, family: str) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, family), 3)
    copies = fakes.with_seeds(made, 1, 1, 1)
    model = made.model
    single = fakes.latents(replace(made.alone("apple")), "composite")
    assert same(
        fakes.latents(_wordless(copies, model), "composite"),
        fakes.latents(_wordless(made.alone("apple"), model), "merge"),
    )
    weights = [1.0, 0.0, 0.0]
    weighted = replace(made, concepts=tuple(
        replace(one, attachment=replace(one.attachment, weight=weight))
        for one, weight in zip(_wordless(made, model).concepts, weights, strict=True)
    ))  # fmt: skip
    first = fakes.latents(_wordless(made.alone("apple"), model), "merge")
    assert same(fakes.latents(weighted, "composite", average="weighted"), first)
    assert not same(fakes.latents(_wordless(made, model), "composite"), first)
    assert torch.isfinite(single).all()


def _wordless(made: fakes.Composition, model: fakes.Model) -> fakes.Composition:
    """The same without adapters of the text encoder, which all concepts read the prompt with."""

    def silent(one: fakes.Concept) -> fakes.Concept:
        adapter = fakes.random_adapter(model, int(one.attachment.adapter.sha256), text=False)
        return replace(one, attachment=replace(one.attachment, adapter=adapter))

    return replace(made, concepts=tuple(map(silent, made.concepts)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("together", [None, 1, 2])
def test_predictions_of_one_batch_are_those_made_one_after_another(
    tiny: Tiny, family: str, together: int | None
) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, family), 3)
    with torch.no_grad(), attached(made.model.components, made.attachments) as hung:
        prompts = [made.encode(hung, f"a {name}", (name,)) for name in made.names]
        works = made.begin(prompts)
        rows = [(name,) for name in made.names]
        fan = Fan(hung, works, rows, together)
        latents, timestep = works[0].latents, works[0].timesteps[0]
        got, some = fan(latents, timestep), fan(latents, timestep, [2, 0])
        alone: list[Tensor] = []
        for work, row in zip(works, rows, strict=True):
            hung.activate(row)
            alone.append(work.network(latents, timestep))
        conditional = fan.conditional(latents, timestep, [1])
        hung.activate(rows[1])
        half = works[1].network.halves(latents, timestep)[1]  # type: ignore[attr-defined]
    assert same(got, torch.cat(alone)) and same(some, torch.cat([alone[2], alone[0]])) and same(conditional, half)
    assert not same(alone[0], alone[1])


@pytest.mark.parametrize("name", ["merge", "switch", "composite"])
def test_a_style_acts_on_every_branch(tiny: Tiny, name: str) -> None:
    model = fakes.tiny_model(tiny, "sdxl")
    made = fakes.composition(model, 2)
    style = fakes.Attachment("ink", fakes.random_adapter(model, 9), 0.7)
    assert not same(fakes.latents(replace(made, styles=(style,)), name), fakes.latents(made, name))
    still = replace(style, weight=0.0)
    assert same(fakes.latents(replace(made, styles=(still,)), name), fakes.latents(made, name))


def test_parts_of_weights() -> None:
    assert shares([1, 3]) == [0.25, 0.75] and shares([0, 0]) == [0.5, 0.5]


def test_too_many_predictions_for_the_memory_say_how_many_would_fit(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, "sdxl"), 3)
    before = fakes.state(made.model)

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = made.model.denoiser.register_forward_pre_hook(full)
    try:
        with pytest.raises(MemoryLimitError, match="no room for 3") as caught:
            fakes.latents(made, "composite")
        assert "At once to 1" in caught.value.hint
        with pytest.raises(MemoryLimitError, match="no room for 1") as caught:
            fakes.latents(replace(made, together=1), "composite")
        assert "Region or Merge" in caught.value.hint
    finally:
        handle.remove()
    assert fakes.state(made.model) == before


@pytest.mark.parametrize("name", [name for name, method in methods().items() if "gradients" in method.needs])
def test_gradients_are_not_asked_of_packed_weights(tiny: Tiny, name: str) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, "sdxl"), 2)
    made.model.denoiser.hf_quantizer = SimpleNamespace(is_trainable=False)
    try:
        with pytest.raises(InputError, match="packed weights give none"):
            render(made, methods()[name], methods()[name].options())
    finally:
        del made.model.denoiser.hf_quantizer
