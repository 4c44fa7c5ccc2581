"""ZipLoRA: gradients against dense weights, what learning does to the loss, limits, and the file it exports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import composition_fakes as fakes
import pytest
import torch
from intarsia.composition import zipping
from intarsia.composition.composition import Composition
from intarsia.composition.draw import prepared
from intarsia.composition.method import methods
from intarsia.composition.methods.ziplora import ZipLoraOptions, export
from intarsia.composition.pair import pair
from intarsia.composition.zipping import Learning, Sight, hung, learn, loss_of, shared, sights
from intarsia.pipelines.adapter_file import read_adapter
from intarsia.pipelines.adapter_types import LowRank
from intarsia.pipelines.attach import Attachment, attached
from intarsia.pipelines.errors import AdapterError, Cancelled
from intarsia.pipelines.events import CancelToken
from intarsia.pipelines.kinds.difference import Difference
from torch import Tensor, nn
from torch.func import functional_call

Tiny = Callable[..., Path]
FAMILIES = ("sd15", "sdxl", "sd3", "flux1")
FEW = Learning(steps=12, rate=0.05, penalty=0.01, ways=1, seed=3, style_prompt="")


def made_of(tiny: Tiny, family: str = "sdxl") -> Composition:
    return replace(fakes.composition(fakes.tiny_model(tiny, family), 2), steps=3)


def with_blocks(made: Composition, **changes: Any) -> Composition:  # noqa: ANN401
    first = made.concepts[0]
    return replace(made, concepts=(replace(first, attachment=replace(first.attachment, **changes)), *made.concepts[1:]))


@pytest.mark.parametrize("family", FAMILIES)
def test_coefficients_of_one_are_merge(tiny: Tiny, family: str) -> None:
    made = with_blocks(made_of(tiny, family), weight=0.7)
    assert torch.equal(fakes.latents(made, "ziplora", steps=0), fakes.latents(made, "merge"))


@pytest.mark.parametrize("family", ["sdxl", "flux1"])
def test_gradients_equal_those_of_dense_weights(tiny: Tiny, family: str) -> None:
    made = with_blocks(made_of(tiny, family), weight=0.7, blocks={f"{component(made_of(tiny, family))}": 0.5})
    both = pair(made)
    chosen = [sights(made, one, FEW)[1] for one in both]
    zips = shared(made.model.components, both)
    generator = torch.Generator().manual_seed(5)
    coefficients = {
        one.path: tuple(
            (1 + 0.3 * torch.randn(site.module.weight.shape[1], generator=generator)).requires_grad_()
            for site in one.sites
        )
        for one in zips
    }
    leaves = [value for values in coefficients.values() for value in values]
    with hung(made, both, zips, coefficients):  # pyright: ignore[reportArgumentType]
        ours = loss_of(made.model.denoiser, chosen, coefficients, 0.02)  # pyright: ignore[reportArgumentType]
        got = torch.autograd.grad(ours, leaves)
    dense = _dense_loss(made, both, coefficients, chosen, 0.02)
    assert float(ours) == pytest.approx(float(dense), rel=1e-4)
    for mine, wanted in zip(got, torch.autograd.grad(dense, leaves), strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-6, rtol=1e-2)


def component(made: Composition) -> str:
    return made.model.spec.denoiser


def _dense_loss(
    made: Composition,
    both: tuple[Attachment, Attachment],
    coefficients: dict[str, Any],
    chosen: list[Sight],
    penalty: float,
) -> Tensor:
    """The same loss with every change added to the weights, column by column, by plain matrices."""
    prefix = component(made) + "."
    weights: dict[str, Tensor] = {}
    for side, attachment in enumerate(both):
        for path, layer in attachment.adapter.layers.items():
            if not path.startswith(prefix):
                continue
            assert isinstance(layer, LowRank)
            name = f"{path.removeprefix(prefix)}.weight"
            before = weights[name] if name in weights else made.model.denoiser.get_parameter(name).detach()
            delta = (layer.up.flatten(1) @ layer.down.flatten(1)).view(before.shape) * layer.scale
            m = coefficients[path][side].view(1, -1, *[1] * (before.ndim - 2))
            weights[name] = before + attachment.weight * attachment.factor(path) * delta * m
    loss = torch.zeros(())
    for one in chosen:
        answer = functional_call(made.model.denoiser, weights, (), dict(one.inputs))[0]
        loss = loss + (answer - one.answer).square().mean()
    crowd = [(one * other).abs().mean() for one, other in coefficients.values()]
    return loss + penalty * sum(crowd, torch.zeros(())) / len(crowd)


def test_a_sight_holds_what_the_sampler_gave_at_that_step(tiny: Tiny) -> None:
    made = made_of(tiny)
    seen: list[Tensor] = []
    clocks: list[float] = []

    def watch(module: nn.Module, args: object, inputs: dict[str, Any]) -> None:
        seen.append(inputs["sample"])
        clocks.append(float(inputs["timestep"]))

    handle = made.model.denoiser.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        found = sights(made, made.concepts[0].attachment, FEW)
    finally:
        handle.remove()
    assert len(found) == 3 == len(seen) / 2
    for index, sight in enumerate(found):  # after each sight comes the loop's own guided pass of the same step
        assert torch.equal(seen[2 * index], sight.inputs["sample"])
        assert torch.equal(seen[2 * index + 1], sight.inputs["sample"].repeat(2, 1, 1, 1))
        assert clocks[2 * index + 1] == float(sight.inputs["timestep"])
    with attached(made.model.components, [made.concepts[0].attachment]), torch.no_grad():
        again = made.model.denoiser(**found[1].inputs)[0]
    torch.testing.assert_close(again, found[1].answer)


@pytest.mark.parametrize("family", ["sd15", "flux1"])
def test_learning_brings_both_nearer_to_what_each_does_alone(tiny: Tiny, family: str) -> None:
    made = made_of(tiny, family)
    both = pair(made)
    learned = learn(made, both, replace(FEW, penalty=0))
    zips = shared(made.model.components, both)
    ways = [sights(made, one, FEW) for one in both]

    def apart(coefficients: zipping.Coefficients) -> float:
        with hung(made, both, zips, coefficients), torch.no_grad():
            return sum(float(loss_of(made.model.denoiser, two, coefficients, 0)) for two in zip(*ways, strict=True))

    ones = {path: (torch.ones_like(one), torch.ones_like(two)) for path, (one, two) in learned.coefficients.items()}
    assert apart(learned.coefficients) < 0.7 * apart(ones)
    assert len(learned.losses) == 12 and learned.facts["last loss"] < learned.facts["first loss"]


def test_the_penalty_keeps_content_and_style_from_the_same_inputs(tiny: Tiny) -> None:
    made = made_of(tiny)

    def crowd(penalty: float) -> float:
        learned = learn(made, pair(made), replace(FEW, penalty=penalty))
        return sum(float((one * two).abs().mean()) for one, two in learned.coefficients.values())

    assert crowd(10.0) < 0.8 * crowd(0.0)


def test_all_seeds_of_a_layout_share_one_learning(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_of(tiny)
    calls: list[int] = []

    def counting(composition: Composition, *rest: Any) -> zipping.Zipped:  # noqa: ANN401
        calls.append(composition.seed)
        return learn(composition, *rest)

    monkeypatch.setattr(zipping, "learn", counting)
    fakes.latents(made, "ziplora", steps=2)
    second = fakes.latents(replace(made, seed=9), "ziplora", steps=2)
    assert calls == [7]
    assert torch.equal(second, fakes.latents(replace(made, seed=9, memo={}), "ziplora", steps=2))


def test_a_prompt_of_its_own_is_what_each_learns_from(tiny: Tiny) -> None:
    made = made_of(tiny)
    content, style = pair(made)
    spoken = replace(made, concepts=(replace(made.concepts[0], prompt="a red apple"), made.concepts[1]))
    assert zipping.prompt_of(spoken, content, FEW) == "a red apple"
    assert zipping.prompt_of(made, content, FEW) == "a apple"
    assert zipping.prompt_of(made, style, replace(FEW, style_prompt="blue")) == "blue"
    styled = replace(made, concepts=made.concepts[:1], styles=(style,))
    assert zipping.prompt_of(styled, style, FEW) == made.prompt
    worded = replace(style, adapter=replace(style.adapter, trigger="sks style"))
    assert zipping.prompt_of(replace(styled, styles=(worded,)), worded, FEW) == "sks style"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exported_file_draws_what_the_method_draws(tiny: Tiny, family: str, tmp_path: Path) -> None:
    made = with_blocks(made_of(tiny, family), weight=0.7, blocks={component(made_of(tiny, family)): 0.5})
    options = ZipLoraOptions(steps=3, rate=0.1)
    drawn = fakes.latents(made, "ziplora", **options.model_dump())
    path = export(made, options, tmp_path / "both.safetensors")
    shapes = {
        f"{name}.{place}": tuple(module.weight.shape)
        for name, root in made.model.modules.items()
        for place, module in root.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    adapter = read_adapter(path, shapes)
    assert {layer.rank for layer in adapter.layers.values()} == {8}
    alone = replace(made.concepts[0], attachment=Attachment("both", adapter))
    assert not torch.allclose(drawn, fakes.latents(made, "merge"), atol=1e-2)
    torch.testing.assert_close(fakes.latents(replace(made, concepts=(alone,)), "merge"), drawn, atol=1e-4, rtol=1e-4)


def test_what_no_file_can_say_is_refused_and_nothing_is_written(tiny: Tiny, tmp_path: Path) -> None:
    made = with_blocks(made_of(tiny), steps=(0.0, 0.5))
    with pytest.raises(AdapterError, match="acts in a part of the steps"):
        export(made, ZipLoraOptions(steps=0), tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_adapters_it_cannot_join_are_refused_in_words(tiny: Tiny) -> None:
    made = made_of(tiny)
    adapter = made.concepts[0].attachment.adapter
    path = next(path for path in adapter.layers if path.endswith("to_q"))
    width = made.model.denoiser.get_submodule(path.removeprefix("unet.")).weight.shape
    dense = replace(adapter, layers={**adapter.layers, path: Difference(torch.zeros(width), None)})
    with pytest.raises(AdapterError, match="plain LoRAs only; apple holds a Difference"):
        fakes.latents(with_blocks(made, adapter=dense), "ziplora")
    text = replace(adapter, layers={p: layer for p, layer in adapter.layers.items() if p.startswith("text")})
    with pytest.raises(AdapterError, match="no layer in common"):
        fakes.latents(with_blocks(made, adapter=text), "ziplora")


def test_a_stop_while_learning_leaves_the_model_as_it_was(tiny: Tiny) -> None:
    checks = 0

    def asked() -> bool:
        nonlocal checks
        checks += 1
        return checks > 2 * 3 + 4  # both ways of three steps, then in the middle of the learning

    made = replace(made_of(tiny), token=CancelToken(asked))
    before = fakes.state(made.model)
    method = methods()["ziplora"]
    with pytest.raises(Cancelled), prepared(made, method, ZipLoraOptions(steps=50)):
        pass
    assert checks == 2 * 3 + 5
    assert fakes.state(made.model) == before
    assert made.memo == {}
