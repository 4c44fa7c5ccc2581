"""Hang adapters on a model and take them off again, leaving no trace.

A branch adds to the output of its layer through a forward hook: `weight * scale * up(down(x))` for low-rank factors,
the layer's own operation with the changed weight's difference for every other kind. No weight is touched, so detaching
restores the model exactly, and the weights of several adapters can change between two steps.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import isfinite
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from .adapter_types import AdapterFile, Layer, LowRank
from .errors import AdapterError

Target = nn.Linear | nn.Conv2d | nn.LayerNorm | nn.GroupNorm
TARGETS = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Attachment:
    """One adapter to hang on a model, at one weight, under a name of its own.

    Args:
        blocks: Factors for parts of it, by how a layer's canonical path starts, such as `unet.up_blocks.0`,
            `text_encoder`; the longest that fits counts, layers that none fits have 1.
        steps: Part of the denoising in which it acts, as fractions from 0 to 1; kept by `StepRanges`.
    """

    name: str
    adapter: AdapterFile
    weight: float = 1.0
    blocks: Mapping[str, float] = field(default_factory=dict[str, float])
    steps: tuple[float, float] = (0.0, 1.0)

    def factor(self, path: str) -> float:
        """What the weight of a layer is multiplied with."""
        fitting = [start for start in self.blocks if path == start or path.startswith(f"{start}.")]
        return self.blocks[max(fitting, key=len)] if fitting else 1.0


class _Site:
    """One layer of the model with the branches of every adapter that touches it."""

    def __init__(self, module: Target) -> None:
        self.module = module
        self.branches: dict[str, tuple[Layer, float]] = {}  # with the factor of its block
        self._key: tuple[object, ...] = ()
        self._ready: dict[str, tuple[Tensor, Tensor]] = {}  # factors of each adapter where and as the layer computes
        self._kind: tuple[torch.device, torch.dtype] | None = None
        self._thin: tuple[Tensor, Tensor, float] | None = None
        self._dense: tuple[Tensor | None, Tensor | None] = (None, None)

    def reset(self) -> None:
        """Forget what was prepared: names or weights have changed."""
        self._key = ()

    def add(self, output: Tensor, x: Tensor, strengths: Mapping[str, float]) -> Tensor:
        """Add the active branches to the layer's output."""
        self._prepare(strengths, output)
        if self._thin is not None:
            output = self._add_thin(output, x.to(output), *self._thin)
        weight, bias = self._dense
        if weight is not None:
            return output + self._operate(x.to(output), weight, bias)
        if bias is not None:
            shape = (-1, *[1] * (output.ndim - 2)) if isinstance(self.module, nn.Conv2d | nn.GroupNorm) else (-1,)
            output = output + bias.view(shape)
        return output

    def _prepare(self, strengths: Mapping[str, float], like: Tensor) -> None:
        """Put all active branches side by side, in the layer's dtype.

        Low-rank ones give `(ranks, in, ...)`, `(out, ranks, ...)` and a factor; a single one as it is, so that
        switching adapters copies nothing. All others give one difference of weight and bias, which takes as much memory
        as the layer itself.
        """
        key = (like.device, like.dtype)
        if key == self._key:
            return
        if key != self._kind:
            self._ready, self._kind = {}, key
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


