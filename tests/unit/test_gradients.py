"""Gradients of maps: passes that end early, one branch at a time or checkpointed, give what the whole graph gives."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import composition_fakes as fakes
import pytest
import torch
from intarsia.composition.attention import recorded
from intarsia.composition.composition import Composition, Fan
from intarsia.composition.gradients import Glance, Views, derived, glancing, level, pulled_back, unit
from intarsia.pipelines import schedule
from intarsia.pipelines.attach import attached
from intarsia.pipelines.errors import InputError
from torch import Tensor, nn

Tiny = Callable[..., Path]
FAMILIES = ["sd15", "sdxl"]


@contextmanager
def viewed(made: Composition) -> Generator[tuple[Views, Tensor, Tensor]]:
    """The branches of a picture, plain and one per concept; its first latents and timestep."""
    rows = [(), *((name,) for name in made.names)]
    with attached(made.model.components, made.attachments) as hung:
        works = made.begin([made.encode(hung, made.prompt, row) for row in rows])
        with glancing(made.model.denoiser, level(made, "32")) as glance:
            together = made.together or len(rows)
            fan = Fan(hung, works, rows, made.together)
            yield Views(fan, glance, together, made.token.check), works[0].latents, works[0].timesteps[0]


@contextmanager
def batches(module: nn.Module) -> Generator[list[int]]:
    """The size of the batch at each call of a layer."""
    found: list[int] = []

    def note(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
        found.append(len(args[0]))

    handle = module.register_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def loss(maps: list[Tensor]) -> Tensor:
    """Something that no branch has alone."""
    return sum(((one[0] - one[1]) ** 2).sum() + (one[1] * one[2].roll(1, 0)).sum() for one in maps)  # type: ignore[return-value]


def whole_graph(made: Composition, views: Views, latents: Tensor, timestep: Tensor) -> tuple[float, Tensor]:
    """The same by diffusers' recording of whole passes and one graph over everything."""
    leaf = latents.clone().requires_grad_(True)
    maps: list[Tensor] = []
    grid = level(made, "32")
    with torch.enable_grad(), recorded(made.model.denoiser, grid) as kept:
        for branch in range(len(views.fan)):
            kept.clear()
            views.fan.conditional(leaf, timestep, [branch])
            maps.append(kept.mean())
        value = loss([torch.cat(maps)])
        (gradient,) = torch.autograd.grad(value, leaf)
    return float(value), gradient


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("together", [None, 2])
def test_one_branch_at_a_time_gives_the_gradient_of_the_whole_graph(
    tiny: Tiny, family: str, together: int | None
) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, family), together=together)
    with viewed(made) as (views, latents, timestep):
        expected, gradient = whole_graph(made, views, latents, timestep)
        for _ in range(2):  # the second time passes end early
            value, (derivatives,) = derived([views.look(latents, timestep)], loss)
            found = views.gradient(latents, timestep, derivatives)
            assert float(value) == pytest.approx(expected, rel=1e-5)
            torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
        value, found = views.loss_gradient(latents, timestep, loss)
        assert float(value) == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_gradient_and_runs_layers_again(tiny: Tiny, family: str) -> None:
    model = fakes.tiny_model(tiny, family)
    found: list[Tensor] = []
    calls: list[int] = []
    layer = next(module for path, module in model.denoiser.named_modules() if path.endswith("attn2.to_q"))
    for on in (False, True):
        made = fakes.composition(model)
        (model.denoiser.enable_gradient_checkpointing if on else model.denoiser.disable_gradient_checkpointing)()
        try:
            with viewed(made) as (views, latents, timestep), batches(layer) as count:
                views.look(latents, timestep)
                count.clear()
                _, (derivatives,) = derived([views.look(latents, timestep)], loss)
                found.append(views.gradient(latents, timestep, derivatives))
                found.append(views.loss_gradient(latents, timestep, loss)[1])
        finally:
            model.denoiser.disable_gradient_checkpointing()
        calls.append(len(count))
    assert calls[1] > calls[0], "nothing was checkpointed"
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5 * float(found[0].abs().max()))


