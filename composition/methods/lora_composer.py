"""LoRA-Composer: concepts in boxes or masks; each reads its own prompt there, and the latents are drawn into place.

Region cross-attention, concept isolation in self-attention, latents begun anew from the noise that suits each concept,
and optimised so that its words fill its place. Paper: arXiv:2403.11627, code Young98CN/LoRA_Composer.

Deviations: plain LoRA files serve (there ED-LoRAs with an embedding per layer); words are found by the tokenizer (there
by blanks); masks are places too; keys in a shared cell are seen by both concepts; steps are fractions (there of 50);
step sizes are for what the network sees, whatever the sampler's scale; the update of the step whose loss rose is left
out. The ramp of the step size is the code's square root (the paper says linear), as are the weights of the losses. One
can let the adapters act in their places' self-attention and feed-forward too, which the code leaves out (`deltas`).
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ...pipelines.errors import InputError
from ...pipelines.options import Options, option
from ..layout import ComposeRequest
from ..method import UNETS, CompositionMethod, Drawing

if TYPE_CHECKING:
    from torch import Tensor

    from ...pipelines.attach import Branches
    from ...pipelines.denoise import Work
    from ...pipelines.hooks import Step
    from ..composer_attention import Estate, Plot
    from ..composition import Composition, Concept


class ComposerOptions(Options):
    """Options of LoRA-Composer."""

    regions: bool = option(True, label="Region attention", help="Each place reads its concept's own prompt.")
    isolation: bool = option(True, label="Isolation", help="Places do not see each other in self-attention.")
    restart: bool = option(
        True, label="New start", help="Begin each place with the patch of noise its concept attends to most."
    )
    deltas: bool = option(
        False, label="All layers", help="Adapters act in their places' self-attention and feed-forward too."
    )
    step_size: float = option(
        20.0, label="Step size", help="Of an update at the start; 0 updates nothing.", low=0, high=1000
    )
    until: float = option(0.5, label="Updates until", help="Part of the steps.", low=0, high=1)
    patience: float = option(
        0.1, label="Patience", help="Part of the steps after which a rising loss ends the updates.", low=0, high=1
    )
    enhance: float = option(
        8.0, label="Enhancement", help="Weight of the loss that wants a concept's words attended to.", low=0, high=100
    )
    fill: float = option(
        2.0, label="Fill", help="Weight of the loss that wants them over the whole place.", low=0, high=100
    )
    keep: float = option(
        10.0, label="Keep inside", help="Weight of the loss on self-attention that leaves a place.", low=0, high=100
    )
    cell: Literal["auto", "32", "16"] = option(
        "auto", label="Map cell", help="Pixels a cell of the maps is wide; auto: 32, 16 where a side is below 512."
    )


@dataclass
class _Guidance:
    """Begins the latents anew before the first step, and updates them before the early ones.

    Args:
        composition: The picture.
        work: Of the base.
        estate: The places; without any, nothing is done.
        options: As given.
        grid: (height, width) of the maps.
    """

    composition: Composition
    work: Work
    estate: Estate
    options: ComposerOptions
    grid: tuple[int, int]
    last: float = float("inf")
    going: bool = True
    facts: dict[str, float] = field(default_factory=dict[str, float])

    def before(self, step: Step) -> Tensor:
        latents, timestep = step.latents, self.work.timesteps[step.index]
        if not self.estate.plots:
            return latents
        if step.index == 0 and self.options.restart:
            latents = self._restarted(latents, timestep)
        done = step.index / step.total
        self.going = self.going and done < self.options.until and self.options.step_size > 0
        if not self.going:
            return latents
        loss, gradient = self._loss(latents, timestep)
        self.going = done < self.options.patience or loss <= self.last
        self.last = self.facts["loss"] = loss
        if not self.going:
            return latents
        from ..gradients import unit

        ramp = 1 - 0.5 * step.index / max(1, step.total - 1)
        self.facts["updates"] = self.facts.get("updates", 0) + 1
        return latents - self.options.step_size * ramp**0.5 * unit(self.work.scheduler, timestep) ** 2 * gradient

    def after(self, step: Step) -> Tensor:
        return step.latents

    def _restarted(self, latents: Tensor, timestep: Tensor) -> Tensor:
        import torch

        from ..composer_losses import restart

        with torch.no_grad(), self._looking():
            cross, _ = self._maps(latents, timestep)
        masks = self.estate.masks()
        order = sorted(range(len(cross)), key=lambda at: self.estate.plots[at].concept.order)
        places = [masks[self.estate.plots[at].concept.name] > 0 for at in order]
        return restart(latents, [cross[at].sum(0) for at in order], places)

    def _loss(self, latents: Tensor, timestep: Tensor) -> tuple[float, Tensor]:
        """The loss at the latents, and its gradient."""
        import torch

        from ..composer_losses import total
        from ..gradients import derived, pulled_back

        weights = self.options.enhance, self.options.fill, self.options.keep
        places = list(self.estate.cells(self.grid[0] * self.grid[1]).unflatten(1, self.grid))
        leaf = latents.detach().requires_grad_(True)
        with torch.enable_grad(), self._looking():
            cross, own = self._maps(leaf, timestep)
            loss, wanted = derived([*cross, own], lambda maps: total(maps[:-1], maps[-1], places, weights))
            return float(loss), pulled_back([*cross, own], wanted, leaf)

    def _maps(self, latents: Tensor, timestep: Tensor) -> tuple[list[Tensor], Tensor]:
        """Of each concept, the maps of its words `(words, height, width)`; and self-attention `(cells, cells)`."""
        from ..composition import network_of

        self.composition.token.check()
        glance = self.estate.glance
        glance.run(lambda: network_of(self.work).conditional(latents, timestep))
        cross = glance.mean()  # (concepts, cells, words)
        words = [
            maps[:, list(plot.words)].T.unflatten(1, self.grid)
            for maps, plot in zip(cross, self.estate.plots, strict=True)
        ]
        return words, glance.mean(own=True)[0]

    @contextmanager
    def _looking(self) -> Generator[None]:
        """Keep maps within; as long as a graph is used, for layers may be run again."""
        glance = self.estate.glance
        glance.on = True
        try:
            yield
        finally:
            glance.on = False
            glance.clear()


def _said(concept: Concept) -> tuple[str, str]:
    """A concept's own prompt with its trigger words, and its words in there."""
    from ..tokens import with_trigger

    prompt = concept.prompt or concept.phrase
    known = concept.phrase and concept.phrase.casefold() in prompt.casefold()
    phrase = concept.phrase if known else prompt.partition(",")[0]
    return with_trigger(prompt, phrase, concept.attachment.adapter.trigger)


