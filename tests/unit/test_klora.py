"""K-LoRA: sums held against dense matrices, the choice of every layer and step against the formula, limit cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import composition_fakes as fakes
import pytest
import torch
from intarsia.composition import magnitudes as measured
from intarsia.composition.composition import Composition
from intarsia.composition.draw import moments, prepared
from intarsia.composition.layout import ComposeRequest, ConceptUse, MethodUse
from intarsia.composition.magnitudes import Magnitudes, is_attention, magnitudes, ratio_of, top_and_total
from intarsia.composition.method import check_request, methods
from intarsia.composition.methods.klora import KLoraOptions, contents, favour
from intarsia.pipelines.adapter_types import AdapterFile, LowRank
from intarsia.pipelines.attach import Branches
from intarsia.pipelines.errors import AdapterError, InputError
from intarsia.pipelines.events import CancelToken
from intarsia.pipelines.kinds.difference import Difference
from intarsia.pipelines.requests import AdapterUse
from torch import Tensor

Tiny = Callable[..., Path]
FAMILIES = ("sd15", "sdxl", "sd3", "flux1")
METHOD = methods()["klora"]


def pair_of(tiny: Tiny, family: str, ranks: tuple[int, int] = (4, 3), text: bool = False) -> Composition:
    """A content and a style of two ranks; the style's factors are larger, so that gamma matters."""
    model = fakes.tiny_model(tiny, family)
    made = fakes.composition(model, 2)
    concepts = tuple(
        replace(
            concept,
            attachment=replace(
                concept.attachment, adapter=fakes.random_adapter(model, 11 + index, rank, text, 0.2 + 0.2 * index)
            ),
        )
        for index, (concept, rank) in enumerate(zip(made.concepts, ranks, strict=True))
    )
    return replace(made, concepts=concepts)