def _convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Do what a convolution does, with another weight and bias."""
    padding = conv.padding
    if conv.padding_mode != "zeros" and isinstance(padding, tuple):
        x = F.pad(x, [side for size in reversed(padding) for side in (size, size)], mode=conv.padding_mode)
        padding = 0
    return F.conv2d(x, weight, bias, conv.stride, padding, conv.dilation, conv.groups)


def _sum(parts: Sequence[Tensor], like: Tensor) -> Tensor | None:
    return torch.stack(list(parts)).sum(0).to(like.device, like.dtype) if parts else None


class Branches:
    """The adapters that hang on a model: which are active, and how strongly.

    Args:
        sites: Every touched layer.
        weights: Weight by adapter name.
        matched: As in `Fitted`.
    """

    def __init__(self, sites: Sequence[_Site], weights: Mapping[str, float], matched: Mapping[str, str]) -> None:
        self._sites = sites
        self._weights = dict(weights)
        self._active = frozenset(weights)
        self._strengths = dict(weights)
        self.matched = MappingProxyType(dict(matched))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._weights)

    @property
    def active(self) -> frozenset[str]:
        return self._active

    def activate(self, names: Iterable[str]) -> None:
        """Let only these adapters act, at their weights."""
        wanted = frozenset(names)
        self._known(wanted)
        self._active = wanted
        self._refresh()

    @property
    def weights(self) -> Mapping[str, float]:
        return MappingProxyType(self._weights)

    @weights.setter
    def weights(self, values: Mapping[str, float]) -> None:
        """Set the weights of some adapters; the others keep theirs."""
        self._known(values)
        _check_weights(values)
        self._weights.update(values)
        self._refresh()

    def hook(self, site: _Site, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add the active branches of one layer to its output."""
        return site.add(output, args[0], self._strengths)

    def _known(self, names: Iterable[str]) -> None:
        unknown = sorted(set(names) - set(self._weights))
        if unknown:
            raise AdapterError(f"No adapter called {unknown[0]} is attached.", f"Attached: {', '.join(self.names)}.")

    def _refresh(self) -> None:
        strengths = {name: weight for name, weight in self._weights.items() if name in self._active}
        if strengths != self._strengths:
            self._strengths = strengths
            for site in self._sites:
                site.reset()


@dataclass(frozen=True)
class Fitted:
    """Adapters and the layers of a model they change.

    Args:
        layers: Each layer with the adapters that change it and the canonical path they have it under.
        matched: By adapter name, a line that says how many of its modules matched: all, or fitting has failed.
    """

    layers: Sequence[tuple[Target, Sequence[tuple[Attachment, str]]]]
    matched: Mapping[str, str]


def fitted(components: Mapping[str, nn.Module], attachments: Sequence[Attachment]) -> Fitted:
    """Find every layer of every adapter in a model, and touch nothing.

    Raises:
        AdapterError: An adapter does not fit (with counts and the first three names), or two share a name.
    """
    _check_weights({attachment.name: attachment.weight for attachment in attachments})
    for attachment in attachments:
        _check_parts(attachment)
    layers: dict[int, tuple[Target, list[tuple[Attachment, str]]]] = {}
    matched: dict[str, str] = {}
    for attachment in attachments:
        if attachment.name in matched:
            raise AdapterError(f"{attachment.name} is attached twice.", "Give it once, with the sum of the weights.")
        found = _targets(components, attachment)
        for path, module in found.items():
            layers.setdefault(id(module), (module, []))[1].append((attachment, path))
        matched[attachment.name] = (
            f"{attachment.name}: {len(found)} of {len(attachment.adapter.layers)} modules matched"
        )
    return Fitted(tuple(layers.values()), matched)


@contextmanager
def attached(components: Mapping[str, nn.Module], attachments: Sequence[Attachment]) -> Generator[Branches]:
    """Hang adapters on a model for the length of a `with` block.

    Every layer must exist and every shape must fit before anything is touched; on leaving, also by an exception, no
    hook is left.

    Args:
        components: The model's parts by name: `unet`, `text_encoder`, `text_encoder_2`.
        attachments: The adapters; names must differ. None is fine.

    Raises:
        AdapterError: An adapter does not fit (with counts and the first three names), or two share a name.
    """
    found = fitted(components, attachments)
    sites: list[_Site] = []
    for module, uses in found.layers:
        sites.append(_Site(module))
        for attachment, path in uses:
            layer = _shaped(attachment.adapter.layers[path], module)
            sites[-1].branches[attachment.name] = layer, attachment.factor(path)
    weights = {attachment.name: attachment.weight for attachment in attachments}
    branches = Branches(tuple(sites), weights, found.matched)
    handles: list[RemovableHandle] = []
    try:
        for site in sites:
            handles.append(site.module.register_forward_hook(_hook(branches, site)))
        yield branches
    finally:
        for handle in handles:
            handle.remove()


