"""From attention to places: every step beside a loop over single numbers, and planted places found again."""

from __future__ import annotations

import itertools
from math import exp

import pytest
import torch
from intarsia.composition.routing import (
    Rules,
    balanced,
    closed,
    contrasted,
    joint_scores,
    likeness,
    mapped,
    opened,
    routed,
)
from torch import Tensor

PLAIN = Rules(smooth=0.0, clean=1, limit=0.0)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_joint_scores_are_a_softmax_over_the_image() -> None:
    queries, keys, words = drawn(2, 5, 4), drawn(2, 7, 4, seed=1), (2, 6)
    found = joint_scores(queries, keys, words, 3.0)
    assert float(found.sum()) == pytest.approx(1, abs=1e-6)
    for token in range(5):
        parts: list[float] = []
        for head, word in itertools.product(range(2), words):
            products = [exp(float(queries[head, other] @ keys[head, word]) / 3) for other in range(5)]
            parts.append(products[token] / sum(products))
        assert float(found[token]) == pytest.approx(sum(parts) / 4, abs=1e-6)


def test_contrast_takes_the_others_off() -> None:
    scores = drawn(3, 6)
    for index in range(3):
        others = [scores[other] for other in range(3) if other != index]
        torch.testing.assert_close(contrasted(scores)[index], 3 * scores[index] - others[0] - others[1])
    torch.testing.assert_close(contrasted(scores[:1]), scores[:1])


def test_likeness_is_the_mean_product_with_the_best_tokens() -> None:
    layers, scores = [drawn(10, 3), drawn(10, 5, seed=1)], drawn(2, 10, seed=2)
    found = likeness(layers, scores, 0.3)
    for concept, token in itertools.product(range(2), range(10)):
        best = sorted(range(10), key=lambda other: float(-scores[concept, other]))[:3]
        products = [float(layer[token] @ layer[other]) for layer in layers for other in best]
        assert float(found[concept, token]) == pytest.approx(sum(products) / 6, abs=1e-5)
    one = likeness(layers, scores, 0.0)  # at least one stands for a concept
    best = int(scores[1].argmax())
    assert float(one[1, 4]) == pytest.approx(sum(float(layer[4] @ layer[best]) for layer in layers) / 2, abs=1e-5)


def test_a_map_is_a_softmax_at_a_temperature_or_at_its_own_spread() -> None:
    products = drawn(2, 6) * 300
    torch.testing.assert_close(mapped(products, 300.0), (products / 300).softmax(1))
    torch.testing.assert_close(mapped(products, None), mapped(products * 77, None))
    spread = ((products - products.mean()) ** 2).mean().sqrt()
    torch.testing.assert_close(mapped(products, None), (products / spread).softmax(1))
    torch.testing.assert_close(mapped(torch.ones(2, 4), None), torch.full((2, 4), 0.25))


def squares(mask: Tensor, size: int) -> Tensor:
    """What squares within a mask cover, one after another; beyond the picture is none of it."""
    found = torch.zeros_like(mask)
    for top, left in itertools.product(range(mask.shape[0] - size + 1), range(mask.shape[1] - size + 1)):
        window = (slice(top, top + size), slice(left, left + size))
        if bool(mask[window].all()):
            found[window] = 1
    return found


@pytest.mark.parametrize("size", [1, 2, 3])
def test_opening_and_closing_are_those_of_squares_one_after_another(size: int) -> None:
    changed = 0
    for seed, (height, width) in enumerate([(6, 9), (5, 5), (1, 4), (8, 3), (7, 7), (6, 6)]):
        mask = (drawn(height, width, seed=seed) > -0.6).float()
        wide = torch.ones(height + 2 * size, width + 2 * size)  # outside the mask and beyond the picture
        wide[size:-size, size:-size] = 1 - mask
        wanted = 1 - squares(wide, size)[size:-size, size:-size]
        assert torch.equal(opened(mask, size), squares(mask, size))
        assert torch.equal(closed(mask, size), wanted)
        assert torch.equal(opened(opened(mask, size), size), opened(mask, size))
        assert torch.equal(closed(closed(mask, size), size), closed(mask, size))
        changed += int((closed(mask, size) != mask).sum()) * int((opened(mask, size) != mask).sum())
    assert (changed > 0) == (size > 1)


