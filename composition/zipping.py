"""Learn how much of each input content and style adapters may use, so that both keep what they do alone (ZipLoRA)."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..pipelines.adapter_file import card, write_adapter
from ..pipelines.adapter_types import AdapterFile, LowRank
from ..pipelines.attach import Attachment, attached
from ..pipelines.denoise import Work, denoise
from ..pipelines.errors import AdapterError
from ..pipelines.factors import Factors, factors, stored, together
from ..pipelines.fitted import fitted, shaped
from ..pipelines.hooks import Step
from ..pipelines.options import Options
from ..pipelines.site import Site
from .composition import Composition, network_of

DENOISERS = ("unet.", "transformer.")
Pair = tuple[Attachment, Attachment]
Coefficients = Mapping[str, tuple[Tensor, Tensor]]  # by layer: of the content and of the style, `(in,)` each


@dataclass(frozen=True)
class Learning:
    """How the coefficients are learned; see the options of the method."""

    steps: int
    rate: float
    penalty: float
    ways: int
    seed: int
    style_prompt: str


@dataclass(frozen=True)
class Zipped:
    """What was learned.

    Args:
        coefficients: By canonical path.
        adapters: Content and style with them multiplied in.
        losses: Of each learning step.
        facts: The first and last loss, as means over a tenth of the steps, and how far the coefficients went.
    """

    coefficients: Coefficients
    adapters: tuple[AdapterFile, AdapterFile]
    losses: tuple[float, ...]
    facts: Mapping[str, float]


@dataclass(frozen=True)
class Sight:
    """One place on the way of an adapter that draws alone.

    Args:
        inputs: All the denoiser was given there, with the adapter's own prompt and without guidance.
        answer: What it said with the adapter alone.
    """

    inputs: Mapping[str, Any]
    answer: Tensor


@dataclass(frozen=True)
class Zip:
    """A layer of the model with the content's branch, and with the style's."""

    path: str
    sites: tuple[Site, Site]


def learn(composition: Composition, both: Pair, learning: Learning) -> Zipped:
    """Let both adapters draw alone, then learn the coefficients that keep both.

    Raises:
        AdapterError: The adapters are no plain LoRAs, do not fit, or share no layer.
        Cancelled: A stop was asked for.
    """
    zips = shared(composition.model.components, both)
    ways = [sights(composition, attachment, learning) for attachment in both] if learning.steps else []
    coefficients = {one.path: (_ones(one.sites[0]), _ones(one.sites[1])) for one in zips}
    leaves = [value for values in coefficients.values() for value in values]
    adam = torch.optim.Adam(leaves, lr=learning.rate)
    generator = torch.Generator().manual_seed(learning.seed)
    losses: list[float] = []
    with hung(composition, both, zips, coefficients):
        for _ in range(learning.steps):
            composition.token.check()
            chosen = [way[int(torch.randint(len(way), (), generator=generator))] for way in ways]
            with torch.enable_grad():
                loss = loss_of(composition.model.denoiser, chosen, coefficients, learning.penalty)
                gradients = torch.autograd.grad(loss, leaves)  # the model's own parameters stay out of it
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.grad = gradient
            adam.step()
            losses.append(float(loss.detach()))
    final = {path: (one.detach(), other.detach()) for path, (one, other) in coefficients.items()}
    adapters = tuple(scaled(attachment.adapter, final, side) for side, attachment in enumerate(both))
    return Zipped(final, (adapters[0], adapters[1]), tuple(losses), _facts(final, losses))


def shared(components: Mapping[str, nn.Module], both: Pair) -> list[Zip]:
    """Give the layers of the denoiser that both adapters change.

    Raises:
        AdapterError: An adapter does not fit, is no plain LoRA, or there is none.
    """
    found: list[Zip] = []
    for module, uses in fitted(components, both).layers:
        if len(uses) < 2 or not uses[0][1].startswith(DENOISERS):
            continue
        sites: list[Site] = []
        for attachment, path in uses:
            layer = shaped(attachment.adapter.layers[path], module)
            if not isinstance(layer, LowRank):
                raise AdapterError(
                    f"ZipLoRA joins plain LoRAs only; {attachment.name} holds a {type(layer).__name__} in {path}.",
                    "Extract a LoRA from it first, or use Merge.",
                )
            sites.append(Site(module, path))
            sites[-1].branches[attachment.name] = layer, attachment.factor(path)
        found.append(Zip(uses[0][1], (sites[0], sites[1])))
    if not found:
        raise AdapterError(
            f"{both[0].name} and {both[1].name} change no layer in common.", "Merge them: nothing needs learning."
        )
    return found


def sights(composition: Composition, attachment: Attachment, learning: Learning) -> list[Sight]:
    """Let one adapter draw its own prompt alone; every step is a place to learn from."""
    found: list[Sight] = []
    with attached(composition.model.components, (attachment,)) as branches:
        prompt = composition.encode(branches, prompt_of(composition, attachment, learning), (attachment.name,))
        for way in range(learning.ways):
            (work,) = replace(composition, seed=learning.seed + way).begin([prompt])
            looking = _Looking(composition.model.denoiser, work, found)
            for _ in denoise(work, composition.token, (looking,)):
                pass
    return found


@dataclass(frozen=True)
class _Looking:
    """Keeps what the denoiser is given and answers before each step, while the sampler stands at that step."""

    denoiser: nn.Module
    work: Work
    found: list[Sight]

    def before(self, step: Step) -> Tensor:
        kept: list[Mapping[str, Any]] = []

        def keep(module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
            kept.append(inputs)

        handle = self.denoiser.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            answer = network_of(self.work).conditional(step.latents, self.work.timesteps[step.index])
        finally:
            handle.remove()
        self.found.append(Sight(kept[0], answer))
        return step.latents

    def after(self, step: Step) -> Tensor:
        return step.latents


def prompt_of(composition: Composition, attachment: Attachment, learning: Learning) -> str:
    """What an adapter draws alone: the concept's prompt or words, the style's words, or else the whole prompt."""
    own = [concept.prompt or concept.phrase for concept in composition.concepts if concept.name == attachment.name]
    is_style = attachment.name == composition.attachments[1].name
    given = learning.style_prompt if is_style else ""
    return given or next(iter(own), "") or attachment.adapter.trigger or composition.prompt


@contextmanager
def hung(composition: Composition, both: Pair, zips: Sequence[Zip], coefficients: Coefficients) -> Generator[None]:
    """Hang both on the denoiser, with coefficients that may be differentiated where both change a layer."""
    weights = {one.name: one.weight for one in both}
    paths = {one.path for one in zips}
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        with attached(composition.model.components, [rest for one in both for rest in _rest(one, paths)]):
            for one in zips:
                hook = _hook(one, coefficients[one.path], weights)
                handles.append(one.sites[0].module.register_forward_hook(hook))
            yield
    finally:
        for handle in handles:
            handle.remove()


def _rest(attachment: Attachment, paths: Set[str]) -> Iterator[Attachment]:
    """The part of an adapter that changes layers of the denoiser alone, if there is one."""
    layers = {
        path: layer
        for path, layer in attachment.adapter.layers.items()
        if path not in paths and path.startswith(DENOISERS)
    }
    if layers:
        kept = {start: by for start, by in attachment.blocks.items() if any(path.startswith(start) for path in layers)}
        yield replace(attachment, adapter=replace(attachment.adapter, layers=layers), blocks=kept)


def _hook(one: Zip, coefficients: tuple[Tensor, Tensor], weights: Mapping[str, float]) -> Callable[..., Tensor]:
    def run(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for site, m in zip(one.sites, coefficients, strict=True):  # scaling columns of the change is scaling inputs
            x = args[0] * _along(m.to(args[0]), args[0].ndim)
            output = site.add(output, x, weights)
        return output

    return run


def _along(m: Tensor, dimensions: int) -> Tensor:
    """Shape coefficients so that they meet the inputs' channels: last of tokens, second of pictures."""
    return m[:, None, None] if dimensions == 4 else m


