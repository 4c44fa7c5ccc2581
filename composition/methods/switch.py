"""Switch: one concept acts at a time, in turn.

Deviations from the paper's code: every turn lasts the same number of steps (there the first lasts one more), each
concept reads the prompt with its own text encoder adapter (there the first one's), and weights stay as set.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...pipelines.options import Options, option
from ..method import CompositionMethod, Drawing

if TYPE_CHECKING:
    from torch import Tensor

    from ...pipelines.attach import Branches
    from ...pipelines.hooks import Step
    from ..composition import Composition


class SwitchOptions(Options):
    """Options of Switch."""

    every: int = option(5, label="Steps per concept", help="Then the next one's turn comes.", low=1, high=200)


def turn(index: int, every: int, count: int) -> int:
    """Whose turn it is at a step: floor(((t - 1) mod (k tau)) / tau) with t = index + 1."""
    return index % (count * every) // every


@dataclass
class _Turns:
    """Keeps the count of steps, and hands the denoiser to the one whose turn it is."""

    hung: Branches
    names: tuple[str, ...]
    styles: Iterable[str]
    every: int
    now: int = 0

    def before(self, step: Step) -> Tensor:
        self.now = turn(step.index, self.every, len(self.names))
        self.hung.activate((self.names[self.now], *self.styles))
        return step.latents

    def after(self, step: Step) -> Tensor:
        return step.latents


@contextmanager
def _attach(composition: Composition, options: SwitchOptions) -> Generator[Drawing]:
    from ...pipelines.attach import attached
    from ...pipelines.step_ranges import StepRanges

    styles = composition.style_names
    with attached(composition.model.components, composition.attachments) as hung:
        prompts = [composition.encode(hung, composition.prompt, (name, *styles)) for name in composition.names]
        works = composition.begin(prompts)
        turns = _Turns(hung, composition.names, styles, options.every)

        def network(latents: Tensor, timestep: Tensor) -> Tensor:
            return works[turns.now].network(latents, timestep)

        yield Drawing(replace(works[0], network=network), (turns, StepRanges(hung, composition.attachments)))


METHOD = CompositionMethod(
    "switch", "Switch", "One concept acts at a time, in turn; styles act always.",
    "arXiv:2402.16843, section 2 (LoRA Switch)",
    SwitchOptions, _attach,
)  # fmt: skip
