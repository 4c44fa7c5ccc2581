"""From attention to places: which token of an image is whose. Pure functions on tensors.

FreeFuse (arXiv:2510.23515), after its released code: scores, the tokens that fit a concept best, what is like them,
the background, and an argmax that gives every concept its part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .masks import soften


def joint_scores(queries: Tensor, keys: Tensor, words: Sequence[int], temperature: float) -> Tensor:
    """How much each image token asks for some words, among all image tokens.

    Args:
        queries: Of the image tokens, `(heads, image, width)`.
        keys: Of the text tokens, `(heads, text, width)`.
        words: Positions of the words in the text.
        temperature: Divides the products before the softmax over the image tokens.

    Returns:
        `(image,)`, mean over heads and words; its sum is 1.
    """
    products = queries.float() @ keys[:, list(words)].float().mT / temperature  # (heads, image, words)
    return products.softmax(1).mean((0, 2))


def contrasted(scores: Tensor) -> Tensor:
    """Each concept's scores times the number of concepts, less the scores of all others: `(concepts, image)`."""
    return (len(scores) + 1) * scores - scores.sum(0, keepdim=True)


def likeness(features: Sequence[Tensor], scores: Tensor, share: float) -> Tensor:
    """Mean inner product of every image token with those that score highest for a concept.

    Args:
        features: What image tokens got from attention, `(image, channels)` for each layer.
        scores: `(concepts, image)`.
        share: Part of the tokens that count as the highest; at least one does.

    Returns:
        `(concepts, image)`, mean over the layers.
    """
    best = scores.topk(max(1, int(share * scores.shape[1])), dim=1).indices  # (concepts, best)
    layers = [layer.float()[best].mean(1) @ layer.float().T for layer in features]
    return torch.stack(layers).mean(0)


def mapped(products: Tensor, temperature: float | None) -> Tensor:
    """Softmax over the image tokens of products divided by a temperature, their own spread if None."""
    if temperature is None:
        temperature = max(float(products.std(correction=0)), 1e-12)  # all alike: any will do
    return (products / temperature).softmax(1)


def opened(mask: Tensor, size: int) -> Tensor:
    """Keep of a mask what squares cover that lie inside it; beyond the picture is no part of it.

    Args:
        mask: `(height, width)`, 0 or 1.
        size: Of the squares, in cells; 1 changes nothing.
    """
    if min(mask.shape) < size:
        return torch.zeros_like(mask)
    inside = -F.max_pool2d(-mask[None], size, 1)  # a cell for each square
    return F.max_pool2d(F.pad(inside, [size - 1] * 4), size, 1)[0]


def closed(mask: Tensor, size: int) -> Tensor:
    """Fill of what is outside a mask all that squares cannot reach; they may lie beyond the picture.

    Args:
        mask: `(height, width)`, 0 or 1.
        size: Of the squares, in cells; 1 changes nothing.
    """
    reach = size - 1
    outside = opened(F.pad(1 - mask, [reach] * 4, value=1.0), size)
    return 1 - outside[reach : reach + mask.shape[0], reach : reach + mask.shape[1]]


def balanced(maps: Tensor, limit: float, rounds: int = 15) -> Tensor:
    """Whose each token is: the highest map less a bias of each concept that draws their areas together.

    One after another, each bias is set by sorting so that its concept has exactly its part while the others stand
    still. With equal areas, no other partition into these areas has a greater sum.

    Args:
        maps: `(concepts, tokens)`.
        limit: Most a bias may be, as a part of the range of the maps; 0 is the plain argmax, 1 binds nothing.
        rounds: Over all concepts.

    Returns:
        `(tokens,)`, numbers of the concepts.
    """
    count, tokens = maps.shape
    bias = maps.new_zeros(count, 1)
    if count == 1 or tokens < count or limit == 0:
        return maps.argmax(0)
    most = limit * float(maps.max() - maps.min())
    areas = torch.tensor([tokens // count + (index < tokens % count) for index in range(count)])
    for _ in range(rounds):
        for index in range(count):
            others = (maps - bias)[[other for other in range(count) if other != index]].amax(0)
            margins = (maps[index] - others).sort(descending=True).values
            between = margins[areas[index] - 1 : areas[index] + 1].mean()
            bias[index] = between.clamp(-most, most)
        found = (maps - bias).argmax(0)
        if torch.equal(found.bincount(minlength=count).cpu(), areas):
            break
    return (maps - bias).argmax(0)


@dataclass(frozen=True)
class Rules:
    """How tokens are given away.

    Args:
        smooth: Blur of the maps before they are compared with each other, in cells.
        clean: Squares by which the foreground is opened and closed, in cells.
        limit: As in `balanced`.
    """

    smooth: float
    clean: int
    limit: float


def routed(maps: Tensor, behind: Tensor | None, grid: tuple[int, int], rules: Rules) -> Tensor:
    """Give every token to a concept, or to none.

    Args:
        maps: `(concepts, tokens)`.
        behind: The background's map, `(tokens,)`; where it is highest nobody stands. None if there is no background.
        grid: (height, width) of the tokens.
        rules: How.

    Returns:
        `(concepts, height, width)`, 0 or 1; at most one concept has each cell.
    """
    front = torch.ones_like(maps[0])
    if behind is not None:
        front = (maps.amax(0) >= behind).float()
        front = closed(opened(front.view(grid), rules.clean), rules.clean).flatten()
    compared = soften(maps.view(-1, *grid), rules.smooth).flatten(1)
    masks = torch.zeros_like(maps)
    here = front.nonzero()[:, 0]
    if len(here):
        masks[balanced(compared[:, here], rules.limit), here] = 1.0
    return masks.view(-1, *grid)
