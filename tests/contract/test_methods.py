"""What every way to compose promises, found by discovery: restored state, same bytes, words for mistakes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import composition_fakes as fakes
import pytest
import torch
from intarsia.composition.draw import moments, prepared
from intarsia.composition.layout import ComposeRequest, ConceptUse, MethodUse
from intarsia.composition.method import CompositionMethod, check_request, methods
from intarsia.pipelines.errors import Cancelled, InputError
from intarsia.pipelines.events import CancelToken
from intarsia.pipelines.hooks import Step
from intarsia.pipelines.options import Options, describe
from torch import Tensor

Tiny = Callable[..., Path]
METHODS = methods()
PAIRS = [(name, family) for name, method in METHODS.items() for family in method.families]
BOX = (0.0, 0.0, 0.5, 1.0)


def counted(method: CompositionMethod[object]) -> int:  # type: ignore[type-var]
    return max(2, method.least) if method.most >= 2 else method.most


def quick(name: str) -> Options:
    return METHODS[name].options.parse(fakes.QUICK.get(name, {}))


class BrokenError(Exception):
    """Something of ours or theirs that goes wrong in the middle."""


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_the_model_is_as_before_and_the_same_request_gives_the_same_numbers(tiny: Tiny, name: str, family: str) -> None:
    model = fakes.tiny_model(tiny, family)
    made = fakes.composition(model, counted(METHODS[name]))
    before = fakes.state(model)
    options = fakes.QUICK.get(name, {})
    first = fakes.latents(made, name, **options)
    assert fakes.state(model) == before
    assert torch.isfinite(first).all()
    assert torch.equal(first, fakes.latents(replace(made, memo={}), name, **options))
    assert not torch.equal(first, fakes.latents(replace(made, seed=8, memo={}), name, **options))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_stop_between_any_two_steps_leaves_the_model_as_it_was(tiny: Tiny, name: str, at: int) -> None:
    model = fakes.tiny_model(tiny, METHODS[name].families[0])
    token = CancelToken()
    made = fakes.composition(model, counted(METHODS[name]), token=token)
    before = fakes.state(model)
    with pytest.raises(Cancelled), prepared(made, METHODS[name], quick(name)) as drawing:
        for moment in moments(made, drawing):
            if moment.stepped.index >= at:
                token.cancel()
    assert fakes.state(model) == before


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("where", ["denoiser", "sampler", "layer"])
def test_an_exception_anywhere_leaves_the_model_as_it_was(
    tiny: Tiny, name: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fakes.tiny_model(tiny, METHODS[name].families[0])
    made = fakes.composition(model, counted(METHODS[name]))
    before = fakes.state(model)
    calls = 0

    def fail(*_: object, **__: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:  # the first goes well: something was kept by then
            raise BrokenError

    layer = model.denoiser if where == "denoiser" else [m for p, m in model.denoiser.named_modules() if "to_q" in p][-1]
    handle = None if where == "sampler" else layer.register_forward_hook(fail)
    try:
        with pytest.raises(BrokenError), prepared(made, METHODS[name], quick(name)) as drawing:
            if where == "sampler":
                monkeypatch.setattr(drawing.work.scheduler, "step", _second_time(drawing.work.scheduler.step))
            for _ in moments(made, drawing):
                pass
    finally:
        if handle is not None:
            handle.remove()
    assert fakes.state(model) == before


def _second_time(step: Callable[..., object]) -> Callable[..., object]:
    calls = 0

    def stepping(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise BrokenError
        return step(*args, **kwargs)

    return stepping


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("checks", [1, 3])
def test_a_stop_at_any_check_also_inside_a_step_leaves_the_model_as_it_was(tiny: Tiny, name: str, checks: int) -> None:
    model = fakes.tiny_model(tiny, METHODS[name].families[0])
    asked = iter(range(1_000_000))
    made = fakes.composition(model, counted(METHODS[name]), token=CancelToken(lambda: next(asked) >= checks))
    before = fakes.state(model)
    with pytest.raises(Cancelled):
        fakes.latents(made, name, **fakes.QUICK.get(name, {}))
    assert fakes.state(model) == before


class Bomb:
    """A step hook that goes off the second time it is called."""

    def __init__(self, where: str) -> None:
        self._where, self._calls = where, 0

    def before(self, step: Step) -> Tensor:
        return self._tick("before", step)

    def after(self, step: Step) -> Tensor:
        return self._tick("after", step)

    def _tick(self, where: str, step: Step) -> Tensor:
        self._calls += where == self._where
        if self._calls > 1:
            raise BrokenError
        return step.latents


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("first", [True, False])
def test_an_exception_beside_each_of_its_hooks_leaves_the_model_as_it_was(
    tiny: Tiny, name: str, where: str, first: bool
) -> None:
    model = fakes.tiny_model(tiny, METHODS[name].families[0])
    made = fakes.composition(model, counted(METHODS[name]))
    before = fakes.state(model)
    bomb = Bomb(where)
    with pytest.raises(BrokenError), prepared(made, METHODS[name], quick(name)) as drawing:
        hooks = (bomb, *drawing.hooks) if first else (*drawing.hooks, bomb)
        for _ in moments(made, replace(drawing, hooks=hooks)):
            pass
    assert fakes.state(model) == before


@pytest.mark.parametrize("name", METHODS)
def test_options_survive_json_and_keep_their_bounds(name: str) -> None:
    method = METHODS[name]
    options = method.options()
    assert method.options.from_json(options.to_json()) == options
    for info in describe(method.options):
        assert info.label and info.help, f"{name}: {info.name} is not explained"
        for bound, beyond in ((info.low, -1), (info.high, 1)):
            if info.kind in ("int", "float") and bound is not None:
                with pytest.raises(InputError):
                    method.options.parse({info.name: bound + beyond})


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_cannot_draw_is_refused_in_words(name: str) -> None:
    method = METHODS[name]
    uses = tuple(
        ConceptUse(adapter=f"a{i}", prompt=f"a thing{i}", box=BOX)
        for i in range(max(method.least, min(2, method.most)))
    )
    whole = ", ".join(use.prompt for use in uses)
    good = ComposeRequest(prompt=whole, concepts=uses, methods=(MethodUse(method=name),))
    assert check_request(good, method.families[0]).methods[0].options == method.options().model_dump(mode="json")
    with pytest.raises(InputError, match="no concept"):
        check_request(good.model_copy(update={"concepts": ()}), method.families[0])
    with pytest.raises(InputError, match="cannot draw"):
        check_request(good, "wan")
    with pytest.raises(InputError, match="no setting called"):
        check_request(
            good.model_copy(update={"methods": (MethodUse(method=name, options={"x": 1}),)}), method.families[0]
        )
    if "places" in method.needs:
        lost = (uses[0].model_copy(update={"box": None}), *uses[1:])
        with pytest.raises(InputError, match="needs a place"):
            check_request(good.model_copy(update={"concepts": lost}), method.families[0])
    if "phrases" in method.needs:
        with pytest.raises(InputError, match="does not hold"):
            check_request(good.model_copy(update={"prompt": "nothing of it"}), method.families[0])
