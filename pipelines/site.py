"""One layer of a model with the branches of every adapter that hangs on it: the arithmetic of attaching.

Branches act in one of three ways: the same everywhere, by sample (a different adapter for each entry of a batch, after
S-LoRA, arXiv:2311.03285), or with a gain for each place (a mask over tokens or pixels).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .adapter_types import Layer, LowRank
from .fitted import Target

Gain = float | Tensor
Rows = tuple[Mapping[str, float], ...]


class Site:
    """One layer of the model with the branches of every adapter that touches it."""

    def __init__(self, module: Target, path: str) -> None:
        self.module = module
        self.path = path  # canonical
        self.branches: dict[str, tuple[Layer, float]] = {}  # with the factor of its block
        self._key: tuple[object, ...] = ()
        self._ready: dict[str, tuple[Tensor, Tensor]] = {}  # factors of each adapter where and as the layer computes
        self._kind: tuple[torch.device, torch.dtype] | None = None
        self._thin: tuple[Tensor, Tensor, float] | None = None
        self._dense: tuple[Tensor | None, Tensor | None] = (None, None)
        self._rows: tuple[Rows, Tensor, Tensor] | None = None
        self._joined: tuple[tuple[str, ...], Tensor, Tensor] | None = None

    def reset(self) -> None:
        """Forget what was prepared: names or weights have changed."""
        self._key, self._rows = (), None

    def add(self, output: Tensor, x: Tensor, strengths: Mapping[str, float]) -> Tensor:
        """Add the active branches to the layer's output."""
        self._prepare(strengths, output)
        if self._thin is not None:
            output = self._add_thin(output, x.to(output), *self._thin)
        weight, bias = self._dense
        if weight is not None:
            return output + self._operate(x.to(output), weight, bias)
        if bias is not None:
            output = self._shifted(output, bias)
        return output

    def _shifted(self, output: Tensor, bias: Tensor) -> Tensor:
        shape = (-1, *[1] * (output.ndim - 2)) if isinstance(self.module, nn.Conv2d | nn.GroupNorm) else (-1,)
        return output + bias.view(shape)

    def _prepare(self, strengths: Mapping[str, float], like: Tensor) -> None:
        """Put all active branches side by side, in the layer's dtype.

        Low-rank ones give `(ranks, in, ...)`, `(out, ranks, ...)` and a factor; a single one as it is, so that
        switching adapters copies nothing. All others give one difference of weight and bias, which takes as much memory
        as the layer itself.
        """
        key = (like.device, like.dtype)
        self._at(like)
        if key == self._key:
            return
        thin: list[tuple[Tensor, Tensor, float]] = []
        changes: list[tuple[Tensor, float]] = []
        weights: list[Tensor] = []
        for name, (layer, factor) in self.branches.items():
            strength = factor * strengths.get(name, 0)
            if not strength:
                continue
            if isinstance(layer, LowRank):
                thin.append((*self._factors(name, layer, like), strength * layer.scale))
                changes += [] if layer.bias is None else [(layer.bias, strength * layer.scale)]
            else:
                with torch.no_grad():
                    change = layer.change(self.module.weight.detach(), self.module.bias)
                weights += [] if change.weight is None else [strength * change.weight]
                changes += [] if change.bias is None else [(change.bias, strength)]
        self._thin = thin[0] if len(thin) == 1 else None
        if len(thin) > 1:
            ups = torch.cat([up * scale for _, up, scale in thin], dim=1)
            self._thin = torch.cat([down for down, _, _ in thin]), ups, 1.0
        biases = [strength * bias.to(like.device, torch.float32) for bias, strength in changes]
        self._dense = _sum(weights, like), _sum(biases, like)
        self._key = key

    def _factors(self, name: str, layer: LowRank, like: Tensor) -> tuple[Tensor, Tensor]:
        if name not in self._ready:
            self._ready[name] = layer.down.to(like.device, like.dtype), layer.up.to(like.device, like.dtype)
        return self._ready[name]

    # One assignment of adapters per sample

    def add_rows(self, output: Tensor, x: Tensor, rows: Rows) -> Tensor:
        """Add to each sample its own adapters: sample i has those of row i modulo the number of rows.

        Args:
            output: `(batch, ...)`.
            x: `(batch, ...)`, the layer's input.
            rows: Of each, name to strength.
        """
        self._at(output)
        if any(isinstance(layer, LowRank) for layer, _ in self.branches.values()):
            if self._rows is None or self._rows[0] is not rows:
                self._rows = (rows, *self._stacked(rows, output))
            downs, ups = self._rows[1:]
            if downs.shape[1]:
                output = output + self._thin_rows(output, x.to(output), downs, ups)
        for name, (layer, _) in self.branches.items():
            mine = [index for index, row in enumerate(rows) if row.get(name)]
            if not mine or (isinstance(layer, LowRank) and layer.bias is None):
                continue
            samples = [half + index for half in range(0, len(output), len(rows)) for index in mine]
            values = [self._strength(name, rows[index]) for _ in range(0, len(output), len(rows)) for index in mine]
            strength = output.new_tensor(values).view(-1, *[1] * (output.ndim - 1))
            at = torch.tensor(samples, device=output.device)
            output = output.index_add(0, at, strength * self._rest(layer, output[at], x[at]))
        return output

    def _stacked(self, rows: Rows, like: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of every row, its adapters side by side, padded to one rank: `(rows, rank, in)`, `(rows, out, rank)`;
        a convolution's kernel comes after."""
        found: list[tuple[Tensor, Tensor]] = []
        for row in rows:
            uses = [(name, layer) for name, (layer, _) in self.branches.items() if row.get(name)]
            thin = [(*self._factors(name, layer, like), self._strength(name, row) * layer.scale)
                    for name, layer in uses if isinstance(layer, LowRank)]  # fmt: skip
            if thin:
                found.append((torch.cat([down for down, _, _ in thin]), torch.cat([up * s for _, up, s in thin], 1)))
            else:
                weight = self.module.weight
                found.append(
                    (like.new_zeros(0, *weight.shape[1:]), like.new_zeros(weight.shape[0], 0, *[1] * (weight.ndim - 2)))
                )
        rank = max(len(down) for down, _ in found)
        downs = torch.stack([torch.cat([d, d.new_zeros(rank - len(d), *d.shape[1:])]) for d, _ in found])
        ups = torch.stack([torch.cat([u, u.new_zeros(len(u), rank - u.shape[1], *u.shape[2:])], 1) for _, u in found])
        return downs, ups

    def _thin_rows(self, output: Tensor, x: Tensor, downs: Tensor, ups: Tensor) -> Tensor:
        """One grouped product for all rows: their factors lie side by side in the batch."""
        rows = len(downs)
        if isinstance(self.module, nn.Linear):
            x = x.reshape(-1, rows, x[0].numel() // x.shape[-1], x.shape[-1])  # (halves, rows, tokens, in)
            return (x @ downs.mT @ ups.mT).reshape(output.shape)
        assert isinstance(self.module, nn.Conv2d)
        x = x.reshape(-1, rows * x.shape[1], *x.shape[2:])  # (halves, rows * in, height, width)
        inner = _convolve(self.module, x, downs.flatten(0, 1), groups=rows)  # (halves, rows * rank, ...)
        return F.conv2d(inner, ups.flatten(0, 1), groups=rows).reshape(output.shape)

    # A gain for each place

    def add_gained(
        self, output: Tensor, x: Tensor, strengths: Mapping[str, float], gains: Mapping[str, Gain]
    ) -> Tensor:
        """Add the active branches, each times its gain: a number, or a tensor that broadcasts to the output."""
        self._at(output)
        used = [name for name in self.branches if strengths.get(name) and _acts(gains.get(name, 0.0))]
        thin = tuple(name for name in used if isinstance(self.branches[name][0], LowRank))
        if thin:
            if self._joined is None or self._joined[0] != thin:
                pairs = [self._factors(name, cast(LowRank, self.branches[name][0]), output) for name in thin]
                self._joined = thin, torch.cat([down for down, _ in pairs]), torch.cat([up for _, up in pairs], 1)
            output = output + self._thin_gained(output, x.to(output), strengths, gains)
        for name in used:
            layer = self.branches[name][0]
            if not isinstance(layer, LowRank) or layer.bias is not None:
                output = output + gains[name] * self._strength(name, strengths) * self._rest(layer, output, x)
        return output

    def _thin_gained(
        self, output: Tensor, x: Tensor, strengths: Mapping[str, float], gains: Mapping[str, Gain]
    ) -> Tensor:
        assert self._joined is not None
        names, down, up = self._joined
        linear = isinstance(self.module, nn.Linear)
        axis = -1 if linear else 1  # of the ranks
        inner = F.linear(x, down) if linear else _convolve(cast(nn.Conv2d, self.module), x, down)
        pieces: list[Tensor] = []
        for name in names:
            layer = cast(LowRank, self.branches[name][0])
            gain = torch.as_tensor(gains[name], dtype=inner.dtype, device=inner.device)
            gain = gain * (self._strength(name, strengths) * layer.scale)
            shape = list(inner.shape)
            shape[axis] = layer.rank
            pieces.append(gain.expand(shape))
        inner = inner * torch.cat(pieces, axis)
        return F.linear(inner, up) if linear else F.conv2d(inner, up)

    def parts(self, output: Tensor, x: Tensor, strengths: Mapping[str, float]) -> dict[str, Tensor]:
        """Give what each active branch would add, apart."""
        self._at(output)
        found: dict[str, Tensor] = {}
        for name, (layer, _) in self.branches.items():
            if not strengths.get(name):
                continue
            strength = self._strength(name, strengths)
            if isinstance(layer, LowRank):
                down, up = self._factors(name, layer, output)
                found[name] = self._add_thin(torch.zeros_like(output), x.to(output), down, up, strength * layer.scale)
                if layer.bias is None:
                    continue
            rest = strength * self._rest(layer, output, x)
            found[name] = found[name] + rest if name in found else rest
        return found

    def _rest(self, layer: Layer, output: Tensor, x: Tensor) -> Tensor:
        """What a branch adds besides low-rank factors, at strength 1.

        A change is made anew in each pass: kept, each adapter would take as much memory as the model.
        """
        if isinstance(layer, LowRank):
            assert layer.bias is not None
            return self._shifted(torch.zeros_like(output), layer.scale * layer.bias.to(output))
        with torch.no_grad():
            change = layer.change(self.module.weight.detach(), self.module.bias)
        bias = None if change.bias is None else change.bias.to(output)
        if change.weight is None:
            return torch.zeros_like(output) if bias is None else self._shifted(torch.zeros_like(output), bias)
        return self._operate(x.to(output), change.weight.to(output), bias)

    def _strength(self, name: str, strengths: Mapping[str, float]) -> float:
        return self.branches[name][1] * strengths[name]

    def _at(self, like: Tensor) -> None:
        """Forget factors that were prepared for another device or type."""
        kind = (like.device, like.dtype)
        if kind != self._kind:
            self._ready, self._kind, self._rows, self._joined, self._key = {}, kind, None, None, ()

    def _operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Do to `x` what the layer does, with another weight and bias."""
        layer = self.module
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, bias)
        if isinstance(layer, nn.LayerNorm):
            return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
        if isinstance(layer, nn.GroupNorm):
            return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
        return _convolve(layer, x, weight, bias)

    def _add_thin(self, output: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        """Add low-rank factors; a convolution's stride, padding and dilation are those of its layer."""
        if isinstance(self.module, nn.Linear):
            inner = F.linear(x, down).reshape(-1, down.shape[0])  # (tokens, ranks)
            return torch.addmm(output.reshape(-1, up.shape[0]), inner, up.T, alpha=scale).view(output.shape)
        assert isinstance(self.module, nn.Conv2d)
        return output + F.conv2d(scale * _convolve(self.module, x, down), up)


def _convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 0) -> Tensor:
    """Do what a convolution does, with another weight and bias."""
    padding = conv.padding
    if conv.padding_mode != "zeros" and isinstance(padding, tuple):
        x = F.pad(x, [side for size in reversed(padding) for side in (size, size)], mode=conv.padding_mode)
        padding = 0
    return F.conv2d(x, weight, bias, conv.stride, padding, conv.dilation, groups or conv.groups)


def _sum(parts: Sequence[Tensor], like: Tensor) -> Tensor | None:
    return torch.stack(list(parts)).sum(0).to(like.device, like.dtype) if parts else None


def _acts(gain: Gain) -> bool:
    return isinstance(gain, Tensor) or gain != 0
