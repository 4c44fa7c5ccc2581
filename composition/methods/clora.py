"""CLoRA: a branch per concept and a plain one; their attention is pulled apart, then each paints where it attends.

The latents follow the gradient of a contrastive loss between the concepts' cross-attention maps (NT-Xent); masks cut
from the maps then choose whose prediction counts where. Paper: arXiv:2403.19776 (method section), code gemlab-vt/clora.

Deviations: maps and gradients are those of the conditional half alone (there both halves are averaged, of which one
attends to the negative prompt). By default the prediction is made anew behind the last update (there it is the one
before it; `order`). Steps are fractions of the picture's steps and extra updates in proportion (there for 50 steps).
The article of a phrase is no word of its own. Step sizes are for what the network sees, whatever the sampler's scale.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from ...pipelines.options import Options, option
from ..method import UNETS, CompositionMethod, Drawing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ...pipelines.denoise import Work
    from ...pipelines.hooks import Step
    from ..composition import Composition
    from ..gradients import Views

REFERENCE = 50  # steps of the release, which extra updates are counted for


class CloraOptions(Options):
    """Options of CLoRA."""

    step_size: float = option(
        20.0, label="Step size", help="Of each update; 20 in the paper's code for SD 1.5.", low=0, high=1000
    )
    until: float = option(0.5, label="Updates until", help="Part of the steps; 0 updates nothing.", low=0, high=1)
    iterations: int = option(
        20, label="Extra updates", help="At some steps, for 50 steps; fewer in proportion.", low=0, high=100
    )
    every: float = option(
        0.2, label="Extra updates every", help="Part of the steps, from the first on; 0 for none.", low=0, high=1
    )
    temperature: float = option(
        0.5, label="Temperature", help="Of the contrast: lower looks at the closest maps.", low=0.01, high=10
    )
    threshold: float = option(
        0.3, label="Mask threshold", help="Part of a map's maximum where its concept begins.", low=0, high=1
    )
    masks_from: float = option(
        0.0, label="Masks from", help="Part of the steps; before it all branches are averaged.", low=0, high=1
    )
    change: Literal["none", "dilate", "erode", "open", "close"] = option(
        "none", label="Change of masks", help="Grow or shrink them by one cell, or both in turn."
    )
    cell: Literal["auto", "32", "16"] = option(
        "auto", label="Map cell", help="Pixels a cell of the maps is wide; auto: 32, 16 where a side is below 512."
    )
    order: Literal["recomputed", "release"] = option(
        "recomputed", label="Order", help="release: go on with the prediction from before the last update."
    )
    graphs: Literal["one", "all"] = option(
        "one", label="Graphs at once", help="all: faster by a third, with every branch's memory."
    )


@dataclass
class _Contrast:
    """Updates the latents before a step, and fuses the branches in it.

    Args:
        views: The branches.
        work: Of the plain branch.
        options: As given.
        names: Of the concepts.
        places: As `loss_of` takes them.
        grid: Of the maps.
    """

    views: Views
    work: Work
    options: CloraOptions
    names: Sequence[str]
    places: Sequence[Sequence[Sequence[int]]]
    grid: tuple[int, int]
    done: float = 0.0
    masks: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"])
    facts: dict[str, float] = field(default_factory=dict[str, float])
    ready: tuple[Tensor | None, Tensor, Tensor] | None = None

    def before(self, step: Step) -> Tensor:
        self.done = step.index / step.total
        latents = step.latents
        count = updates(self.options, step.index, step.total)
        for number in range(count):
            latents = self._update(latents, self.work.timesteps[step.index], number == count - 1)
        return latents

    def after(self, step: Step) -> Tensor:
        return step.latents

    def network(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Predict with every branch and put them together."""
        import torch

        from ..contrast import fused

        without, within, maps = self.ready or self.views.predict(latents, timestep)
        self.ready = None
        masks = self._masks(maps)
        if self.done < self.options.masks_from:
            masks = torch.ones_like(masks)
        self.masks = dict(zip(self.names, masks[1:], strict=True))
        return self.views.fan.guide(None if without is None else fused(without, masks), fused(within, masks))

    def _update(self, latents: Tensor, timestep: Tensor, last: bool) -> Tensor:
        from ..contrast import loss_of
        from ..gradients import derived, unit

        def loss(maps: list[Tensor]) -> Tensor:
            return loss_of(maps[0], self.places, self.options.temperature)

        if last and self.options.order == "release":
            self.ready = self.views.predict(latents, timestep)
            value, (derivatives,) = derived([self.ready[2]], loss)
            gradient = self.views.gradient(latents, timestep, derivatives)
        elif self.options.graphs == "all":
            value, gradient = self.views.loss_gradient(latents, timestep, loss)
        else:
            value, (derivatives,) = derived([self.views.look(latents, timestep)], loss)
            gradient = self.views.gradient(latents, timestep, derivatives)
        self.facts["loss"] = float(value)
        self.facts["updates"] = self.facts.get("updates", 0) + 1
        return latents - self.options.step_size * unit(self.work.scheduler, timestep) ** 2 * gradient

    def _masks(self, maps: Tensor) -> Tensor:
        from ..contrast import territories

        own = [
            maps[number][:, branches[number]].T.unflatten(1, self.grid)  # (words, height, width)
            for number, branches in enumerate(self.places, start=1)
        ]
        return territories(own, self.options.threshold, self.options.change)


