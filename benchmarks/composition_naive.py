"""The official procedures of CLoRA and LoRA-Composer, with the product's mathematics and none of its savings.

CLoRA: all branches' graphs at once, over both halves of the guidance, in every step, also behind the last update.
LoRA-Composer: text keys and values made anew in every layer, maps of every step kept. Both: attention written out in
every layer, whole passes, and weights that want gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from intarsia.composition.attention import is_cross, keys_values, layers, outcome, probabilities, processors
from intarsia.composition.attention import queries as queries_of
from intarsia.composition.composer_attention import Estate, Parts, Plot
from intarsia.composition.composer_losses import restart, total
from intarsia.composition.composition import Composition, Fan, network_of
from intarsia.composition.contrast import fused, loss_of, territories
from intarsia.composition.gradients import Glance, level, unit
from intarsia.composition.methods.clora import CloraOptions, branches, updates
from intarsia.composition.methods.lora_composer import ComposerOptions, begun
from intarsia.composition.tokens import positions
from intarsia.pipelines import schedule
from intarsia.pipelines.attach import Branches, attached
from intarsia.pipelines.denoise import Work
from torch import Tensor, nn

Branch = tuple[Tensor, Tensor, Tensor]  # unconditional and conditional prediction, and the map


@contextmanager
def wanting(denoiser: nn.Module) -> Generator[None]:
    """Weights as other libraries load them: they want gradients, so that a graph keeps every layer's input."""
    try:
        denoiser.requires_grad_(True)
        yield
    finally:
        denoiser.requires_grad_(False)


