"""Merged weights: the same adapter as the merge tool writes, drawn with; exact rules equal Merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import composition_fakes as fakes
import pytest
import torch
from intarsia.composition.composition import Composition
from intarsia.composition.draw import moments, prepared
from intarsia.composition.layout import ComposeRequest, ConceptUse, MethodUse
from intarsia.composition.method import check_request, methods
from intarsia.composition.methods.weights import WeightsOptions, merged
from intarsia.pipelines.adapter_file import read_adapter
from intarsia.pipelines.adapter_types import AdapterFile, LowRank
from intarsia.pipelines.attach import Attachment
from intarsia.pipelines.errors import AdapterError, InputError
from intarsia.pipelines.kinds.difference import Difference
from intarsia.pipelines.tool import Inputs, Source, tools

Tiny = Callable[..., Path]
ALL = ("sd15", "sdxl", "sd3", "flux1")
RULES = ("cat", "svd", "linear", "ties", "dare", "magnitude_prune", "lego")


def made(tiny: Tiny, family: str, count: int = 2, **changes: Any) -> Composition:  # noqa: ANN401
    composition = fakes.composition(fakes.tiny_model(tiny, family), count, **changes)
    weights = (0.7, -0.4, 1.2)
    concepts = tuple(
        replace(concept, attachment=replace(concept.attachment, weight=weight))
        for concept, weight in zip(composition.concepts, weights, strict=False)
    )
    return replace(composition, concepts=concepts)


def canonical(composition: Composition) -> Composition:
    """With the text encoder's layers named as files name them."""
    concepts = [
        replace(c, attachment=replace(c.attachment, adapter=replace(c.attachment.adapter, layers={
            path.replace("text_encoder.encoder", "text_encoder.text_model.encoder"): layer
            for path, layer in c.attachment.adapter.layers.items()
        }))) for c in composition.concepts
    ]  # fmt: skip
    return replace(composition, concepts=tuple(concepts))


def facts(composition: Composition, **options: Any) -> float:  # noqa: ANN401
    method = methods()["weights"]
    with prepared(composition, method, method.options.parse(options)) as drawing:
        for _ in moments(composition, drawing):
            pass
        return drawing.facts()["missing of the sum"]


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("options", [{"rule": "cat"}, {"rule": "svd", "rank": 12}, {"rule": "lego", "rank": 12},
                                     {"rule": "magnitude_prune", "density": 1, "rank": 12},
                                     {"rule": "dare", "density": 1, "rank": 12}])  # fmt: skip
def test_rules_that_lose_nothing_equal_merge(tiny: Tiny, family: str, options: dict[str, Any]) -> None:
    composition = made(tiny, family, 3)
    expected = fakes.latents(composition, "merge")
    found = fakes.latents(composition, "weights", **options)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert facts(composition, **options) < 1e-5


@pytest.mark.parametrize("options", [{"rule": "svd", "rank": 2}, {"rule": "linear"}, {"rule": "ties"},
                                     {"rule": "dare"}, {"rule": "magnitude_prune"}, {"rule": "lego", "rank": 3},
                                     {"rule": "ties", "on": "factors"}])  # fmt: skip
def test_rules_that_lose_something_say_how_much_and_draw_something_else(tiny: Tiny, options: dict[str, Any]) -> None:
    composition = made(tiny, "sdxl")
    expected = fakes.latents(composition, "merge")
    assert (fakes.latents(composition, "weights", **options) - expected).norm() > 1e-3 * expected.norm()
    assert 0.01 < facts(composition, **options) < 2


@pytest.mark.parametrize("family", ["sd15", "flux1"])
@pytest.mark.parametrize("rule", RULES)
def test_the_picture_is_that_of_the_file_the_tool_writes(tiny: Tiny, tmp_path: Path, family: str, rule: str) -> None:
    composition = canonical(made(tiny, family, 2, seed=11))
    own = {"rank": 3} if rule in ("svd", "lego", "ties", "dare", "magnitude_prune") else {}
    own |= {"density": 0.3} if rule in ("ties", "dare", "magnitude_prune") else {}
    tool = tools()[rule.replace("_", "-")]
    sources = tuple(Source(c.name, c.attachment.adapter, c.attachment.weight) for c in composition.concepts)
    work = tool.work(Inputs(sources, {}, seed=11), tool.options.parse({"dtype": "float32"} | own))
    while True:
        try:
            next(work)
        except StopIteration as end:
            result = end.value
            break
    assert result.save is not None
    result.save(tmp_path / "made.safetensors")
    adapter = read_adapter(tmp_path / "made.safetensors")
    in_memory, _ = merged(composition, WeightsOptions.parse({"rule": rule} | own))
    assert in_memory.layers.keys() == adapter.layers.keys()
    concept = replace(composition.concepts[0], attachment=Attachment("made", adapter))
    expected = fakes.latents(replace(composition, concepts=(concept,)), "merge")
    assert torch.equal(fakes.latents(composition, "weights", rule=rule, **own), expected)


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_styles_hang_beside_what_was_merged(tiny: Tiny, family: str) -> None:
    composition = made(tiny, family)
    style = Attachment("style", fakes.random_adapter(composition.model, 9), 0.5, steps=(0.0, 0.5))
    styled = replace(composition, styles=(style,))
    found = fakes.latents(styled, "weights", rule="cat")
    expected = fakes.latents(styled, "merge")
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert (found - fakes.latents(composition, "weights", rule="cat")).norm() > 1e-3 * expected.norm()


