"""FreeFuse: limit cases, what reaches which token, what the probe looks at, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import composition_fakes as fakes
import pytest
import torch
from intarsia.composition import probing, routing
from intarsia.composition.composition import Composition, network_of
from intarsia.composition.draw import prepared
from intarsia.composition.freefuse import Routes
from intarsia.composition.layout import ComposeRequest, ConceptUse, MethodUse
from intarsia.composition.method import check_request, methods
from intarsia.composition.probing import Sight
from intarsia.composition.regions import Shares
from intarsia.composition.tokens import positions
from intarsia.pipelines.attach import Attachment, attached
from intarsia.pipelines.errors import InputError
from torch import Tensor, nn

Tiny = Callable[..., Path]
FAMILIES = ("sd15", "sdxl", "sd3", "flux1")
FREEFUSE = methods()["freefuse"]
BARE: dict[str, Any] = {"background": "none", "towards": 0.0, "against": 0.0}


def made(tiny: Tiny, family: str, count: int = 2, **changes: Any) -> Composition:  # noqa: ANN401
    return fakes.composition(fakes.tiny_model(tiny, family), count, **changes)


def masks_of(composition: Composition, **options: Any) -> dict[str, Tensor]:  # noqa: ANN401
    with prepared(composition, FREEFUSE, FREEFUSE.options.parse(options)) as drawing:
        return dict(drawing.masks())


@pytest.mark.parametrize("family", FAMILIES)
def test_one_concept_that_has_everything_is_merge(tiny: Tiny, family: str) -> None:
    picture = made(tiny, family, 1)
    merged, other = fakes.latents(picture, "merge"), fakes.plain(picture)
    torch.testing.assert_close(fakes.latents(picture, "freefuse", **BARE), merged, rtol=1e-4, atol=1e-4)
    assert (merged - other).abs().max() > 0.05, "the adapter would not matter"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_masks_part_the_picture_and_the_facts_tell_their_size(tiny: Tiny, family: str) -> None:
    picture = made(tiny, family, 3)
    options = FREEFUSE.options.parse({"background": "none"})
    with prepared(picture, FREEFUSE, options) as drawing:
        masks, facts = drawing.masks(), drawing.facts()
    assert list(masks) == list(picture.names)
    torch.testing.assert_close(torch.stack(list(masks.values())).sum(0), torch.ones_like(masks["apple"]))
    assert [facts[f"part of {name}"] for name in picture.names] == [float(mask.mean()) for mask in masks.values()]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_leaves_noise_and_sampler_as_they_would_be(tiny: Tiny, family: str) -> None:
    picture = made(tiny, family, scheduler="default")
    before = fakes.latents(picture, "merge")
    merge = methods()["merge"]
    with prepared(picture, merge, merge.options()) as drawing:
        noise, clocks = drawing.work.latents.clone(), drawing.work.timesteps.clone()
    with prepared(picture, FREEFUSE, FREEFUSE.options()) as drawing:
        assert torch.equal(drawing.work.latents, noise) and torch.equal(drawing.work.timesteps, clocks)
        assert getattr(drawing.work.scheduler, "step_index", None) is None
        assert not getattr(drawing.work.scheduler, "ets", [])
    assert torch.equal(fakes.latents(picture, "merge"), before)


@pytest.mark.parametrize(("family", "asked", "seen"), [("sdxl", 3, 3), ("sd15", 1, 1), ("flux1", 50, 4)])
def test_the_probe_runs_as_many_steps_as_asked_with_the_styles_alone(
    tiny: Tiny, family: str, asked: int, seen: int
) -> None:
    model = fakes.tiny_model(tiny, family)
    style = Attachment("style", fakes.random_adapter(model, 9))
    picture = made(tiny, family, styles=(style,))
    calls: list[bool] = []

    def count(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        calls.append(True)

    handle = model.denoiser.register_forward_hook(count)
    try:
        masks = masks_of(picture, probe=asked)
    finally:
        handle.remove()
    assert len(calls) == seen
    stronger = replace(picture, concepts=fakes.with_seeds(picture, 11, 12).concepts)
    assert all(torch.equal(mask, masks[name]) for name, mask in masks_of(stronger, probe=asked).items())


def test_the_styles_act_in_the_probe(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fakes.tiny_model(tiny, "sdxl")
    active: list[frozenset[str]] = []
    plain = probing.probed

    def spy(composition: Any, hung: Any, *rest: Any) -> Sight:  # noqa: ANN401
        active.append(hung.active)
        return plain(composition, hung, *rest)

    monkeypatch.setattr(probing, "probed", spy)
    style = Attachment("style", fakes.random_adapter(model, 9))
    masks_of(made(tiny, "sdxl", styles=(style,)))
    masks_of(made(tiny, "sdxl"))
    assert active == [{"style"}, frozenset()]


def plant(monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Let a probe find two concepts and the end of the prompt; gives their places and scores."""
    height, width = 8, 8
    place = torch.zeros(3, height, width)
    place[0, 1:5, 0:3], place[1, 3:7, 5:8] = 1, 1  # closing would fill a gap of one cell
    place[2] = 1 - place.sum(0)
    flat = place.flatten(1)
    scores = flat + torch.rand(3, height * width, generator=torch.Generator().manual_seed(0)) * 0.1

    def planted(composition: object, hung: object, work: object, probe: object, words: Sequence[object]) -> Sight:
        assert len(words) == 3
        return Sight(scores, (flat.T.contiguous(),), (height, width))

    monkeypatch.setattr(probing, "probed", planted)
    return place, scores


