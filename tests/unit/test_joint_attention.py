"""Joint attention beside diffusers' own and beside a loop over single numbers."""

from __future__ import annotations

from collections.abc import Callable
from math import exp
from pathlib import Path
from typing import Any

import composition_fakes as fakes
import diffusers
import pytest
import torch
from intarsia.composition.attention import layers
from intarsia.composition.joint_attention import joined, joint_layers, rotated
from torch import Tensor, nn

D: Any = diffusers
Tiny = Callable[..., Path]
TEXT, SIDE = 5, 4
IMAGE = SIDE * SIDE


def sd35() -> nn.Module:
    """SD3.5's shape: norms on queries and keys, a second attention in the first block, a last block without text."""
    torch.manual_seed(0)
    made = D.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=8, out_channels=8, num_layers=3, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=48, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.2)
    return made.eval()


def denoiser(tiny: Tiny, name: str) -> nn.Module:
    return sd35() if name == "sd35" else fakes.tiny_model(tiny, name).denoiser


def inputs(model: Any, words: Tensor | None = None) -> dict[str, Any]:  # noqa: ANN401
    """What a tiny transformer takes, two samples of it."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    words = torch.randn(2, TEXT, config.joint_attention_dim, generator=generator) if words is None else words
    found: dict[str, Any] = {
        "encoder_hidden_states": words,
        "pooled_projections": torch.randn(2, config.pooled_projection_dim, generator=generator),
        "timestep": torch.full((2,), 0.5),
        "return_dict": False,
    }
    if type(model).__name__ == "FluxTransformer2DModel":
        places = torch.stack([torch.zeros(IMAGE), torch.arange(IMAGE) // SIDE, torch.arange(IMAGE) % SIDE], -1)
        found |= {"img_ids": places, "txt_ids": torch.zeros(TEXT, 3)}
        found["hidden_states"] = torch.randn(2, IMAGE, config.in_channels, generator=generator)
    else:
        shape = (2, config.in_channels, 2 * SIDE, 2 * SIDE)
        found["hidden_states"] = torch.randn(shape, generator=generator)
    return found


def answered(model: Any, **more: Any) -> Tensor:  # noqa: ANN401
    with torch.no_grad():
        return model(**inputs(model) | more)[0]


def forbidding(rows: slice, columns: slice) -> Tensor:
    bias = torch.zeros(1, 1, TEXT + IMAGE, TEXT + IMAGE)
    bias[..., rows, columns] = -torch.inf
    return bias


IN_TEXT, IN_IMAGE = slice(0, TEXT), slice(TEXT, None)


@pytest.mark.parametrize("name", ["flux1", "sd3", "sd35"])
def test_without_a_bias_it_gives_what_the_model_gives_and_the_processors_come_back(tiny: Tiny, name: str) -> None:
    model = denoiser(tiny, name)
    plain = answered(model)
    before = {path: layer.processor for path, layer in layers(model).items()}
    with joined(model):
        assert all(layer.processor is not before[path] for path, layer in layers(model).items())
        mine = answered(model)
    assert {path: layer.processor for path, layer in layers(model).items()} == before
    assert (mine - plain).abs().max() < 1e-6 * plain.abs().max().clamp(min=1)
    assert plain.std() > 0.1


@pytest.mark.parametrize("name", ["flux1", "sd3", "sd35"])
def test_a_bias_of_nothing_changes_nothing_and_each_sample_may_have_its_own(tiny: Tiny, name: str) -> None:
    model = denoiser(tiny, name)
    plain = answered(model)
    apart = forbidding(IN_IMAGE, IN_TEXT)
    with joined(model, lambda path: torch.zeros_like(apart)):
        torch.testing.assert_close(answered(model), plain, rtol=1e-5, atol=1e-5)
    with joined(model, lambda path: apart):
        blind = answered(model)
    with joined(model, lambda path: torch.cat([torch.zeros_like(apart), apart])):
        mixed = answered(model)
    torch.testing.assert_close(mixed[0], plain[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[1], blind[1], rtol=1e-5, atol=1e-5)
    assert (blind[1] - plain[1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["flux1", "sd3", "sd35"])
def test_an_image_that_may_not_see_the_text_does_not_depend_on_it(tiny: Tiny, name: str) -> None:
    model = denoiser(tiny, name)
    others = torch.randn(2, TEXT, inputs(model)["encoder_hidden_states"].shape[-1])
    assert not torch.allclose(answered(model), answered(model, encoder_hidden_states=others), atol=1e-3)
    with joined(model, lambda path: forbidding(IN_IMAGE, IN_TEXT)):
        one, other = answered(model), answered(model, encoder_hidden_states=others)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    with joined(model, lambda path: forbidding(IN_TEXT, IN_IMAGE)):  # the other way round it does
        assert not torch.allclose(answered(model), answered(model, encoder_hidden_states=others), atol=1e-3)


@pytest.mark.parametrize("name", ["flux1", "sd3"])
def test_the_bias_of_one_layer_acts_in_that_layer_alone(tiny: Tiny, name: str) -> None:
    model = denoiser(tiny, name)
    asked: list[str] = []

    def bias(path: str) -> Tensor | None:
        asked.append(path)
        return forbidding(IN_IMAGE, IN_TEXT) if path == last else None

    *_, last = layers(model)
    first = next(iter(joint_layers(model)))
    with joined(model, keep=(first,)) as plain:
        whole = answered(model)
    with joined(model, bias, keep=(first,)) as biased:
        assert not torch.allclose(answered(model), whole, atol=1e-3)
    assert asked == list(layers(model))
    torch.testing.assert_close(biased.outputs[first], plain.outputs[first])


@pytest.mark.parametrize("name", ["flux1", "sd3", "sd35"])
def test_what_a_layer_saw_makes_its_output_by_brute_force(tiny: Tiny, name: str) -> None:
    model: Any = denoiser(tiny, name)
    *_, path = joint_layers(model)
    taken: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], given: Tensor) -> None:
        taken.append(given)

    bias = torch.randn(1, 1, TEXT + IMAGE, TEXT + IMAGE, generator=torch.Generator().manual_seed(2))
    layer = joint_layers(model)[path]
    handles = [module.register_forward_hook(keep) for module in (layer.to_k, layer.to_v, layer.add_v_proj)]
    try:
        with joined(model, lambda _: bias, keep=(path,)) as seen:
            answered(model)
    finally:
        for handle in handles:
            handle.remove()
    q, words, outputs = seen.queries[path], seen.keys[path], seen.outputs[path]
    assert q.shape[2] == IMAGE and words.shape[2] == TEXT and outputs.shape[1] == IMAGE
    of_image, value, word_value = taken
    keys = of_image.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    if layer.norm_k is not None:
        keys = layer.norm_k(keys)
    if name == "flux1":
        rotary = model.pos_embed(torch.cat([inputs(model)["txt_ids"], inputs(model)["img_ids"]]))
        keys = rotated(keys, [part[TEXT:] for part in rotary], sequence_dim=2)
    values = torch.cat([word_value, value], 1).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    keys = torch.cat([words, keys], 2)
    sample, head, token = 1, 1, 7
    scores = [float((q[sample, head, token] @ key).detach()) / q.shape[-1] ** 0.5 + float(more)
              for key, more in zip(keys[sample, head], bias[0, 0, TEXT + token], strict=True)]  # fmt: skip
    total = sum(exp(score) for score in scores)
    wanted: Any = sum(exp(score) / total * one for score, one in zip(scores, values[sample, head], strict=True))
    width = q.shape[-1]
    torch.testing.assert_close(outputs[sample, token, head * width : (head + 1) * width], wanted, rtol=1e-4, atol=1e-5)


def test_a_layer_of_the_image_alone_has_the_image_s_part_of_the_bias() -> None:
    model: Any = sd35()
    layer = model.transformer_blocks[0].attn2
    x = torch.randn(2, IMAGE, 32, generator=torch.Generator().manual_seed(3))
    alone = torch.full((1, 1, TEXT + IMAGE, TEXT + IMAGE), -torch.inf)
    alone[..., IN_TEXT, :] = 0
    alone[..., range(TEXT, TEXT + IMAGE), range(TEXT, TEXT + IMAGE)] = 0  # an image token sees itself
    with joined(model, lambda path: alone):
        torch.testing.assert_close(layer(x), layer.to_out[0](layer.to_v(x)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(layer(x), layer.to_out[0](layer.to_v(x)), atol=1e-2)


def test_nothing_is_kept_while_it_is_off_and_only_of_chosen_layers(tiny: Tiny) -> None:
    model = denoiser(tiny, "sd3")
    first, last = joint_layers(model)
    with joined(model, keep=(last,)) as seen:
        seen.on = False
        answered(model)
        assert not seen.outputs
        seen.on = True
        answered(model)
    assert list(seen.outputs) == [last] and first != last


def test_layers_that_join_text_and_image_are_told_from_the_others(tiny: Tiny) -> None:
    assert list(joint_layers(denoiser(tiny, "flux1"))) == ["transformer_blocks.0.attn"]
    assert list(joint_layers(sd35())) == [f"transformer_blocks.{index}.attn" for index in range(3)]
    assert "transformer_blocks.0.attn2" in layers(sd35())
