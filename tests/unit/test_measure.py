"""Measures of an adapter held against dense arithmetic: norms, singular values, effective rank, parts of the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_files import attention, kohya, lora, matrices, write
from intarsia.pipelines.adapter_file import read_adapter
from intarsia.pipelines.block_groups import block_groups
from intarsia.pipelines.dora import Decomposed
from intarsia.pipelines.kind import Layer
from intarsia.pipelines.kinds.difference import Difference
from intarsia.pipelines.kinds.ia3 import Rescaled
from intarsia.pipelines.kinds.loha import Hadamard
from intarsia.pipelines.kinds.lokr import Kronecker
from intarsia.pipelines.kinds.lora import LowRank
from intarsia.pipelines.measure import LayerMeasure, by_group, measure_file, measure_layer, singular_values
from intarsia.pipelines.rows import Rows

DRAW = torch.Generator().manual_seed(3)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=DRAW)


@pytest.mark.parametrize(
    ("up", "down", "weight"),
    [
        ((12, 4), (4, 9), (12, 9)),
        ((6, 8), (8, 5), (6, 5)),  # a rank above both sides
        ((7, 3, 1, 1), (3, 5, 3, 3), (7, 5, 3, 3)),
    ],
)
def test_a_low_rank_layer_is_measured_like_its_dense_change(
    up: tuple[int, ...], down: tuple[int, ...], weight: tuple[int, ...]
) -> None:
    layer = LowRank(normal(*down), normal(*up), alpha=-2.5)
    dense = layer.change(torch.zeros(weight)).weight
    assert dense is not None
    expected = torch.linalg.svdvals(dense.double().flatten(1))
    values = singular_values(layer)
    shared = min(len(values), len(expected))
    assert torch.allclose(values[:shared], expected[:shared], rtol=1e-5, atol=1e-6)
    assert not values[shared:].numel() or float(values[shared:].max()) < 1e-9
    found = measure_layer("unet.mid_block.x", layer)
    assert found.norm == pytest.approx(float(dense.double().norm()), rel=1e-6)
    assert found.strongest == pytest.approx(float(expected[0]), rel=1e-6)
    assert (found.rank, found.alpha, found.kind, found.needs_weight) == (layer.rank, -2.5, "LoRA", False)


def test_the_effective_rank_counts_the_directions_that_matter() -> None:
    basis = torch.linalg.qr(normal(16, 16))[0]
    equal = LowRank(basis[:, :4].T.contiguous(), basis[:, 4:8].contiguous(), alpha=4.0)
    assert measure_layer("a.b", equal).effective_rank == pytest.approx(4.0, rel=1e-5)
    one = LowRank(basis[:, :4].T * torch.tensor([[1.0], [0.0], [0.0], [0.0]]), basis[:, 4:8].contiguous(), alpha=4.0)
    assert measure_layer("a.b", one).effective_rank == pytest.approx(1.0, rel=1e-5)
    none = LowRank(torch.zeros(2, 3), normal(3, 2), alpha=2.0)
    assert (measure_layer("a.b", none).norm, measure_layer("a.b", none).effective_rank) == (0.0, 0.0)


KRON = Kronecker(normal(2, 3), normal(4, 2, 3, 3), scale=0.7, rank=2)
FUSED = Hadamard(normal(8, 2), normal(2, 5), normal(8, 2), normal(2, 5), None, None, alpha=1.0)
DENSE: list[tuple[Layer, tuple[int, ...], str]] = [
    (Hadamard(normal(6, 2), normal(2, 5), normal(6, 2), normal(2, 5), None, None, 4.0), (6, 5), "LoHa"),
    (
        Hadamard(normal(2, 6), normal(2, 5), normal(2, 6), normal(2, 5), normal(2, 2, 3, 3), normal(2, 2, 3, 3), 1.0),
        (6, 5, 3, 3),
        "LoHa",
    ),
    (KRON, (8, 6, 3, 3), "LoKr"),
    (Difference(normal(5, 4), normal(5)), (5, 4), "full difference"),
    (Rows(FUSED, ((2, 4), (6, 7)), (8, 5)), (3, 5), "LoHa"),
]


@pytest.mark.parametrize(("layer", "shape", "kind"), DENSE, ids=lambda value: str(value)[:24])
def test_other_kinds_have_the_norm_of_their_change(layer: Layer, shape: tuple[int, ...], kind: str) -> None:
    dense = layer.change(torch.zeros(shape)).weight
    assert dense is not None
    found = measure_layer("unet.a.b", layer)
    assert found.norm == pytest.approx(float(dense.norm()), rel=1e-5)
    assert found.kind == kind
    assert found.effective_rank is None and not found.needs_weight


def test_alpha_of_a_lokr_is_the_files_own() -> None:
    assert measure_layer("a.b", KRON).alpha == pytest.approx(1.4)
    assert measure_layer("a.b", Difference(None, normal(4))).norm == 0.0


def test_a_dora_says_that_the_weight_is_needed_and_gives_what_turns() -> None:
    inner = LowRank(normal(2, 5), normal(6, 2), alpha=2.0)
    found = measure_layer("a.b", Decomposed(inner, normal(6), True))
    plain = measure_layer("a.b", inner)
    assert (found.kind, found.needs_weight) == ("LoRA with DoRA", True)
    assert (found.norm, found.effective_rank) == (plain.norm, plain.effective_rank)
    assert measure_layer("a.b", Rescaled(normal(6), False, True)) == LayerMeasure(
        "a.b", "(IA)³", 0, None, None, needs_weight=True
    )


def test_a_file_is_measured_by_its_parts(tmp_path: Path) -> None:
    every = matrices("sdxl")
    inner = attention({path: shape for path, shape in every.items() if ".up_blocks.0." in path})
    others = ("up_blocks.0.resnets.0.time_emb_proj", "time_embedding.linear_1")
    chosen = dict(list(inner.items())[:40]) | {path: every[path] for path in every if path.endswith(others)}
    arrays = lora(chosen, kohya, rank=lambda number: 1 + number % 3, alpha=0.5)
    half = {name: array.astype(np.float16) if "down" in name else array for name, array in arrays.items()}
    path = write(tmp_path / "a.safetensors", half)
    found = measure_file(path)
    adapter = read_adapter(path)
    assert {layer.path for layer in found.layers} == set(adapter.layers) == set(chosen)
    assert {layer.dtypes for layer in found.layers} == {("F16", "F32")}
    assert {(layer.rank, layer.alpha) for layer in found.layers} == {(1, 0.5), (2, 0.5), (3, 0.5)}
    outer = [part for part in found.groups if not part.group.inside]
    total = sum(
        float(change.square().sum())
        for name, layer in adapter.layers.items()
        if (change := layer.change(torch.zeros(chosen[name])).weight) is not None
    )
    assert sum(part.norm**2 for part in outer) == pytest.approx(total, rel=1e-5)
    assert {part.group.title for part in found.groups} >= {"up 0", "content", "other layers"}
    assert found.needs_weight == 0


def test_layers_without_a_norm_are_counted() -> None:
    layers = [measure_layer("unet.mid_block.a", Rescaled(normal(3), False, False))]
    (part,) = by_group(layers, block_groups(["unet.mid_block.a"], "sd15"))
    assert (part.norm, part.effective_rank, part.unmeasured) == (0.0, None, 1)
