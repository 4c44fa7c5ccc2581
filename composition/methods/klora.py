"""K-LoRA: at every step each attention layer takes either the content or the style, by the size of their changes.

With S the sum of the k largest entries of |BA|, k = r_c r_s, and gamma the mean ratio of all entries, a layer takes the
content if (S_c / gamma) / (S_s f) > 1, f = alpha t / T + beta; pattern s* takes beta = 0.85 alpha and f modulo alpha.
Deviations from the released code: t / T is the step's index over the number of steps (there a count of layer calls
that fits 50 steps of SDXL only); adapters of any kind with ranks will do, at the factors of their blocks.
An attention layer that only one of both changes takes that one. Layers other than attention, of which the paper's
adapters have none, add both or none, by option. Text encoders read the prompt with both.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ...pipelines.options import Options, option
from ..method import CompositionMethod, Drawing
from ..pair import check_pair, pair

if TYPE_CHECKING:
    from torch import Tensor

    from ...pipelines.attach import Branches
    from ...pipelines.hooks import Step
    from ..composition import Composition
    from ..magnitudes import Magnitudes


class KLoraOptions(Options):
    """Options of K-LoRA."""

    pattern: Literal["s", "s*"] = option(
        "s", label="Pattern", help="s turns from content to style; s* begins with style once, for large transformers."
    )
    alpha: float = option(1.5, label="Alpha", help="How much the style gains from first to last step.", low=0, high=100)
    beta: float = option(
        0.5, label="Beta", help="The style's part at the first step; s* takes 0.85 alpha instead.", low=0, high=100
    )
    others: Literal["both", "none"] = option(
        "both", label="Other layers", help="Which adapters act in layers other than attention."
    )


def favour(progress: float, options: KLoraOptions) -> float:
    """f(t): how much the style is favoured when `progress` of the steps are done."""
    if options.pattern == "s":
        return options.alpha * progress + options.beta
    return (options.alpha * progress + 0.85 * options.alpha) % options.alpha if options.alpha else 0.0


def contents(found: Magnitudes, favoured: float) -> frozenset[str]:
    """Paths of the layers that take the content: S_c > gamma S_s f, the quotient without a division."""
    return frozenset(path for path, top in found.content.items() if top > found.ratio * found.style[path] * favoured)


@dataclass
class _Choice:
    """Sets, before each step, which adapter every layer takes."""

    hung: Branches
    names: tuple[str, str]
    found: Magnitudes
    options: KLoraOptions
    facts: dict[str, float] = field(default_factory=dict[str, float])

    def before(self, step: Step) -> Tensor:
        from ..magnitudes import is_attention

        favoured = favour(step.index / step.total, self.options)
        taken = contents(self.found, favoured)
        content, style = self.names
        plan: dict[str, Mapping[str, float]] = {}
        for path, names in self.hung.paths.items():
            if path in self.found.content:
                plan[path] = {content if path in taken else style: 1.0}
            elif self.options.others == "both" or is_attention(path):
                plan[path] = dict.fromkeys(names, 1.0)
            else:
                plan[path] = {}
        self.hung.spread(lambda path, output: plan[path])
        self.facts |= {"favour": favoured, "content": len(taken) / len(self.found.content)}
        return step.latents

    def after(self, step: Step) -> Tensor:
        return step.latents


@contextmanager
def _attach(composition: Composition, options: KLoraOptions) -> Generator[Drawing]:
    from ...pipelines.attach import attached
    from ...pipelines.step_ranges import StepRanges
    from ..magnitudes import magnitudes

    content, style = pair(composition)
    with attached(composition.model.components, composition.attachments) as hung:
        if "klora" not in composition.memo:
            composition.memo["klora"] = magnitudes(
                composition.model.components, content, style, composition.token
            )  # fmt: skip
        choice = _Choice(hung, (content.name, style.name), composition.memo["klora"], options)
        (work,) = composition.begin([composition.encode(hung, composition.prompt, hung.names)])
        yield Drawing(work, (choice, StepRanges(hung, composition.attachments)), facts=lambda: choice.facts)


METHOD = CompositionMethod(
    "klora", "K-LoRA", "One content and one style: each attention layer takes one of both, step by step.",
    "arXiv:2502.18461", KLoraOptions, _attach, most=2, check=check_pair,
)  # fmt: skip