def updates(options: CloraOptions, index: int, total: int) -> int:
    """How many updates a step begins with."""
    if index / total >= options.until or not options.step_size:
        return 0
    every = options.every * total
    marked = every > 0 and index in {int(part * every + 1e-9) for part in range(int(total / every) + 1)}
    return 1 + (round(options.iterations * total / REFERENCE) if marked else 0)


def branches(composition: Composition) -> tuple[list[str], list[list[str]]]:
    """The prompt of each branch, the plain one's first, and the words of each concept in each of them.

    Raises:
        InputError: The prompt lacks a concept's words.
    """
    from ..tokens import with_trigger

    concepts = composition.concepts
    told = [with_trigger(composition.prompt, one.phrase, one.attachment.adapter.trigger) for one in concepts]
    prompts = [composition.prompt, *(prompt for prompt, _ in told)]
    words = [
        [own if branch == number else concept.phrase for branch in range(len(prompts))]
        for number, (concept, (_, own)) in enumerate(zip(concepts, told, strict=True), start=1)
    ]
    return prompts, words


@contextmanager
def _attach(composition: Composition, options: CloraOptions) -> Generator[Drawing]:
    from ...pipelines.attach import attached
    from ...pipelines.step_ranges import StepRanges
    from ..composition import Fan
    from ..gradients import Views, glancing, level
    from ..tokens import positions

    styles = composition.style_names
    prompts, words = branches(composition)
    rows = [styles, *((name, *styles) for name in composition.names)]
    with attached(composition.model.components, composition.attachments) as hung:
        works = composition.begin(
            [composition.encode(hung, prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
        )
        places = [
            [positions(composition.model, *pair, articles=False) for pair in zip(prompts, said, strict=True)]
            for said in words
        ]
        grid = level(composition, options.cell)
        with glancing(composition.model.denoiser, grid) as glance:
            fan = Fan(hung, works, rows, composition.together)
            together = composition.together or len(rows)
            views = Views(fan, glance, together, composition.token.check)
            contrast = _Contrast(views, works[0], options, composition.names, places, grid)
            yield Drawing(
                replace(works[0], network=contrast.network),
                (StepRanges(hung, composition.attachments), contrast),  # updates see the adapters of their step
                lambda: contrast.masks,
                lambda: contrast.facts,
            )


METHOD = CompositionMethod(
    "clora", "CLoRA", "Pulls the concepts' attention apart, then each acts where its words attend.",
    "arXiv:2403.19776",
    CloraOptions, _attach, frozenset({"phrases", "gradients"}), UNETS,
)  # fmt: skip
