"""Runs a denoiser without its middle, whose last result is kept for each adapter.

UNet (DeepCache, arXiv:2312.00858, as CMLoRA's code uses it): the input of the last up block is kept; a partial pass
runs the first convolution, the first down block without its downsampler, the last up block and the output head: 0.38 of
the operations of SD 1.5 at 512 x 512, 0.07 of SDXL's at 1024 x 1024. Transformer (ours): the first and the last blocks
run, and the change that the blocks between made to both streams is kept and added again.

The model's own forward runs; only its lists of blocks are shorter for the length of one call.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LISTS = ("transformer_blocks", "single_transformer_blocks")  # of a transformer, in the order they run
Streams = tuple[Tensor, ...]


@dataclass(frozen=True)
class _Cut:
    """Where the middle begins and ends.

    Args:
        swaps: Module, name of its child, and what stands there while the middle is left out.
        tail: The first module after the middle.
        first: The first module of the middle, if its change is kept; None if its result is.
        streams: Names of the inputs of `tail` (and of `first`) that the middle changes.
    """

    swaps: tuple[tuple[nn.Module, str, nn.Module | None], ...]
    tail: nn.Module
    first: nn.Module | None
    streams: tuple[str, ...]


class Middle:
    """The middle of a denoiser, and what it gave last for each adapter.

    Every call of the denoiser stands in a `with` block of its own, of `whole` or `without`, with the batch's names:
    sample i is of name i modulo the number of names.

    Args:
        denoiser: A UNet2DConditionModel, or a transformer of SD3 or FLUX.1; must not change while this is used.
        depth: Blocks of a transformer that run at each end; at most half of all.
    """

    def __init__(self, denoiser: nn.Module, depth: int = 1) -> None:
        self._cut = _unet_cut(denoiser) if hasattr(denoiser, "up_blocks") else _transformer_cut(denoiser, depth)
        self._kept: dict[str, Streams] = {}

    @property
    def kept(self) -> dict[str, Streams]:
        """By name what the middle gave last, each tensor `(1 or 2, ...)` with the branch without the prompt first."""
        return dict(self._kept)

    def forget(self, names: Iterable[str]) -> None:
        """Drop what is kept for these names."""
        for name in names:
            self._kept.pop(name, None)

    @contextmanager
    def whole(self, names: Sequence[str]) -> Generator[None]:
        """Run the denoiser as it is, and keep what its middle gives for each name."""
        before: list[Streams] = []

        def begin(streams: Streams) -> None:
            before.append(streams)

        def end(streams: Streams) -> None:
            if before:
                streams = tuple(now - then for now, then in zip(streams, before[0], strict=True))
            for index, name in enumerate(names):
                self._kept[name] = tuple(
                    stream.unflatten(0, (-1, len(names)))[:, index].contiguous() for stream in streams
                )

        with ExitStack() as stack:
            if self._cut.first is not None:
                stack.enter_context(self._watched(self._cut.first, begin))
            stack.enter_context(self._watched(self._cut.tail, end))
            yield

    @contextmanager
    def without(self, names: Sequence[str]) -> Generator[None]:
        """Run the denoiser without its middle, with what is kept for each name in its stead.

        Raises:
            KeyError: Nothing is kept for a name.
        """
        kept = [self._kept[name] for name in names]
        stored = tuple(torch.stack(parts, 1).flatten(0, 1) for parts in zip(*kept, strict=True))

        def put(streams: Streams) -> Streams:
            if self._cut.first is None:
                return stored
            return tuple(now + change for now, change in zip(streams, stored, strict=True))

        with ExitStack() as stack:
            for module, child, replacement in self._cut.swaps:
                stack.callback(setattr, module, child, getattr(module, child))
                setattr(module, child, replacement)
            stack.enter_context(self._watched(self._cut.tail, put))
            yield

    @contextmanager
    def _watched(self, module: nn.Module, see: Callable[[Streams], Streams | None]) -> Generator[None]:
        """Show a module's streams before it runs, and let them be replaced."""
        names = self._cut.streams

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            given = see(tuple(kwargs[name] for name in names))
            return None if given is None else (args, kwargs | dict(zip(names, given, strict=True)))

        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _unet_cut(unet: Any) -> _Cut:  # noqa: ANN401 - UNet2DConditionModel
    """The last up block joins what it is given with the first convolution's and the first down block's outputs."""
    first, last = unet.down_blocks[0], unet.up_blocks[-1]
    swaps: tuple[tuple[nn.Module, str, nn.Module | None], ...] = (
        (unet, "down_blocks", nn.ModuleList([first])),
        (unet, "mid_block", None),
        (unet, "up_blocks", nn.ModuleList([last])),
        (first, "downsamplers", None),
    )
    return _Cut(swaps, last, None, ("hidden_states",))


def _transformer_cut(transformer: nn.Module, depth: int) -> _Cut:
    lists = [name for name in LISTS if hasattr(transformer, name)]
    chain: list[tuple[str, nn.Module]] = [(name, block) for name in lists for block in getattr(transformer, name)]
    depth = min(depth, len(chain) // 2)
    ends = chain[:depth] + chain[-depth:]
    swaps = tuple((transformer, name, nn.ModuleList([b for n, b in ends if n == name])) for name in lists)
    return _Cut(swaps, chain[-depth][1], chain[depth][1], ("hidden_states", "encoder_hidden_states"))
