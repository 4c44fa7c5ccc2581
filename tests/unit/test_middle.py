"""A denoiser without its middle: against the whole denoiser whose middle is overruled by a hook, and its cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import composition_fakes as fakes
import diffusers
import pytest
import torch
from intarsia.composition.composition import Composition, Fan
from intarsia.composition.middle import Middle
from intarsia.pipelines.attach import attached
from torch import Tensor, nn

D: Any = diffusers
Tiny = Callable[..., Path]
NAMES = ("apple", "cat", "dog")


def unet(levels: int, **more: Any) -> nn.Module:  # noqa: ANN401
    torch.manual_seed(0)
    return D.UNet2DConditionModel(
        sample_size=16, down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels, block_out_channels=(8, 16, 24, 32)[:levels],
        attention_head_dim=4, cross_attention_dim=16, norm_num_groups=4, **{"layers_per_block": 1} | more,
    ).eval()  # fmt: skip


def sd3(layers: int) -> nn.Module:
    torch.manual_seed(0)
    model = D.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=layers, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=16,
    )  # fmt: skip
    return stirred(model)


def flux(double: int, single: int) -> nn.Module:
    torch.manual_seed(0)
    model = D.FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=double, num_single_layers=single, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return stirred(model)


def stirred(model: Any) -> nn.Module:  # noqa: ANN401 - its zero-initialised layers would hide every difference
    for weight in model.parameters():
        if weight.ndim > 1 and not weight.detach().any():
            nn.init.normal_(weight, std=0.1)
    return model.eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "one level": lambda: unet(1),
    "two levels": lambda: unet(2),
    "four levels": lambda: unet(4),
    "no mid block": lambda: unet(2, mid_block_type=None),
    "uneven": lambda: unet(3, layers_per_block=(1, 2, 1)),
    "sd3": lambda: sd3(5),
    "flux": lambda: flux(2, 4),
    "flux, all double": lambda: flux(5, 1),
}


def inputs(model: nn.Module, batch: int, seed: int, clock: float) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(seed)
    text = torch.randn(batch, 5, 16, generator=torch.Generator().manual_seed(1))
    if hasattr(model, "up_blocks"):
        return {"sample": torch.randn(batch, 4, 16, 16, generator=rng), "timestep": torch.tensor(clock),
                "encoder_hidden_states": text}  # fmt: skip
    found = {"encoder_hidden_states": text, "pooled_projections": torch.ones(batch, 16),
             "timestep": torch.full((batch,), clock)}  # fmt: skip
    if hasattr(model, "single_transformer_blocks"):
        hidden = torch.randn(batch, 16, 8, generator=rng)
        return found | {"hidden_states": hidden, "txt_ids": torch.zeros(5, 3), "img_ids": torch.zeros(16, 3)}
    return found | {"hidden_states": torch.randn(batch, 4, 8, 8, generator=rng)}


@torch.no_grad()
def run(model: nn.Module, given: dict[str, Any]) -> Tensor:
    return model(**given, return_dict=False)[0]


def ends(model: nn.Module, depth: int) -> tuple[nn.Module, nn.Module]:
    """The first module of the middle and the first after it, looked up without the code that is tested."""
    if hasattr(model, "up_blocks"):
        return model.down_blocks[1] if len(model.down_blocks) > 1 else model.up_blocks[0], model.up_blocks[-1]  # type: ignore[index]
    chain = [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())]  # type: ignore[misc]
    return chain[depth], chain[len(chain) - depth]


def overruled(model: nn.Module, depth: int, old: dict[str, Any], new: dict[str, Any]) -> Tensor:
    """Run everything at the new inputs, and put in at the end of the middle what the old inputs gave there."""
    first, tail = ends(model, depth)
    seen: dict[str, dict[str, Any]] = {}
    handles = [
        first.register_forward_pre_hook(lambda m, a, k: seen.update(first=k), with_kwargs=True),
        tail.register_forward_pre_hook(lambda m, a, k: seen.update(tail=k), with_kwargs=True),
    ]
    run(model, old)
    for handle in handles:
        handle.remove()
    stale, begun = seen["tail"], seen["first"]
    names = ("hidden_states",) if hasattr(model, "up_blocks") else ("hidden_states", "encoder_hidden_states")

    def put(_: nn.Module, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
        if hasattr(model, "up_blocks"):
            return args, kwargs | {"hidden_states": stale["hidden_states"]}
        return args, kwargs | {name: fresh[name] + stale[name] - begun[name] for name in names}

    fresh: dict[str, Any] = {}
    handles = [
        first.register_forward_pre_hook(lambda m, a, k: fresh.update(k), with_kwargs=True),
        tail.register_forward_pre_hook(put, with_kwargs=True),
    ]
    try:
        return run(model, new)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", MODELS)
def test_a_partial_pass_right_after_a_full_one_equals_it(name: str) -> None:
    model = MODELS[name]()
    middle, given = Middle(model), inputs(model, 2, 2, 500.0)
    plain = run(model, given)
    with middle.whole(["a"]):
        assert torch.equal(run(model, given), plain)
    with middle.without(["a"]):
        found = run(model, given)
    torch.testing.assert_close(found, plain, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_a_partial_pass_elsewhere_equals_the_whole_with_its_middle_overruled(name: str) -> None:
    model = MODELS[name]()
    middle = Middle(model)
    old, new = inputs(model, 2, 2, 500.0), inputs(model, 2, 3, 400.0)
    with middle.whole(["a"]):
        run(model, old)
    with middle.without(["a"]):
        found = run(model, new)
    torch.testing.assert_close(found, overruled(model, 1, old, new), atol=2e-6, rtol=1e-5)
    whole = run(model, new)
    assert (found - whole).abs().max() > 1e-3 * whole.abs().max()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_transformer_runs_as_many_blocks_at_each_end_as_were_asked_for(depth: int) -> None:
    model = flux(3, 4)
    middle, given = Middle(model, depth), inputs(model, 1, 2, 0.5)
    chain = [*model.transformer_blocks, *model.single_transformer_blocks]  # type: ignore[misc]
    ran: list[int] = []

    def noted(index: int) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: ran.append(index)

    for index, block in enumerate(chain):
        block.register_forward_hook(noted(index))
    with middle.whole(["a"]):
        run(model, given)
    assert ran == list(range(7))
    ran.clear()
    with middle.without(["a"]):
        run(model, given)
    assert ran == [*range(depth), *range(7 - depth, 7)]


def test_a_transformer_of_two_blocks_has_no_middle_and_runs_whole() -> None:
    model = flux(1, 1)
    middle, given, other = Middle(model, 4), inputs(model, 1, 2, 0.5), inputs(model, 1, 3, 0.2)
    with middle.whole(["a"]):
        run(model, given)
    with middle.without(["a"]):
        assert torch.equal(run(model, other), run(model, other))
        found = run(model, other)
    assert torch.equal(found, run(model, other))


@pytest.mark.parametrize("name", ["four levels", "sd3", "flux"])
def test_the_model_is_as_before_also_when_a_pass_breaks(name: str) -> None:
    model = MODELS[name]()
    before = {path: id(module) for path, module in model.named_modules()}
    variables = sorted(vars(model))
    middle, given = Middle(model), inputs(model, 1, 2, 500.0)
    with middle.whole(["a"]):
        run(model, given)
    inside: set[str] = set()
    with pytest.raises(ZeroDivisionError), middle.without(["a"]):
        inside = {path for path, _ in model.named_modules()}
        raise ZeroDivisionError
    assert inside < set(before)
    assert {path: id(module) for path, module in model.named_modules()} == before
    assert sorted(vars(model)) == variables
    assert all(not vars(m)["_forward_pre_hooks"] and not vars(m)["_forward_hooks"] for m in model.modules())
    with pytest.raises(KeyError):
        middle.forget(["a"])
        with middle.without(["a"]):
            pass


def _branches(made: Composition, names: Sequence[str]) -> Any:  # noqa: ANN401
    return attached(made.model.components, [c.attachment for c in made.concepts if c.name in names])


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux1"])
def test_each_adapter_has_what_its_own_pass_gave(tiny: Tiny, family: str) -> None:
    model = fakes.tiny_model(tiny, family)
    made = fakes.composition(model, 3)
    with _branches(made, NAMES) as hung, torch.no_grad():
        works = made.begin([made.encode(hung, made.prompt, ())] * 3)
        fan = Fan(hung, works, [(name,) for name in NAMES])
        together, apart = Middle(model.denoiser), Middle(model.denoiser)
        latents, clock = works[0].latents, works[0].timesteps[0]
        with together.whole(NAMES):
            fan(latents, clock)
        for index, name in enumerate(NAMES):
            with apart.whole([name]):
                fan(latents, clock, [index])
        assert together.kept.keys() == set(NAMES)
        for name in NAMES:
            for one, other in zip(together.kept[name], apart.kept[name], strict=True):
                assert one.shape[0] == (2 if model.spec.negative else 1)
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        if model.spec.denoiser == "unet":
            (kept,) = together.kept["cat"]
            channels = model.denoiser.up_blocks[-1].resnets[0].in_channels
            skipped = model.denoiser.down_blocks[0].resnets[-1].out_channels
            assert kept.shape == (2, channels - skipped, *latents.shape[2:])
            assert not torch.equal(kept, together.kept["dog"][0])
        fresh = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
        with together.without(["dog", "apple"]):
            found = fan(fresh, clock, [2, 0])
        for row, (index, name) in zip(found, ((2, "dog"), (0, "apple")), strict=True):
            with apart.without([name]):
                torch.testing.assert_close(row[None], fan(fresh, clock, [index]), atol=1e-4, rtol=1e-4)


def _operations(model: nn.Module, given: dict[str, Any]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run(model, given)
    return counter.get_total_flops()


def test_a_partial_pass_of_sd15_costs_0_38_of_a_full_one() -> None:
    with torch.device("meta"):
        model = D.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval()
        given = {"sample": torch.zeros(2, 4, 64, 64), "timestep": torch.tensor(1.0),
                 "encoder_hidden_states": torch.zeros(2, 77, 768)}  # fmt: skip
        middle = Middle(model)
        with middle.whole(["a"]):
            whole = _operations(model, given)
        assert [tuple(part.shape) for part in middle.kept["a"]] == [(2, 640, 64, 64)]
        with middle.without(["a"]):
            part = _operations(model, given)
    assert part / whole == pytest.approx(0.38, abs=0.005)