def _hook(branches: Branches, site: _Site):  # noqa: ANN202 - torch's own hook type is a bare callable
    def run(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return branches.hook(site, args, output)

    return run


def _check_weights(weights: Mapping[str, float]) -> None:
    for name, weight in weights.items():
        if not isfinite(weight):
            raise AdapterError(f"The weight of {name} is {weight}.", "Give a number, such as 0.8.")


def _check_parts(attachment: Attachment) -> None:
    _check_weights({f"{attachment.name} in {start}": factor for start, factor in attachment.blocks.items()})
    for start in attachment.blocks:
        if not any(path == start or path.startswith(f"{start}.") for path in attachment.adapter.layers):
            known = sorted({".".join(path.split(".")[:3]) for path in attachment.adapter.layers})
            raise AdapterError(f"{attachment.name} has no layers in {start}.", f"It has: {', '.join(known[:8])}.")
    first, last = attachment.steps
    if not 0 <= first < last <= 1:
        raise AdapterError(f"{attachment.name} cannot act from {first} to {last}.", "Give fractions, such as 0 to 0.5.")


def _targets(components: Mapping[str, nn.Module], attachment: Attachment) -> dict[str, Target]:
    """Find every layer of an adapter in the model, or refuse the adapter as a whole."""
    found: dict[str, Target] = {}
    wrong: list[str] = []
    for name, layer in attachment.adapter.layers.items():
        module = _module(components, name)
        if module is None:
            wrong.append(f"no module {name}")
        elif not isinstance(module, TARGETS):
            wrong.append(f"{name} is a {type(module).__name__}")
        elif problem := _problem(layer, module):
            wrong.append(f"{name}: {problem}")
        else:
            found[name] = module
    if wrong or not found:
        total = len(attachment.adapter.layers)
        raise AdapterError(
            f"{attachment.name} fits {len(found)} of {total} modules of this model, so it was not attached. "
            f"First: {'; '.join(wrong[:3]) or 'it has no layers'}.",
            f"It was made for {attachment.adapter.metadata.get('intarsia.base') or attachment.adapter.family}.",
        )
    return found


def _module(components: Mapping[str, nn.Module], name: str) -> nn.Module | None:
    component, _, path = name.partition(".")
    root = components.get(component)
    if not isinstance(root, nn.Module):
        return None
    for candidate in (path, path.removeprefix("text_model.")):  # which transformers 5 leaves out of some models
        try:
            return root.get_submodule(candidate)
        except AttributeError:
            continue
    return None


def _shaped(layer: Layer, module: Target) -> Layer:
    """Give low-rank factors the number of dimensions their layer has (a 1x1 convolution may be stored flat)."""
    if not isinstance(layer, LowRank):
        return layer
    down, up = layer.down, layer.up
    if isinstance(module, nn.Linear):
        down, up = down.reshape(down.shape[:2]), up.reshape(up.shape[:2])
    else:
        down = down[:, :, None, None] if down.ndim == 2 else down
        up = up[:, :, None, None] if up.ndim == 2 else up
    return replace(layer, down=down, up=up)


def _problem(layer: Layer, module: Target) -> str | None:
    """Say why a layer does not fit its module; with other kinds than low-rank by trying it on an empty weight."""
    if not isinstance(layer, LowRank):
        return _misfit(layer, module)
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return f"a {type(module).__name__} cannot take a LoRA"
    kernel = (1, 1) if isinstance(module, nn.Linear) else module.kernel_size
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return "a grouped convolution cannot be adapted"
    wanted = ("r", module.weight.shape[1], *kernel)
    has = ("r", *layer.down.shape[1:], *((1, 1) if layer.down.ndim == 2 else ()))
    if has != wanted:
        return f"down expected {_show(wanted)} but has {_show(has)}"
    out = module.weight.shape[0]
    if tuple(layer.up.shape) not in ((out, layer.rank), (out, layer.rank, 1, 1)):
        return f"up expected {_show((out, layer.rank))} but has {_show(tuple(layer.up.shape))}"
    return None


def _misfit(layer: Layer, module: Target) -> str | None:
    try:
        change = layer.change(torch.zeros_like(module.weight, dtype=torch.float32), module.bias)
    except RuntimeError:
        return f"its change does not fit a layer of {_show(tuple(module.weight.shape))}"
    if change.bias is not None and change.bias.shape != module.weight.shape[:1]:
        return f"its bias has {len(change.bias)} numbers but the layer {len(module.weight)} outputs"
    return None


def _show(shape: tuple[object, ...]) -> str:
    shown = shape[:2] if shape[2:] == (1, 1) else shape
    return "(" + ", ".join(str(size) for size in shown) + ")"
