"""In scenes, every name learns to be looked at from where its object lies: a second loss on the attention to the words.

TokenCompose (arXiv:2312.03626), eq. 3: of the attention to an object's words, as much as possible should come from
inside its box. Deviations: boxes, which are known here, for segmentation masks; and for the loss per pixel (eq. 5) the
cross entropy over the scene's objects, since what fails in scenes is to tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .scenes import Plan

OBJECTS = 3  # most in one scene
LEAST = 1e-6  # attention that counts as none


def named_tokens(plans: Sequence[Plan], offsets: Tensor) -> Tensor:
    """Which tokens name which object: bool `(plans, OBJECTS, tokens)`.

    Args:
        plans: Those without spans name nothing.
        offsets: First and last character of every token, `(plans, tokens, 2)`; equal for tokens that are no text.
    """
    spans = torch.zeros(len(plans), OBJECTS, 2, dtype=torch.long)
    for row, plan in enumerate(plans):
        for column, span in enumerate(plan.spans):
            spans[row, column] = torch.tensor(span)
    first, last = offsets[:, None, :, 0], offsets[:, None, :, 1]
    return (first >= spans[..., :1]) & (last <= spans[..., 1:]) & (first < last)


def boxes_of(plans: Sequence[Plan]) -> Tensor:
    """Left, top, right and bottom of every object as fractions of the canvas: `(plans, OBJECTS, 4)`."""
    boxes = torch.zeros(len(plans), OBJECTS, 4)
    for row, plan in enumerate(plans):
        for column, placed in enumerate(plan.objects[:OBJECTS]):
            boxes[row, column] = torch.tensor(placed.box)
    return boxes


class Binding:
    """Watches the attention to the words in a UNet whose processor computes it in the open (`AttnProcessor`)."""

    def __init__(self, unet: nn.Module) -> None:
        self._layers: list[Any] = [layer for name, layer in unet.named_modules() if name.endswith("attn2")]
        self._seen: list[Tensor] = []

    @contextmanager
    def watched(self) -> Generator[None]:
        """Keep the attention of every forward pass inside the block."""
        try:
            for layer in self._layers:
                layer.get_attention_scores = self._watch(layer.get_attention_scores)
            yield
        finally:
            for layer in self._layers:
                layer.__dict__.pop("get_attention_scores", None)
            self._seen.clear()

    def _watch(self, scores: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 - of diffusers' own method
            made = scores(*args, **kwargs)
            self._seen.append(made)
            return made

        return run

    def loss(self, named: Tensor, boxes: Tensor) -> Tensor:
        """Mean loss over the layers watched since the last call, and over the objects that are named.

        Args:
            named: `(batch, OBJECTS, tokens)`, of pictures that are no scene all false.
            boxes: `(batch, OBJECTS, 4)`, fractions.
        """
        seen, self._seen[:] = list(self._seen), []
        there = named.any(2)  # (batch, OBJECTS)
        if not there.any():
            return torch.zeros((), device=named.device)
        losses = [self._of_layer(made, named.float(), boxes, there) for made in seen]
        return torch.stack(losses).mean()

    @staticmethod
    def _of_layer(made: Tensor, named: Tensor, boxes: Tensor, there: Tensor) -> Tensor:
        batch, places = len(named), made.shape[1]
        mean = made.float().reshape(batch, -1, places, made.shape[2]).mean(1)  # over heads: (batch, places, tokens)
        looks = torch.einsum("bpt,bot->bop", mean, named) + LEAST
        inside = _inside(boxes, round(places**0.5))  # (batch, OBJECTS, places)
        outside = 1 - (looks * inside).sum(2) / looks.sum(2)
        shares = (looks / looks.sum(1, keepdim=True)).log()
        mixed = -(shares * inside).sum(2) / inside.sum(2).clamp(min=1)
        return (outside.square() + mixed)[there].mean()


def _inside(boxes: Tensor, side: int) -> Tensor:
    """Which places of a square grid lie in each box: float `(batch, objects, side * side)`."""
    centre = (torch.arange(side, device=boxes.device) + 0.5) / side
    left, top, right, bottom = boxes[..., None].unbind(2)  # (batch, objects, 1) each
    across = (centre >= left) & (centre <= right)
    down = (centre >= top) & (centre <= bottom)
    return (down[..., :, None] & across[..., None, :]).flatten(2).float()