def only(made: Composition, name: str, keep: Callable[[str], bool]) -> Tensor:
    """Draw with some layers of one adapter, hung on in the ordinary way: the oracle."""
    (concept,) = [concept for concept in made.concepts if concept.name == name]
    adapter = concept.attachment.adapter
    cut = replace(adapter, layers={path: layer for path, layer in adapter.layers.items() if keep(path)})
    return fakes.plain(
        replace(made, concepts=(replace(concept, attachment=replace(concept.attachment, adapter=cut)),)), name
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_equal_those_of_dense_matrices(tiny: Tiny, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "ENTRIES", 100)  # so that every matrix comes in several groups of rows
    made = pair_of(tiny, family)
    content, style = (concept.attachment for concept in made.concepts)
    found = magnitudes(made.model.components, content, style, CancelToken())
    assert set(found.content) == {path for path in content.adapter.layers if is_attention(path)} == set(found.style)
    ratios: list[float] = []
    for path in found.content:
        one, other = (
            (layer.scale * layer.up @ layer.down).abs().flatten()
            for attachment in (content, style)
            if isinstance(layer := attachment.adapter.layers[path], LowRank)
        )
        assert found.content[path] == pytest.approx(float(one.sort(descending=True).values[:12].sum()), rel=1e-5)
        assert found.style[path] == pytest.approx(float(other.sort(descending=True).values[:12].sum()), rel=1e-5)
        ratios.append(float(one.sum() / other.sum()))
    mean = sum(ratios) / len(ratios)
    kept = [ratio for ratio in ratios if ratio <= 3 * mean]
    assert found.ratio == pytest.approx(sum(kept) / len(kept), rel=1e-5)


def test_groups_of_rows_and_more_wanted_than_there_are_give_the_same_sums() -> None:
    matrix = torch.randn(13, 7, generator=torch.Generator().manual_seed(0))
    sizes = matrix.abs().flatten().sort(descending=True).values
    for rows in (1, 4, 13):
        top, total = top_and_total(iter(matrix.split(rows)), 20)
        assert top == pytest.approx(float(sizes[:20].sum()), rel=1e-6)
        assert total == pytest.approx(float(sizes.sum()), rel=1e-6)
        assert top_and_total(iter(matrix.split(rows)), 1000)[0] == pytest.approx(float(sizes.sum()), rel=1e-6)


def test_a_ratio_beyond_three_times_the_mean_does_not_count() -> None:
    assert ratio_of([1.0, 1.2, 0.8, 1.0]) == pytest.approx(1.0)
    assert ratio_of([1.0, 1.2, 0.8, 1.0, 50.0]) == pytest.approx(1.0)


def test_the_style_is_favoured_as_the_patterns_say() -> None:
    s, star = KLoraOptions(alpha=1.5, beta=0.5), KLoraOptions(alpha=2.0, pattern="s*", beta=9.0)
    assert [favour(t, s) for t in (0, 0.5, 0.9)] == pytest.approx([0.5, 1.25, 1.85])
    assert [favour(t, star) for t in (0, 0.1, 0.2, 0.9)] == pytest.approx([1.7, 1.9, 0.1, 1.5])
    assert favour(0.5, KLoraOptions(alpha=0, pattern="s*")) == 0


@pytest.mark.parametrize("pattern", ["s", "s*"])
def test_what_every_layer_takes_at_every_step_is_what_the_quotient_says(
    tiny: Tiny, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = replace(pair_of(tiny, "sdxl"), steps=6)
    plans: list[dict[str, frozenset[str]]] = []
    paths: dict[str, tuple[str, ...]] = {}
    spread = Branches.spread

    def recording(self: Branches, gains: Callable[[str, Tensor], dict[str, float]]) -> None:
        paths.update(self.paths)
        plans.append({path: frozenset(gains(path, torch.empty(0))) for path in self.paths})
        spread(self, gains)

    monkeypatch.setattr(Branches, "spread", recording)
    fakes.latents(made, "klora", pattern=pattern, alpha=1.5, beta=0.5)
    found: Magnitudes = made.memo["klora"]
    assert len(plans) == 6
    seen: set[str] = set()
    for index, plan in enumerate(plans):
        t = index / 6
        f = 1.5 * t + 0.5 if pattern == "s" else (1.5 * t + 0.85 * 1.5) % 1.5
        for path, names in paths.items():
            if not is_attention(path):
                assert plan[path] == set(names) == {"apple", "cat"}
                continue
            quotient = (found.content[path] / found.ratio) / (found.style[path] * f)
            assert plan[path] == {"apple" if quotient > 1 else "cat"}
            seen |= plan[path]
    assert seen == {"apple", "cat"}


@pytest.mark.parametrize("family", FAMILIES)
def test_at_either_end_only_one_adapters_attention_acts(tiny: Tiny, family: str) -> None:
    made = pair_of(tiny, family)
    content = fakes.latents(made, "klora", alpha=0, beta=0, others="none")
    style = fakes.latents(made, "klora", alpha=0, beta=100, others="none")
    torch.testing.assert_close(content, only(made, "apple", is_attention), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(style, only(made, "cat", is_attention), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(content, style, atol=1e-3)
    assert not torch.allclose(content, only(made, "apple", lambda path: True), atol=1e-3)


def test_other_layers_add_both(tiny: Tiny) -> None:
    """Two contents of the same attention, where the choice does not matter: what is left is Merge of the rest."""
    made = pair_of(tiny, "sdxl", ranks=(4, 4))
    one, other = (concept.attachment.adapter for concept in made.concepts)
    same = replace(other, layers={p: one.layers[p] if is_attention(p) else layer for p, layer in other.layers.items()})
    second = replace(made.concepts[1], attachment=replace(made.concepts[1].attachment, adapter=same))
    drawn = fakes.latents(replace(made, concepts=(made.concepts[0], second)), "klora")
    rest = replace(same, layers={p: layer for p, layer in same.layers.items() if not is_attention(p)})
    third = replace(made.concepts[1], attachment=replace(made.concepts[1].attachment, adapter=rest))
    merged = fakes.latents(replace(made, concepts=(made.concepts[0], third)), "merge")
    torch.testing.assert_close(drawn, merged, atol=1e-5, rtol=1e-5)


def test_a_style_of_the_layout_is_the_second_of_the_pair(tiny: Tiny) -> None:
    made = pair_of(tiny, "sdxl", text=True)
    styled = replace(made, concepts=made.concepts[:1], styles=(made.concepts[1].attachment,))
    assert torch.equal(fakes.latents(made, "klora"), fakes.latents(styled, "klora"))


def test_weights_do_not_change_the_choice_but_factors_of_blocks_do(tiny: Tiny) -> None:
    made = pair_of(tiny, "sdxl")
    content, style = (concept.attachment for concept in made.concepts)

    def found(weight: float, blocks: dict[str, float]) -> Magnitudes:
        heavy = replace(content, weight=weight, blocks=blocks)
        return magnitudes(made.model.components, heavy, style, CancelToken())

    plain, light = found(1.0, {}), found(1.0, {"unet.mid_block": -0.1})
    assert contents(found(3.0, {}), 1.0) == contents(plain, 1.0) != contents(light, 1.0)
    for path, top in plain.content.items():
        assert light.content[path] == pytest.approx(top * (0.1 if path.startswith("unet.mid_block") else 1))
    assert light.ratio < plain.ratio


def test_facts_tell_the_share_of_layers_that_take_the_content(tiny: Tiny) -> None:
    made = replace(pair_of(tiny, "sdxl"), steps=8)
    told: list[tuple[float, float]] = []
    with prepared(made, METHOD, KLoraOptions()) as drawing:
        for moment in moments(made, drawing):
            told.append((drawing.facts()["favour"], drawing.facts()["content"]))
            share = len(contents(made.memo["klora"], favour(moment.stepped.index / 8, KLoraOptions())))
            assert told[-1][1] == pytest.approx(share / len(made.memo["klora"].content))
    assert [favoured for favoured, _ in told] == pytest.approx([0.5 + 1.5 * index / 8 for index in range(8)])
    assert told[0][1] > told[-1][1]


def _without_attention(adapter: AdapterFile) -> AdapterFile:
    return replace(adapter, layers={p: layer for p, layer in adapter.layers.items() if not is_attention(p)})


def _without_ranks(adapter: AdapterFile) -> AdapterFile:
    dense = {
        path: Difference(layer.scale * layer.up @ layer.down, None)
        for path, layer in adapter.layers.items()
        if isinstance(layer, LowRank) and is_attention(path)
    }
    return replace(adapter, layers=dense)


@pytest.mark.parametrize(
    ("change", "words"), [(_without_attention, "no attention layer in common"), (_without_ranks, "has no ranks")]
)
def test_adapters_it_cannot_compare_are_refused_in_words(
    tiny: Tiny, change: Callable[[AdapterFile], AdapterFile], words: str
) -> None:
    made = pair_of(tiny, "sdxl")
    changed = replace(
        made.concepts[0],
        attachment=replace(made.concepts[0].attachment, adapter=change(made.concepts[0].attachment.adapter)),
    )
    before = fakes.state(made.model)
    with pytest.raises(AdapterError, match=words):
        fakes.latents(replace(made, concepts=(changed, made.concepts[1])), "klora")
    assert fakes.state(made.model) == before


@pytest.mark.parametrize(("concepts", "styles"), [(1, 0), (2, 1), (1, 2)])
def test_anything_but_a_pair_is_refused_in_words(concepts: int, styles: int) -> None:
    request = ComposeRequest(
        concepts=tuple(ConceptUse(adapter=f"a{i}", prompt=f"thing{i}") for i in range(concepts)),
        styles=tuple(AdapterUse(adapter=f"s{i}") for i in range(styles)),
        methods=(MethodUse(method="klora"),),
    )
    with pytest.raises(InputError, match=f"there are {concepts + styles} adapters"):
        check_request(request, "sdxl")