class Explicit:
    """Attention written out; the map of every layer is kept."""

    def __init__(self, maps: dict[str, Tensor], path: str) -> None:
        self._maps, self._path = maps, path

    def __call__(
        self,
        attn: Any,  # noqa: ANN401
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        q = queries_of(attn, hidden_states)
        k, v = keys_values(attn, hidden_states if encoder_hidden_states is None else encoder_hidden_states)
        shares = probabilities(q, k)
        self._maps[self._path] = shares.mean(1)
        return outcome(attn, shares.to(v) @ v)


def mean_of(maps: dict[str, Tensor], tokens: int, cross: bool) -> Tensor:
    """Average the maps of one grid over the layers."""
    chosen = [one for path, one in maps.items() if is_cross(path) is cross and one.shape[1] == tokens]
    return torch.stack(chosen).mean(0)


def clora(composition: Composition, options: CloraOptions) -> Tensor:
    """Draw with CLoRA as its release does.

    Returns:
        The latents.
    """
    prompts, words = branches(composition)
    rows = [composition.style_names, *((name, *composition.style_names) for name in composition.names)]
    denoiser, grid = composition.model.denoiser, level(composition, options.cell)
    maps: dict[str, Tensor] = {}
    with (
        attached(composition.model.components, composition.attachments) as hung,
        processors(denoiser, {path: Explicit(maps, path) for path in layers(denoiser)}),
        wanting(denoiser),
        torch.enable_grad(),
    ):
        works = composition.begin(
            [composition.encode(hung, prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
        )
        places = [
            [positions(composition.model, *pair, articles=False) for pair in zip(prompts, said, strict=True)]
            for said in words
        ]
        fan = Fan(hung, works, rows)

        def all_branches(leaf: Tensor, timestep: Tensor) -> list[Branch]:
            found: list[Branch] = []
            maps.clear()
            for number in range(len(rows)):
                without, within = fan.halves(leaf, timestep, [number])
                assert without is not None
                found.append((without, within, mean_of(maps, grid[0] * grid[1], cross=True)[-1:]))
            return found

        work, latents, size = works[0], works[0].latents, options.step_size
        for index, timestep in enumerate(work.timesteps):
            leaf = latents.detach().requires_grad_(True)
            found = all_branches(leaf, timestep)
            count = updates(options, index, len(work.timesteps))
            for number in range(count):
                loss = loss_of(torch.cat([map_ for _, _, map_ in found]), places, options.temperature)
                (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
                del loss
                leaf = (leaf - size * unit(work.scheduler, timestep) ** 2 * gradient).detach().requires_grad_(True)
                if number < count - 1 or options.order == "recomputed":
                    found.clear()  # the graphs of one set of branches at a time
                    found = all_branches(leaf, timestep)
            prediction = network_of(work).guide(*_together(found, places, grid, options, index / len(work.timesteps)))
            found.clear()
            latents = _stepped(composition, work, prediction, timestep, leaf.detach())
    return latents


def _together(
    found: Sequence[Branch],
    places: Sequence[Sequence[Sequence[int]]],
    grid: tuple[int, int],
    options: CloraOptions,
    done: float,
) -> tuple[Tensor, Tensor]:
    """Put the branches of a step together: without the prompts and with them."""
    cut = [found[number][2][0, :, at[number]].T.unflatten(1, grid) for number, at in enumerate(places, start=1)]
    masks = territories(cut, options.threshold, options.change)
    if done < options.masks_from:
        masks = torch.ones_like(masks)
    without, within = (fused(torch.cat([branch[half] for branch in found]), masks).detach() for half in (0, 1))
    return without, within


def _stepped(composition: Composition, work: Work, prediction: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
    composition.token.check()
    noise = schedule.random_arguments(work.scheduler, work.generator)
    return work.scheduler.step(prediction, timestep, latents, **noise, return_dict=False)[0]


class Forgetful(Estate):
    """Places whose keys and values are made anew whenever they are wanted, and whose attention is written out."""

    maps: dict[str, Tensor]

    def keys_values(self, attn: Any, path: str, plot: Plot) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        with self._within(plot):
            return keys_values(attn, plot.text)

    def cross(self, attn: Any, path: str, hidden: Tensor, text: Tensor) -> Tensor:  # noqa: ANN401
        q = queries_of(attn, hidden)
        k, v = keys_values(attn, text)
        whole = outcome(attn, probabilities(q, k).to(v) @ v)
        cells, found = self.cells(q.shape[2]), torch.zeros_like(whole)
        noted: list[Tensor] = []
        for plot, mine in zip(self.plots, cells, strict=True):
            k, v = (part[-len(q) :] for part in self.keys_values(attn, path, plot))
            shares = probabilities(q, k)
            noted.append(shares[-1].mean(0))
            with self._within(plot):
                at = mine.nonzero()[:, 0]
                found = found.index_add(1, at, outcome(attn, shares[:, :, at].to(v) @ v))
        self.maps[path] = torch.stack(noted)
        count = cells.sum(0)[:, None]
        return torch.where(count > 0, found / count.clamp(min=1), whole)

    def own(self, attn: Any, path: str, hidden: Tensor) -> Tensor:  # noqa: ANN401
        q, (k, v) = queries_of(attn, hidden), keys_values(attn, hidden)
        shares = probabilities(q, k, self.bias(q))
        self.maps[path] = shares.mean(1)
        return outcome(attn, shares.to(v) @ v)

    def attention(self, path: str) -> Callable[..., Tensor]:
        def run(
            attn: Any,  # noqa: ANN401
            hidden_states: Tensor,
            encoder_hidden_states: Tensor | None = None,
            **_: object,
        ) -> Tensor:
            if encoder_hidden_states is None:
                return self.own(attn, path, hidden_states)
            return self.cross(attn, path, hidden_states, encoder_hidden_states)

        return run


def lora_composer(composition: Composition, options: ComposerOptions) -> Tensor:
    """Draw with LoRA-Composer as its release does; every concept has a place, every part works.

    Returns:
        The latents.
    """
    denoiser, grid = composition.model.denoiser, level(composition, options.cell)
    kept: list[list[Tensor]] = []
    with attached(composition.model.components, composition.attachments) as hung:
        work, plots = begun(composition, hung)
        estate = _estate(composition, hung, plots, options)
        chosen = {path: estate.attention(path) for path in layers(denoiser)}
        with processors(denoiser, chosen), wanting(denoiser):
            latents, last, going = work.latents, float("inf"), True
            count = len(work.timesteps)
            for index, timestep in enumerate(work.timesteps):
                if index == 0:
                    latents = _restarted(estate, plots, grid, work, latents)
                going = going and index / count < options.until
                if going:
                    loss, gradient = _loss(estate, grid, options, work, latents.detach().requires_grad_(True), timestep)
                    going, last = index / count < options.patience or loss <= last, loss
                    if going:
                        ramp = 1 - 0.5 * index / max(1, count - 1)
                        size = options.step_size * ramp**0.5 * unit(work.scheduler, timestep) ** 2
                        latents = latents - size * gradient
                kept.append([one.detach().cpu() for one in estate.maps.values() if one.shape[-2] <= 32 * 32])
                with torch.no_grad():
                    prediction = network_of(work)(latents, timestep)
                latents = _stepped(composition, work, prediction, timestep, latents)
    return latents


def _estate(composition: Composition, hung: Branches, plots: Sequence[Plot], options: ComposerOptions) -> Forgetful:
    parts = Parts(options.regions, options.isolation, options.deltas)
    estate = Forgetful(hung, plots, composition.style_names, composition.grid, Glance(0, on=False), parts)
    estate.maps = {}
    return estate


def _words(estate: Forgetful, grid: tuple[int, int]) -> list[Tensor]:
    cross = mean_of(estate.maps, grid[0] * grid[1], cross=True)
    return [maps[:, list(plot.words)].T.unflatten(1, grid) for maps, plot in zip(cross, estate.plots, strict=True)]


def _restarted(estate: Forgetful, plots: Sequence[Plot], grid: tuple[int, int], work: Work, latents: Tensor) -> Tensor:
    with torch.no_grad():
        network_of(work).conditional(latents, work.timesteps[0])
    order = sorted(range(len(plots)), key=lambda at: plots[at].concept.order)
    words, masks = _words(estate, grid), estate.masks()
    return restart(latents, [words[at].sum(0) for at in order], [masks[plots[at].concept.name] > 0 for at in order])


def _loss(
    estate: Forgetful,
    grid: tuple[int, int],
    options: ComposerOptions,
    work: Work,
    leaf: Tensor,
    timestep: Tensor,
) -> tuple[float, Tensor]:
    with torch.enable_grad():
        network_of(work).conditional(leaf, timestep)
        tokens = grid[0] * grid[1]
        places = list(estate.cells(tokens).unflatten(1, grid))
        own = mean_of(estate.maps, tokens, cross=False)[0]
        loss = total(_words(estate, grid), own, places, (options.enhance, options.fill, options.keep))
        (gradient,) = torch.autograd.grad(loss, leaf)
    return float(loss.detach()), gradient