@pytest.mark.parametrize("family", ["sdxl", "flux1"])
def test_planted_places_come_back_as_masks(tiny: Tiny, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, scores = plant(monkeypatch)
    plain, asked = routing.likeness, list[Tensor]()

    def spy(features: Sequence[Tensor], scores: Tensor, share: float) -> Tensor:
        asked.append(scores)
        return plain(features, scores, share)

    monkeypatch.setattr(routing, "likeness", spy)
    masks = masks_of(made(tiny, family, size=(128, 128)))
    assert list(masks) == ["apple", "cat"]
    for mask, wanted in zip(masks.values(), place, strict=False):
        torch.testing.assert_close(mask, wanted)
    first, second, end = scores  # the background is no rival of the concepts, they are its
    wanted = torch.stack([2 * first - second, 2 * second - first, 3 * end - first - second])
    torch.testing.assert_close(asked[0], wanted)


@pytest.mark.parametrize(
    ("family", "path"),
    [("sdxl", "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2"), ("flux1", "transformer_blocks.0.attn.to_q")],
)
def test_each_adapter_is_hung_up_on_the_tokens_of_its_mask(
    tiny: Tiny, family: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, _ = plant(monkeypatch)
    picture = made(tiny, family, size=(128, 128) if family == "flux1" else (64, 64))
    layer: Any = picture.model.denoiser.get_submodule(path)
    cells = 4 if family == "sdxl" else 8
    x = torch.randn(1, cells * cells, layer.in_features, generator=torch.Generator().manual_seed(0))
    wanted = layer(x)
    masks = Shares(picture.names, place[:2]).on((cells, cells)).flatten(1)
    for concept, mask in zip(picture.concepts, masks, strict=True):
        factors: Any = concept.attachment.adapter.layers[f"{picture.model.spec.denoiser}.{path}"]
        wanted = wanted + mask[:, None] * factors.scale * (x @ factors.down.T @ factors.up.T)
    with prepared(picture, FREEFUSE, FREEFUSE.options()):
        found = layer(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (found - layer(x)).abs().max() > 0.01


def routes(picture: Composition, hung: Any, masks: Tensor) -> tuple[Routes, Tensor, list[list[int]]]:  # noqa: ANN401
    words = [positions(picture.model, picture.prompt, concept.phrase) for concept in picture.concepts]
    (work,) = picture.begin([picture.encode(hung, picture.prompt, hung.names)])
    text = network_of(work).text
    unet = picture.model.spec.denoiser == "unet"
    return Routes(hung, Shares(picture.names, masks), words, text, unet), text, words


LAYERS = {
    "sdxl": {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "image",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q": "image",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": "text",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v": "text",
        "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2": "image",
    },
    "sd3": {
        "transformer_blocks.0.attn.to_q": "image",
        "transformer_blocks.0.attn.add_k_proj": "text",
        "transformer_blocks.0.attn.to_add_out": "text",
        "transformer_blocks.0.ff_context.net.0.proj": "text",
        "transformer_blocks.0.ff.net.0.proj": "image",
    },
    "flux1": {
        "transformer_blocks.0.attn.to_out.0": "image",
        "transformer_blocks.0.attn.add_v_proj": "text",
        "transformer_blocks.0.ff_context.net.0.proj": "text",
        "single_transformer_blocks.0.attn.to_q": "both",
        "single_transformer_blocks.0.proj_mlp": "both",
        "single_transformer_blocks.0.proj_out": "both",
    },
}  # fmt: skip


@pytest.mark.parametrize(("family", "path"), [(name, path) for name, found in LAYERS.items() for path in found])
def test_an_adapter_touches_its_own_tokens_and_no_words_of_others(tiny: Tiny, family: str, path: str) -> None:
    picture = made(tiny, family)
    kind, layer = LAYERS[family][path], picture.model.denoiser.get_submodule(path)
    masks = torch.zeros(2, *picture.grid)
    masks[0, :, : picture.grid[1] // 2], masks[1, : picture.grid[0] // 2, picture.grid[1] // 2 :] = 1, 1
    with attached(picture.model.components, picture.attachments) as hung:
        made_routes, text, words = routes(picture, hung, masks)
        grid = (picture.grid[0] // 2, picture.grid[1] // 2) if family == "sdxl" else picture.grid
        here = Shares(picture.names, masks).on(grid).flatten(1) > 0  # (concepts, image)
        halves, read = len(text), text.shape[1]
        tokens = {"image": here.shape[1], "text": read, "both": read + here.shape[1]}[kind]
        x = torch.randn(halves, tokens, layer.weight.shape[1], generator=torch.Generator().manual_seed(0))
        hung.activate(())
        plain = layer(x)
        for index, name in enumerate(picture.names):
            hung.activate([name])
            alone = layer(x)
            hung.spread(lambda at, output, name=name: {name: made_routes.gains(at, output)[name]})
            change = (layer(x) - plain).abs().sum(-1) > 1e-6  # (halves, tokens)
            allowed = torch.ones(halves, read, dtype=torch.bool)
            allowed[-1, words[1 - index]] = False
            wanted = {"text": allowed, "image": here[index].expand(halves, -1)}
            expected = torch.cat([wanted["text"], wanted["image"]], 1) if kind == "both" else wanted[kind]
            assert torch.equal(change, expected)
            torch.testing.assert_close(layer(x)[change], alone[change], rtol=1e-4, atol=1e-5)


def test_convolutions_have_masks_and_layers_of_the_clock_a_part(tiny: Tiny) -> None:
    picture = made(tiny, "sdxl", styles=(Attachment("style", fakes.random_adapter(fakes.tiny_model(tiny, "sdxl"), 9)),))
    masks = torch.zeros(2, 8, 8)
    masks[0, :, :2], masks[1, :, 4:] = 1, 1
    with attached(picture.model.components, picture.attachments) as hung:
        made_routes, _, _ = routes(picture, hung, masks)
        image = made_routes.gains("unet.down_blocks.0.resnets.0.conv1", torch.zeros(2, 16, 4, 4))
        clock = made_routes.gains("unet.time_embedding.linear_1", torch.zeros(2, 16))
    assert torch.equal(torch.as_tensor(image["apple"]), Shares(("a", "b"), masks).on((4, 4))[0])
    assert (clock["apple"], clock["cat"]) == (0.25, 0.5)
    assert image["style"] == clock["style"] == 1


def test_a_word_of_two_concepts_is_no_word_of_another(tiny: Tiny) -> None:
    picture = made(tiny, "sdxl")
    text, masks = torch.zeros(2, 6, 8), torch.ones(2, 8, 8)
    with attached(picture.model.components, picture.attachments) as hung:
        shared = Routes(hung, Shares(picture.names, masks), [[1, 2], [2, 3]], text, unet=True)
        gains = shared.gains("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", text)
    allowed = torch.stack([torch.as_tensor(gains[name])[-1, :, 0] for name in picture.names])
    assert allowed.tolist() == [[1, 1, 1, 0, 1, 1], [1, 0, 1, 1, 1, 1]]


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux1"])
def test_the_bias_leans_to_own_words_and_from_others_where_the_prompt_is(tiny: Tiny, family: str) -> None:
    picture = made(tiny, family)
    masks = torch.zeros(2, *picture.grid)
    masks[0, :, 0], masks[1, :, 1] = 1, 1
    with attached(picture.model.components, picture.attachments) as hung:
        made_routes, text, words = routes(picture, hung, masks)
    tokens = masks[0].numel()
    bias = made_routes.leaning(tokens, 2.0, 4.0)
    assert bias.shape == (len(text), 1, tokens, text.shape[1])
    assert len(text) == 1 or not bias[:-1].any()
    for token in range(tokens):
        owner = int(masks.flatten(1)[:, token].argmax()) if masks.flatten(1)[:, token].any() else None
        for word in range(text.shape[1]):
            whose = next((index for index in range(2) if word in words[index]), None)
            wanted = 0.0 if owner is None or whose is None else 2.0 if owner == whose else -4.0
            assert float(bias[-1, 0, token, word]) == wanted
    if family != "sdxl":
        joint, read = made_routes.joint_bias(2.0, 4.0), text.shape[1]
        assert torch.equal(joint[:, :, read:, :read], bias) and torch.equal(joint[:, :, :read, read:], bias.mT)
        assert not joint[:, :, :read, :read].any() and not joint[:, :, read:, read:].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bias_matters_and_one_of_nothing_does_not(tiny: Tiny, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = made(tiny, family)
    bare = fakes.latents(picture, "freefuse", **BARE)
    assert (fakes.latents(picture, "freefuse", background="none") - bare).abs().max() > 1e-4
    plain = Routes.leaning

    def upright(self: Routes, tokens: int, towards: float, against: float) -> Tensor:
        assert towards == 2.0 and against == 4.0
        return plain(self, tokens, 0.0, 0.0)

    monkeypatch.setattr(Routes, "leaning", upright)
    nothing = fakes.latents(picture, "freefuse", background="none")
    torch.testing.assert_close(nothing, bare, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("background", ["end", "words", "mean"])
def test_a_heavier_background_leaves_less_to_the_concepts(tiny: Tiny, background: str) -> None:
    picture = made(tiny, "sd15", size=(128, 128))
    options = {"background": background, "scene": "a dog", "clean": 1}
    light = sum(mask.sum() for mask in masks_of(picture, **options, behind=0.0).values())
    some = sum(mask.sum() for mask in masks_of(picture, **options, behind=1.02).values())
    heavy = sum(mask.sum() for mask in masks_of(picture, **options, behind=9.0).values())
    assert light == 64 and 0 < some < 64 and heavy < some


def request(second: str = "a cat", **options: Any) -> ComposeRequest:  # noqa: ANN401
    uses = (ConceptUse(adapter="a", prompt="an apple"), ConceptUse(adapter="b", prompt=second))
    return ComposeRequest(
        prompt="an apple and a cat on grass", concepts=uses, methods=(MethodUse(method="freefuse", options=options),)
    )


def test_concepts_must_differ_in_words_and_the_background_s_must_be_there() -> None:
    assert check_request(request(background="words", scene="on grass"), "sdxl")
    with pytest.raises(InputError, match='both have "An apple"'):
        check_request(request("An apple"), "sdxl")
    with pytest.raises(InputError, match='does not hold the background\'s words "at sea"'):
        check_request(request(background="words", scene="at sea"), "sdxl")
    with pytest.raises(InputError, match="The background has no words"):
        check_request(request(background="words"), "sdxl")