def test_a_pass_for_maps_ends_behind_the_last_one_and_holds_one_conditional_branch(tiny: Tiny) -> None:
    model = fakes.tiny_model(tiny, "sd15")
    assert not any(weight.requires_grad for weight in model.denoiser.parameters()), "a graph would keep every input"
    first, last = model.denoiser.conv_in, model.denoiser.conv_out
    with (
        viewed(fakes.composition(model)) as (views, latents, timestep),
        batches(first) as begun,
        batches(last) as ended,
    ):
        views.look(latents, timestep)
        assert (begun, ended) == ([3], [3]), "the first pass counts the layers"
        views.look(latents, timestep)
        views.gradient(latents, timestep, torch.ones(3, 4, 77))
        assert (begun, ended) == ([3, 3, 1, 1, 1], [3])
        assert views.predict(latents, timestep)[1].shape[0] == 3
        assert (begun[-1], ended) == (6, [3, 6]), "a prediction is a whole pass of both halves"


def test_a_prediction_and_its_maps_are_those_of_branches_drawn_alone(tiny: Tiny) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, "sdxl"), together=2)
    with viewed(made) as (views, latents, timestep):
        without, within, maps = views.predict(latents, timestep)
        looked = views.look(latents, timestep)
        assert without is not None
        for branch in range(3):
            alone = views.fan.halves(latents, timestep, [branch])
            torch.testing.assert_close(without[branch], alone[0][0])  # type: ignore[index]
            torch.testing.assert_close(within[branch], alone[1][0])
        torch.testing.assert_close(maps, looked)
        torch.testing.assert_close(maps.sum(-1), torch.ones(3, 4))
    assert not torch.allclose(maps[0], maps[1])


def test_small_derivatives_survive_sixteen_bits() -> None:
    leaf = torch.randn(64, requires_grad=True)
    half = (leaf.half() * 2).float()
    found = pulled_back([half], [torch.full((64,), 1e-9)], leaf)  # below the least number of 16 bits
    torch.testing.assert_close(found, torch.full((64,), 2e-9))
    assert torch.equal(pulled_back([half * 1], [torch.zeros(64)], leaf), torch.zeros(64))


def test_a_level_without_layers_is_refused_in_words() -> None:
    with pytest.raises(InputError, match="no attention layer"):
        Glance(5).run(lambda: None)


def test_levels_round_up_and_small_pictures_have_finer_ones(tiny: Tiny) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, "sd15"))
    assert level(replace(made, size=(512, 768)), "auto") == (24, 16)
    assert level(replace(made, size=(256, 256)), "auto") == (16, 16)
    assert level(replace(made, size=(256, 256)), "32") == (8, 8)
    assert level(replace(made, size=(520, 512)), "32") == (16, 17)


@pytest.mark.parametrize(("name", "sigma_space"), [("euler", True), ("ddim", False), ("dpmpp_2m", False)])
def test_a_step_is_the_same_for_the_network_whatever_the_sampler(tiny: Tiny, name: str, sigma_space: bool) -> None:
    """With z = unit * x, x - dL/dx is (z - unit^2 dL/dz) / unit."""
    model = fakes.tiny_model(tiny, "sdxl")
    sampler = schedule.make(name, model.components["scheduler"], model.spec)
    sampler.set_timesteps(4)
    timestep = sampler.timesteps[0]
    found = unit(sampler, timestep)
    assert (found > 5) is sigma_space
    z = torch.randn(3, requires_grad=True)
    x = sampler.scale_model_input(z, timestep)
    torch.testing.assert_close(x * found, z)
    (by_z,) = torch.autograd.grad((x**3).sum(), z)
    moved = z - found**2 * by_z
    torch.testing.assert_close(moved / found, x - 3 * x**2)
