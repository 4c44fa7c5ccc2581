"""Places on grids: coverage by exact area, who lies on top, soft edges, levels of a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from intarsia.composition.composition import Concept
from intarsia.composition.masks import covered, grid_of, places, resized, seen, soften
from intarsia.pipelines.adapter_types import AdapterFile
from intarsia.pipelines.attach import Attachment

FILE = AdapterFile(Path("x"), "sdxl", "concept", "", {}, "", {})


def concept(name: str, **more: Any) -> Concept:  # noqa: ANN401
    return Concept(Attachment(name, FILE), **more)


@pytest.mark.parametrize("box", [(0.0, 0.0, 0.5, 1.0), (0.13, 0.21, 0.77, 0.68), (0.3, 0.3, 0.9, 0.35)])
def test_a_box_covers_the_area_it_has(box: tuple[float, float, float, float]) -> None:
    fine = torch.zeros(800, 1200)
    left, top, right, bottom = box
    fine[round(top * 800) : round(bottom * 800), round(left * 1200) : round(right * 1200)] = 1
    by_counting = fine.view(8, 100, 12, 100).mean((1, 3))
    assert torch.allclose(covered(box, (8, 12)), by_counting, atol=0.02)


def test_a_box_of_one_pixel_still_has_a_cell() -> None:
    mask = covered((0.999, 0.999, 1.0, 1.0), (8, 8))
    assert mask[7, 7] == 1 and mask.sum() == 1


def test_a_mask_counts_before_the_box_and_no_place_is_nowhere() -> None:
    painted = torch.zeros(64, 64)
    painted[:32] = 1
    found = places([concept("a", box=(0, 0.5, 1, 1), mask=painted), concept("b")], (8, 8))
    assert found[0, :4].eq(1).all() and found[0, 4:].eq(0).all() and found[1].eq(0).all()


def test_the_higher_lies_on_top_and_of_equal_ones_the_later() -> None:
    masks = torch.ones(3, 2, 2)
    assert [float(mask.sum()) for mask in seen(masks, [0, 0, 0])] == [0, 0, 4]
    assert [float(mask.sum()) for mask in seen(masks, [0, 5, 0])] == [0, 4, 0]
    half = torch.full((2, 1, 1), 0.5)
    assert seen(half, [0, 0]).flatten().tolist() == [0.25, 0.5]


def test_softening_keeps_the_sum_of_places_that_fill_the_canvas() -> None:
    masks = torch.zeros(2, 8, 8)
    masks[0, :, :3], masks[1, :, 3:] = 1, 1
    soft = soften(masks, 1.5)
    assert torch.allclose(soft.sum(0), torch.ones(8, 8), atol=1e-6)
    assert 0.1 < float(soft[0, 0, 3]) < 0.5
    assert torch.equal(soften(masks, 0), masks)


@pytest.mark.parametrize("canvas", [(32, 32), (24, 40), (9, 16)])
def test_a_level_is_found_by_its_tokens(canvas: tuple[int, int]) -> None:
    height, width = canvas
    for _ in range(3):
        assert grid_of(height * width, canvas) == (height, width)
        height, width = (height + 1) // 2, (width + 1) // 2
    with pytest.raises(ValueError, match="no level"):
        grid_of(7, canvas)


def test_masks_are_averaged_over_coarser_cells() -> None:
    masks = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(resized(masks, (4, 4)), masks.view(2, 4, 2, 4, 2).mean((2, 4)))
