"""The orthogonal sum: bases by their properties, crosstalk against dense matrices, and what headers are believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import composition_fakes as fakes
import pytest
import torch
from intarsia.composition.composition import Composition
from intarsia.composition.crosstalk import crosstalk
from intarsia.composition.draw import moments, prepared
from intarsia.composition.method import methods
from intarsia.composition.methods.orthogonal import OrthogonalOptions
from intarsia.pipelines.adapter_file import read_adapter, write_adapter
from intarsia.pipelines.adapter_types import AdapterFile, LowRank
from intarsia.pipelines.attach import Attachment, attached
from intarsia.pipelines.bases import KEY, Basis, columns_of, fingerprint, free_columns
from intarsia.pipelines.errors import InputError
from intarsia.pipelines.events import CancelToken
from intarsia.pipelines.kinds.difference import Difference
from torch import Tensor, nn

Tiny = Callable[..., Path]
FAMILIES = ("sd15", "sdxl", "sd3", "flux1")


def in_basis(adapter: AdapterFile, basis: Basis) -> AdapterFile:
    """The same adapter with the columns of a basis in place of its own A."""
    layers: dict[str, LowRank] = {}
    for path, layer in adapter.layers.items():
        assert isinstance(layer, LowRank)
        down = columns_of(layer.down[0].numel(), basis.seed, basis.columns).T.float()
        layers[path] = replace(layer, down=down.reshape(layer.down.shape))
    return replace(adapter, layers=layers, metadata={KEY: basis.text()})


def pair_in(tiny: Tiny, family: str, *columns: tuple[int, int]) -> Composition:
    made = fakes.composition(fakes.tiny_model(tiny, family), len(columns))
    concepts = tuple(
        replace(
            concept,
            attachment=replace(
                concept.attachment, adapter=in_basis(concept.attachment.adapter, Basis(1, span, fingerprint(1)))
            ),
        )
        for concept, span in zip(made.concepts, columns, strict=True)
    )
    return replace(made, concepts=concepts)


# The bases


@pytest.mark.parametrize("width", [20, 64, 320])
def test_columns_are_orthonormal_and_disjoint_blocks_orthogonal(width: int) -> None:
    one, other = columns_of(width, 3, (0, 8)), columns_of(width, 3, (8, 20))
    assert one.shape == (width, 8) and other.shape == (width, 12)
    torch.testing.assert_close(one.T @ one, torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(other.T @ other, torch.eye(12, dtype=torch.float64))
    assert float((one.T @ other).abs().max()) < 1e-12
    assert float((one.T @ columns_of(width, 4, (8, 20))).abs().max()) > 0.05


def test_columns_do_not_depend_on_how_many_are_made() -> None:
    whole = columns_of(37, 5, (0, 37))
    for span in ((0, 3), (3, 17), (36, 37)):
        torch.testing.assert_close(columns_of(37, 5, span), whole[:, slice(*span)], atol=1e-12, rtol=0)


def test_signs_are_ours_and_not_those_of_a_builds_qr(monkeypatch: pytest.MonkeyPatch) -> None:
    before, plain = columns_of(16, 2, (0, 5)), torch.linalg.qr
    flips = torch.tensor([1.0, -1, -1, 1, -1], dtype=torch.float64)

    def flipped(matrix: Tensor) -> tuple[Tensor, Tensor]:
        q, r = plain(matrix)
        return q * flips, flips[:, None] * r

    monkeypatch.setattr(torch.linalg, "qr", flipped)
    torch.testing.assert_close(columns_of(16, 2, (0, 5)), before)


def test_free_columns_fill_gaps_and_never_overlap() -> None:
    taken: list[Basis] = []
    for rank in (4, 8, 4):
        taken.append(free_columns(taken, 7, rank, 20))
    assert [basis.columns for basis in taken] == [(0, 4), (4, 12), (12, 16)]
    del taken[1]
    assert free_columns(taken, 7, 6, 20).columns == (4, 10)
    assert free_columns(taken, 7, 9, 25).columns == (16, 25)
    assert free_columns(taken, 8, 4, 20).columns == (0, 4)
    stranger = Basis(7, (0, 4), "another generator")
    assert free_columns([stranger], 7, 4, 20).columns == (0, 4)
    with pytest.raises(InputError, match="No 9 columns of basis 7"):
        free_columns(taken, 7, 9, 24)
    with pytest.raises(InputError, match="has no column 20"):
        columns_of(20, 7, (16, 21))


def test_a_header_says_the_basis_and_nonsense_says_none(tmp_path: Path, tiny: Tiny) -> None:
    basis = Basis(4, (8, 12), fingerprint(4))
    adapter = in_basis(fakes.random_adapter(fakes.tiny_model(tiny, "sdxl"), 1, text=False), basis)
    layers = {path: layer for path, layer in adapter.layers.items() if isinstance(layer, LowRank)}
    write_adapter(tmp_path / "x.safetensors", layers, adapter.metadata)
    shapes = {path: (layer.up.shape[0], *layer.down.shape[1:]) for path, layer in layers.items()}
    assert Basis.of(read_adapter(tmp_path / "x.safetensors", shapes).metadata) == basis
    good = basis.text()
    for text in ("", "{", "[]", "null", good.replace("8", '"8"'), good.replace("[8, 12]", "[12, 8]"), '{"seed": 4}'):
        assert Basis.of({KEY: text}) is None
    assert Basis.of({}) is None


def test_columns_are_shared_only_within_the_same_matrices() -> None:
    one = Basis(1, (0, 8), "a")
    assert one.shared_with(Basis(1, (6, 12), "a")) == 2 == Basis(1, (6, 12), "a").shared_with(one)
    assert one.shared_with(Basis(1, (8, 12), "a")) == 0
    assert one.shared_with(Basis(2, (0, 8), "a")) == 0 == one.shared_with(Basis(1, (0, 8), "b"))


# Crosstalk


@pytest.mark.parametrize("family", FAMILIES)
def test_crosstalk_equals_that_of_dense_matrices(tiny: Tiny, family: str) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, family), 3)
    third = made.concepts[2].attachment
    path = next(iter(third.adapter.layers))
    layer = third.adapter.layers[path]
    assert isinstance(layer, LowRank)
    shape = (layer.up.shape[0], *layer.down.shape[1:])
    dense = replace(third.adapter, layers={**third.adapter.layers, path: Difference(torch.randn(shape), None)})
    attachments = [*(concept.attachment for concept in made.concepts[:2]), replace(third, adapter=dense)]
    found = crosstalk(made.model.components, attachments, CancelToken())
    assert [pair.names for pair in found] == [("apple", "cat"), ("apple", "dog"), ("cat", "dog")]
    named = {attachment.name: attachment.adapter.layers for attachment in attachments}
    for pair in found:
        assert set(pair.layers) == set(named["apple"])
        above = below = 0.0
        for path, value in pair.layers.items():
            one, other = (_dense(named[name][path], shape).flatten(1).double() for name in pair.names)
            top, bottom = (one @ other.T).norm(), one.norm() * other.norm()
            assert value == pytest.approx(float(top / bottom), rel=1e-4)
            above, below = above + float(top) ** 2, below + float(bottom) ** 2
        assert pair.overall == pytest.approx((above / below) ** 0.5, rel=1e-4)


def _dense(layer: object, shape: tuple[int, ...]) -> Tensor:
    if isinstance(layer, Difference):
        assert layer.weight is not None
        return layer.weight
    assert isinstance(layer, LowRank)
    return layer.scale * layer.up.flatten(1) @ layer.down.flatten(1)


def test_an_adapter_overlaps_with_itself_as_its_spectrum_says(tiny: Tiny) -> None:
    """Of rank one the overlap is whole."""
    made = fakes.composition(fakes.tiny_model(tiny, "sdxl"), 1)
    adapter = fakes.random_adapter(made.model, 4, rank=1)
    (pair,) = crosstalk(made.model.components, [Attachment("a", adapter), Attachment("b", adapter)], CancelToken())
    assert pair.overall == pytest.approx(1) and min(pair.layers.values()) == pytest.approx(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_in_the_span_of_one_basis_know_nothing_of_the_other_adapter(tiny: Tiny, family: str) -> None:
    made = pair_in(tiny, family, (0, 4), (4, 8))
    one, other = (concept.attachment for concept in made.concepts)
    generator = torch.Generator().manual_seed(6)
    checked = 0
    with attached(made.model.components, [one, other]) as hung, torch.no_grad():
        for path, layer in one.adapter.layers.items():
            root, _, place = path.partition(".")
            module = made.model.modules[root].get_submodule(place)
            assert isinstance(layer, LowRank)
            if not isinstance(module, nn.Linear):
                continue
            x = torch.randn(2, 3, 4, generator=generator) @ layer.down  # (2, 3, in), in the span of B_1
            hung.activate([one.name])
            alone = module(x)
            hung.activate([other.name])
            nothing = module(x)
            hung.activate(hung.names)
            torch.testing.assert_close(module(x), alone, atol=1e-5, rtol=1e-5)
            hung.activate([])
            torch.testing.assert_close(nothing, module(x), atol=1e-5, rtol=1e-5)
            assert not torch.allclose(alone, nothing, atol=1e-2)
            checked += 1
    assert checked > 5


def test_disjoint_blocks_have_no_crosstalk_and_shared_ones_have(tiny: Tiny) -> None:
    components = fakes.tiny_model(tiny, "sdxl").components

    def measured(*columns: tuple[int, int]) -> float:
        made = pair_in(tiny, "sdxl", *columns)
        return crosstalk(components, made.attachments, CancelToken())[0].overall

    assert measured((0, 4), (4, 8)) < 1e-6
    assert measured((0, 4), (2, 6)) > 0.1


# The method


def test_it_draws_the_exact_sum_at_its_scale(tiny: Tiny) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, "sdxl"), 3)
    assert torch.equal(fakes.latents(made, "orthogonal"), fakes.latents(made, "merge"))
    assert torch.equal(fakes.latents(made, "orthogonal", scale=0.6), fakes.latents(made, "merge", scale=0.6))


def told(made: Composition, **options: bool) -> tuple[dict[str, float], tuple[str, ...]]:
    with prepared(made, methods()["orthogonal"], OrthogonalOptions(**options)) as drawing:  # pyright: ignore[reportArgumentType]
        next(moments(made, drawing))
        return dict(drawing.facts()), drawing.notices


def test_bases_are_told_and_believed_only_as_far_as_the_numbers_go(tiny: Tiny) -> None:
    facts, notices = told(pair_in(tiny, "sdxl", (0, 4), (4, 8)))
    assert notices == ("apple and cat were trained in disjoint bases.",)
    assert facts["pairs in disjoint bases"] == 1 and facts["crosstalk"] < 1e-6

    facts, notices = told(pair_in(tiny, "sdxl", (0, 4), (2, 6)))
    assert notices[0].startswith("apple and cat share 2 columns of a basis; they overlap by 0.")
    assert facts["pairs in disjoint bases"] == 0

    plain = fakes.composition(fakes.tiny_model(tiny, "sdxl"), 2)
    facts, notices = told(plain)
    assert notices[0].startswith("No basis is recorded for apple and cat; apple and cat overlap by 0.")
    assert facts["crosstalk of apple and cat"] == facts["crosstalk"] > 0

    liar = [replace(concept.attachment.adapter, metadata={KEY: Basis(1, (4 * i, 4 * i + 4), "x").text()})
            for i, concept in enumerate(plain.concepts)]  # fmt: skip
    concepts = tuple(
        replace(concept, attachment=replace(concept.attachment, adapter=adapter))
        for concept, adapter in zip(plain.concepts, liar, strict=True)
    )
    facts, notices = told(replace(plain, concepts=concepts, memo={}))
    assert "claim disjoint bases but overlap by 0." in notices[0]
    assert facts["pairs in disjoint bases"] == 0

    other = replace(liar[1], metadata={KEY: Basis(2, (4, 8), "x").text()})
    strangers = replace(concepts[1], attachment=replace(concepts[1].attachment, adapter=other))
    assert "trained in different bases" in told(replace(plain, concepts=(concepts[0], strangers), memo={}))[1][0]


def test_every_layer_is_told_if_asked_for(tiny: Tiny) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, "sd15"), 2)
    few, _ = told(made)
    many, _ = told(made, layers=True)
    paths = {f"crosstalk in {path}" for path in made.concepts[0].attachment.adapter.layers}
    assert set(many) == set(few) | paths and not set(few) & paths
    assert few["crosstalk of the worst layer"] == max(many[name] for name in paths)


def test_one_adapter_alone_has_nothing_to_tell(tiny: Tiny) -> None:
    made = fakes.composition(fakes.tiny_model(tiny, "sd15"), 1)
    assert told(made) == ({}, ())