def test_only_rules_that_draw_lots_merge_anew_for_another_seed(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from intarsia.composition.methods import weights

    calls: list[int] = []

    def counted(composition: Composition, options: WeightsOptions) -> tuple[AdapterFile, float]:
        calls.append(composition.seed)
        return merged(composition, options)

    monkeypatch.setattr(weights, "merged", counted)
    composition = made(tiny, "sd15")
    for rule, wanted in (("svd", [1]), ("dare", [1, 2]), ("lego", [1, 2])):
        calls.clear()
        for seed in (1, 2, 2):
            fakes.latents(replace(composition, seed=seed), "weights", rule=rule)
        assert calls == wanted, rule
    one, other = (merged(replace(composition, seed=seed), WeightsOptions(rule="dare"))[0] for seed in (1, 2))
    assert any(not torch.equal(one.layers[path].up, other.layers[path].up) for path in one.layers)  # type: ignore[union-attr]


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_that_nobody_changes_stays_unchanged(tiny: Tiny, rule: str) -> None:
    composition = made(tiny, "sd15")
    path = next(iter(composition.concepts[0].attachment.adapter.layers))

    def emptied(adapter: AdapterFile) -> AdapterFile:
        layer = adapter.layers[path]
        assert isinstance(layer, LowRank)
        return replace(adapter, layers={path: replace(layer, up=torch.zeros_like(layer.up))})

    concepts = tuple(
        replace(c, attachment=replace(c.attachment, adapter=emptied(c.attachment.adapter)))
        for c in composition.concepts
    )
    empty = replace(composition, concepts=concepts)
    found = fakes.latents(empty, "weights", rule=rule)
    torch.testing.assert_close(found, fakes.plain(composition), atol=1e-6, rtol=1e-6)


def test_norms_are_refused_and_not_left_out(tiny: Tiny) -> None:
    composition = made(tiny, "sd15")
    adapter = composition.concepts[0].attachment.adapter
    path = "unet.down_blocks.0.resnets.0.norm1"
    layers = dict(adapter.layers) | {path: Difference(torch.ones(16), None)}
    concept = replace(composition.concepts[0], attachment=Attachment("apple", replace(adapter, layers=layers)))
    composition = replace(composition, concepts=(concept, composition.concepts[1]))
    assert torch.isfinite(fakes.latents(composition, "merge")).all()
    with pytest.raises(AdapterError, match="change 1 norms"):
        fakes.latents(composition, "weights", rule="cat")


def test_factors_of_different_ranks_are_refused_by_linear(tiny: Tiny) -> None:
    composition = made(tiny, "sd15")
    wide = replace(
        composition.concepts[0],
        attachment=Attachment("apple", fakes.random_adapter(composition.model, 1, rank=8)),
    )
    composition = replace(composition, concepts=(wide, composition.concepts[1]))
    with pytest.raises(AdapterError, match="ranks 4 and 8"):
        fakes.latents(composition, "weights", rule="linear")


@pytest.mark.parametrize("change", [{"blocks": {"unet": 0.5}}, {"first": 0.5}, {"last": 0.5}])
def test_parts_and_steps_of_a_concept_are_refused(change: dict[str, Any]) -> None:
    uses = (ConceptUse(adapter="a", prompt="a cat", **change), ConceptUse(adapter="b", prompt="a dog"))
    request = ComposeRequest(concepts=uses, methods=(MethodUse(method="weights"),))
    with pytest.raises(InputError, match="takes a as a whole"):
        check_request(request, "sd15")
    plain = request.model_copy(update={"concepts": (ConceptUse(adapter="a", prompt="a cat"), uses[1])})
    assert json.loads(WeightsOptions().to_json()) == check_request(plain, "sd15").methods[0].options
