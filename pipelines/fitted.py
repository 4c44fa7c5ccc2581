"""Which layers of a model the layers of an adapter belong to, and whether they fit there; touches nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite

import torch
from torch import nn

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
    check_weights({attachment.name: attachment.weight for attachment in attachments})
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


def check_weights(weights: Mapping[str, float]) -> None:
    for name, weight in weights.items():
        if not isfinite(weight):
            raise AdapterError(f"The weight of {name} is {weight}.", "Give a number, such as 0.8.")


def _check_parts(attachment: Attachment) -> None:
    check_weights({f"{attachment.name} in {start}": factor for start, factor in attachment.blocks.items()})
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


def shaped(layer: Layer, module: Target) -> Layer:
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