def begun(composition: Composition, hung: Branches) -> tuple[Work, list[Plot]]:
    """Read the prompts: the base without any concept, and each concept's own with its adapter.

    Raises:
        InputError: A concept's own prompt is longer than the encoder reads.
    """
    from ..composer_attention import Plot
    from ..composition import network_of
    from ..tokens import positions

    styles = composition.style_names
    placed = [concept for concept in composition.concepts if concept.placed]
    said = [_said(concept) for concept in placed]
    prompts = [composition.encode(hung, composition.prompt, styles)]
    prompts += [
        composition.encode(hung, prompt, (concept.name, *styles))
        for concept, (prompt, _) in zip(placed, said, strict=True)
    ]
    base, *works = composition.begin(prompts)
    return base, [
        Plot(concept, network_of(work).text, tuple(positions(composition.model, *pair, articles=False)))
        for concept, work, pair in zip(placed, works, said, strict=True)
    ]


@contextmanager
def _attach(composition: Composition, options: ComposerOptions) -> Generator[Drawing]:
    from ...pipelines.attach import attached
    from ...pipelines.step_ranges import StepRanges
    from ..attention import processors
    from ..composer_attention import Estate, Parts
    from ..gradients import Glance, level

    denoiser = composition.model.denoiser
    with attached(composition.model.components, composition.attachments) as hung:
        work, plots = begun(composition, hung)
        grid = level(composition, options.cell)
        parts = Parts(options.regions, options.isolation, options.deltas)
        glance = Glance(grid[0] * grid[1], on=False)
        estate = Estate(hung, plots, composition.style_names, composition.grid, glance, parts)
        with processors(denoiser, estate.processors(denoiser)):
            guidance = _Guidance(composition, work, estate, options, grid)
            hooks = (StepRanges(hung, composition.attachments), guidance)  # updates see the adapters of their step
            yield Drawing(work, hooks, estate.masks, lambda: guidance.facts)


def _check(request: ComposeRequest, options: ComposerOptions) -> None:
    for use in request.concepts:
        if not use.prompt.strip():
            raise InputError(f"LoRA-Composer needs a prompt for {use.called}.", "Say what its place shows.")


METHOD = CompositionMethod(
    "lora_composer", "LoRA-Composer", "Each place reads its own prompt, and the latents are drawn into place.",
    "arXiv:2403.11627",
    ComposerOptions, _attach, frozenset({"places", "gradients"}), UNETS, check=_check,
)  # fmt: skip