@pytest.mark.parametrize(("concepts", "tokens"), [(2, 8), (3, 9), (3, 8), (4, 8)])
def test_balanced_is_the_best_partition_into_equal_areas(concepts: int, tokens: int) -> None:
    areas = [tokens // concepts + (index < tokens % concepts) for index in range(concepts)]
    uneven = 0
    for seed in range(10):
        maps = drawn(concepts, tokens, seed=seed) + drawn(concepts, 1, seed=100 + seed)
        found = balanced(maps, 1.0)
        assert found.bincount(minlength=concepts).tolist() == areas
        uneven += maps.argmax(0).bincount(minlength=concepts).tolist() != areas
        best = max(
            sum(float(maps[concept, token]) for token, concept in enumerate(way))
            for way in itertools.product(range(concepts), repeat=tokens)
            if [way.count(concept) for concept in range(concepts)] == areas
        )
        assert float(maps[found, torch.arange(tokens)].sum()) == pytest.approx(best, abs=1e-4)
    assert uneven >= 5, "the plain argmax would do"


@pytest.mark.parametrize(("concepts", "tokens"), [(2, 256), (3, 1024), (10, 4096)])
def test_large_pictures_come_out_in_equal_areas_too(concepts: int, tokens: int) -> None:
    maps = torch.rand(concepts, tokens, generator=torch.Generator().manual_seed(3)) * drawn(concepts, 1).abs()
    areas = balanced(maps, 1.0).bincount(minlength=concepts)
    assert int(areas.max() - areas.min()) <= 1


def test_a_limit_keeps_the_bias_small_and_none_is_the_plain_argmax() -> None:
    maps = torch.rand(2, 200, generator=torch.Generator().manual_seed(0))
    maps[0] += 1  # the first would have everything
    assert torch.equal(balanced(maps, 0.0), maps.argmax(0))
    some = balanced(maps, 0.2)
    most = 0.2 * float(maps.max() - maps.min())
    given = maps[0] - maps[1] <= 2 * most
    assert torch.equal(some == 1, given) and 0 < int(given.sum()) < 100
    assert balanced(maps, 1.0).bincount().tolist() == [100, 100]


def blob(height: int, width: int, top: int, left: int, size: int) -> Tensor:
    mask = torch.zeros(height, width)
    mask[top : top + size, left : left + size] = 1
    return mask


def test_planted_places_are_found_again() -> None:
    grid = (12, 16)
    planted = torch.stack([blob(*grid, 2, 1, 5), blob(*grid, 5, 10, 5)])
    noise = torch.rand(3, *grid, generator=torch.Generator().manual_seed(0)) * 0.4
    maps = (planted + noise[:2]).flatten(1)
    behind = ((1 - planted.sum(0)) + noise[2]).flatten()
    torch.testing.assert_close(routed(maps, behind, grid, PLAIN), planted)
    torch.testing.assert_close(routed(maps, behind, grid, Rules(1.0, 2, 0.1)), planted)


def test_spots_and_holes_of_one_cell_go_and_larger_ones_stay() -> None:
    grid = (10, 10)
    planted = torch.stack([blob(*grid, 0, 0, 5), blob(*grid, 5, 5, 5)])
    spotted, behind = planted.clone(), 0.5 - planted.sum(0)
    spotted[0, 8, 2], behind[8, 2] = 1, -0.5  # a spot
    behind[2, 2] = 3  # a hole
    front = routed(spotted.flatten(1), behind.flatten(), grid, PLAIN).sum(0)
    assert front[8, 2] == 1 and front[2, 2] == 0
    torch.testing.assert_close(routed(spotted.flatten(1), behind.flatten(), grid, Rules(0.0, 2, 0.0)), planted)


def test_masks_part_the_picture_among_the_concepts() -> None:
    maps, grid = torch.rand(3, 40, generator=torch.Generator().manual_seed(1)), (5, 8)
    whole = routed(maps, None, grid, Rules(1.0, 2, 0.5))
    assert torch.equal(whole.sum(0), torch.ones(grid)) and set(whole.unique().tolist()) == {0, 1}
    behind = maps.mean(0) * 1.4
    some = routed(maps, behind, grid, PLAIN)
    assert torch.equal(some.sum(0), (maps.amax(0) >= behind).float().view(grid))
    assert 0 < int(some.sum()) < 40
    nobody = routed(maps, torch.full((40,), 2.0), grid, PLAIN)
    assert not nobody.any()


def test_a_blur_lets_neighbours_decide() -> None:
    maps = torch.stack([torch.ones(7, 7), torch.zeros(7, 7)])
    maps[:, 3, 3] = torch.tensor([0.0, 1.0])
    assert routed(maps.flatten(1), None, (7, 7), PLAIN)[1, 3, 3] == 1
    assert routed(maps.flatten(1), None, (7, 7), Rules(1.0, 1, 0.0))[1, 3, 3] == 0