def loss_of(denoiser: nn.Module, chosen: Sequence[Sight], coefficients: Coefficients, penalty: float) -> Tensor:
    """How far both together are from each alone, and how much they use the same inputs."""
    apart = [F.mse_loss(denoiser(**one.inputs)[0].float(), one.answer) for one in chosen]
    crowd = [(one * other).abs().mean() for one, other in coefficients.values()]
    return torch.stack(apart).sum() + penalty * torch.stack(crowd).mean()


def scaled(adapter: AdapterFile, coefficients: Coefficients, side: int) -> AdapterFile:
    """Multiply the columns of an adapter's changes; `side` 0 is the content, 1 the style."""
    layers = dict(adapter.layers)
    for path, values in coefficients.items():
        layer = layers[path]
        assert isinstance(layer, LowRank)
        m = values[side].to(layer.down)
        layers[path] = replace(layer, down=layer.down * m.view(-1, *[1] * (layer.down.ndim - 2)))
    return replace(adapter, layers=layers)


def _facts(coefficients: Coefficients, losses: Sequence[float]) -> dict[str, float]:
    if not losses:
        return {}
    tenth = max(1, len(losses) // 10)
    moved = [float((value - 1).abs().mean()) for values in coefficients.values() for value in values]
    return {
        "first loss": sum(losses[:tenth]) / tenth,
        "last loss": sum(losses[-tenth:]) / tenth,
        "moved": sum(moved) / len(moved),
    }


def _ones(site: Site) -> Tensor:
    weight = site.module.weight
    return torch.ones(weight.shape[1], device=weight.device).requires_grad_()


def write_zipped(
    composition: Composition, zipped: Zipped, options: Options, path: Path, dtype: torch.dtype | None
) -> Path:
    """Write both as one LoRA; see `methods.ziplora.export`."""
    content, style = composition.attachments
    for attachment in (content, style):
        if attachment.steps != (0.0, 1.0):
            raise AdapterError(
                f"{attachment.name} acts in a part of the steps, which no LoRA file can say.", "Let it act in all."
            )
    layers: dict[str, LowRank] = {}
    for name in dict.fromkeys(name for adapter in zipped.adapters for name in adapter.layers):
        parts = [
            (attachment.weight * attachment.factor(name), _factors(attachment, adapter.layers[name]))
            for attachment, adapter in zip((content, style), zipped.adapters, strict=True)
            if name in adapter.layers
        ]
        composition.token.check()
        layers[name], _ = stored(together(parts), dtype or torch.float32)
    write_adapter(path, layers, _texts((content, style), options))
    return path


def _factors(attachment: Attachment, layer: object) -> Factors:
    if not isinstance(layer, LowRank):
        raise AdapterError(
            f"{attachment.name} is no plain LoRA, so no LoRA file can hold it.", "Extract a LoRA from it first."
        )
    return factors(layer, (layer.up.shape[0], *layer.down.shape[1:]))


def _texts(both: Pair, options: Options) -> dict[str, str]:
    """Header texts: what was joined, and how."""
    adapters = [one.adapter for one in both]
    bases = {adapter.metadata.get("intarsia.base", "") for adapter in adapters}
    triggers = dict.fromkeys(adapter.trigger for adapter in adapters if adapter.trigger)
    made = {
        "tool": "ziplora",
        "options": options.model_dump(mode="json"),
        "from": [{"name": one.name, "sha256": one.adapter.sha256, "weight": one.weight} for one in both],
    }
    base = bases.pop() if len(bases) == 1 else ""
    texts = card(adapters[0].family, base=base, trigger=", ".join(triggers))
    return texts | {"intarsia.made": json.dumps(made, sort_keys=True)}
