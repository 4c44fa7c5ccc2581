"""Gradients of attention maps with respect to the latents, at the least cost.

A pass ends when the last wanted map is made; what lies behind (the finest, dearest levels of a UNet) is not run. The
graph holds the conditional half alone; weights want no gradients (they are loaded so), so layers keep no inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, isfinite, log2
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..pipelines.errors import InputError
from .attention import Maps, Recording, is_cross, layers, processors
from .composition import Composition, Fan


class Ended(Exception):  # noqa: N818 - a pass that has done its work
    """Every wanted map is made."""


@dataclass
class Glance(Maps):
    """Maps of one level, which can end a pass as soon as they are complete.

    Args:
        ending: Whether this pass ends there.
        complete: How many maps a pass makes; 0 before the first was run.
    """

    ending: bool = False
    complete: int = 0

    @property
    def made(self) -> int:
        return len(self.cross) + len(self.own)

    def run(self, forward: Callable[[], object], whole: bool = False) -> None:
        """Run the denoiser as far as the last map, or as a whole; the maps of the pass before are dropped.

        Raises:
            InputError: No attention layer works at this level.
        """
        self.clear()
        self.ending = not whole and self.complete > 0
        try:
            forward()
        except Ended:
            pass
        finally:
            self.ending = False  # a checkpointed layer that is run again must not end the backward pass
        self.complete = self.made
        if not self.made:
            raise InputError("The model has no attention layer of this map size.", "Choose another map size.")

    def check(self) -> None:
        """End the pass if it has done its work.

        Raises:
            Ended: It has.
        """
        if self.ending and self.made == self.complete:
            raise Ended


class Ending(Recording):
    """Records the map of a layer, and ends the pass behind the last one."""

    def __init__(self, maps: Glance, path: str) -> None:
        super().__init__(maps, path)
        self._glance = maps

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        attended = super().__call__(*args, **kwargs)
        self._glance.check()
        return attended


@contextmanager
def glancing(denoiser: nn.Module, grid: tuple[int, int]) -> Generator[Glance]:
    """Record the cross-attention maps of the layers on one grid, in passes that may end behind the last.

    Args:
        denoiser: A UNet.
        grid: (height, width) of the maps.
    """
    glance = Glance(grid[0] * grid[1])
    with processors(denoiser, {path: Ending(glance, path) for path in layers(denoiser) if is_cross(path)}):
        yield glance


def level(composition: Composition, cell: Literal["auto", "32", "16"]) -> tuple[int, int]:
    """The (height, width) of maps with cells of so many pixels; odd sides round up, as a UNet's levels do.

    Args:
        composition: Gives the size.
        cell: "auto" keeps at least 16 cells a side, as the papers have them at 512 pixels.
    """
    pixels = int(cell) if cell != "auto" else 32 if min(composition.size) >= 512 else 16
    height, width = composition.grid
    for _ in range(int(log2(pixels // 8))):
        height, width = ceil(height / 2), ceil(width / 2)
    return height, width


def pulled_back(maps: Sequence[Tensor], wanted: Sequence[Tensor], latents: Tensor) -> Tensor:
    """Carry derivatives by the maps back to the latents.

    Args:
        maps: With a graph that begins at `latents`.
        wanted: The loss' derivative by each.
        latents: A leaf.

    Returns:
        The loss' gradient, the shape of `latents`. Half precision would lose small derivatives on the way, so the
        largest starts near 1; a power of two changes no digit.
    """
    most = max(float(one.abs().max()) for one in wanted)
    if most == 0:
        return torch.zeros_like(latents)
    scale = 2.0 ** -round(log2(most)) if isfinite(most) else 1.0
    (found,) = torch.autograd.grad(list(maps), latents, [one * scale for one in wanted])
    return found / scale


def unit(scheduler: Any, timestep: Tensor) -> float:  # noqa: ANN401
    """How much larger the sampler's latents are than what the network sees: 1 unless the sampler works in sigmas.

    Step sizes are meant for what the network sees; with z = unit * x a step of dL/dx on x is unit^2 * dL/dz on z.
    """
    return 1 / float(scheduler.scale_model_input(torch.ones(()), timestep))


@dataclass(frozen=True)
class Views:
    """The maps of every branch of a picture.

    Args:
        fan: The branches.
        glance: The maps that hang on the denoiser.
        together: Most branches in one pass.
        check: Called before every pass; may raise to stop.
    """

    fan: Fan
    glance: Glance
    together: int
    check: Callable[[], None]

    def predict(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Predict without and with the prompts, `(branches, ...)` each, and the conditional halves' maps
        `(branches, tokens, words)`."""
        found: list[tuple[Tensor | None, Tensor]] = []
        maps: list[Tensor] = []
        for chunk in self._chunks(self.together):
            self.glance.run(lambda chunk=chunk: found.append(self.fan.halves(latents, timestep, chunk)), whole=True)
            maps.append(self.glance.mean()[-len(chunk) :])  # the conditional halves come last
        self.glance.clear()
        without = [half for half, _ in found if half is not None]
        return torch.cat(without) if without else None, torch.cat([half for _, half in found]), torch.cat(maps)

    def look(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The maps alone, without a graph: `(branches, tokens, words)`."""
        with torch.no_grad():
            return torch.cat([maps for _, maps in self._maps(latents, timestep, self.together)])

    def gradient(self, latents: Tensor, timestep: Tensor, derivatives: Tensor) -> Tensor:
        """Carry derivatives by the maps back to the latents, one branch at a time: only its graph exists.

        Args:
            latents: Of the picture, `(1, ...)`.
            timestep: 0-d.
            derivatives: By the maps, `(branches, tokens, words)`; exact, since their sum over the branches is the
                gradient of any loss of all the maps.
        """
        total = torch.zeros_like(latents)
        leaf = latents.detach().requires_grad_(True)
        with torch.enable_grad():
            for chunk, maps in self._maps(leaf, timestep, 1):
                total += pulled_back([maps], [derivatives[list(chunk)]], leaf)
        return total

    def loss_gradient(
        self, latents: Tensor, timestep: Tensor, loss: Callable[[list[Tensor]], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The loss of the maps and its gradient by one graph over all branches: one pass less, and their memory."""
        leaf = latents.detach().requires_grad_(True)
        with torch.enable_grad():
            maps = torch.cat([maps for _, maps in self._maps(leaf, timestep, self.together)])
            value, derivatives = derived([maps], loss)
            return value, pulled_back([maps], derivatives, leaf)

    def _maps(self, latents: Tensor, timestep: Tensor, together: int) -> Generator[tuple[tuple[int, ...], Tensor]]:
        for chunk in self._chunks(together):
            self.glance.run(lambda chunk=chunk: self.fan.conditional(latents, timestep, chunk))
            maps = self.glance.mean()
            self.glance.clear()
            yield chunk, maps
            self.glance.clear()  # layers that were run again for their graph

    def _chunks(self, together: int) -> Generator[tuple[int, ...]]:
        for start in range(0, len(self.fan), together):
            self.check()
            yield tuple(range(start, min(start + together, len(self.fan))))


def derived(maps: Sequence[Tensor], loss: Callable[[list[Tensor]], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A loss of maps and its derivatives by them; no graph of theirs is touched."""
    leaves = [one.detach().requires_grad_(True) for one in maps]
    with torch.enable_grad():
        value = loss(leaves)
        found = torch.autograd.grad(value, leaves)
    return value.detach(), list(found)
