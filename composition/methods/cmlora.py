"""CMLoRA: one adapter dominates at a time, those with fine detail first; the others run from what is kept of them.

Paper: Cached Multi-LoRA Composition, arXiv:2502.04923. Every step averages one prediction per concept, the dominant one
c times as heavy as each other (c = N - 1/2 at first). It is computed in full; the others without the denoiser's middle,
with the result their middle had when it last ran. Who dominates changes at the refresh steps R: every second step up to
3/8 of all, every third up to 7/8, then every second. Early it goes round among all but the lowest frequencies, late the
window slides on and takes these in.

Where the released code does otherwise, `compat="release"` does too (but for the profile, which there is the first
letters of the adapters' names, and for one batch in place of N passes):
- interval 0, the paper's own, and 1 compute everything in full: nothing is ever kept;
- the dominant one is computed in full only where its turn begins;
- late turns renew nothing, so all that is kept stays as it was when the late part began;
- c stays N - 1/2: its decay is computed after the weights it is meant for;
- the online score is no number on 64 x 64 latents, and the late part begins after the first step.

Ours: c falls by 1/2^k after the k-th turn (k from 0), not below 1; late turns begin after 121 of 220 steps, in parts of
all; the lowest score alone is low; the number of rings of the online score; `renew="all"`; transformers.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ...pipelines.errors import InputError
from ...pipelines.options import Options, option
from ..layout import ComposeRequest
from ..method import CompositionMethod, Drawing

if TYPE_CHECKING:
    from torch import Tensor

    from ...pipelines.hooks import Step
    from ..composition import Composition, Fan
    from ..middle import Middle


class CmloraOptions(Options):
    """Options of CMLoRA."""

    order: Literal["profile", "given"] = option(
        "profile", label="Order", help="Highest frequencies first: by a picture of each adapter, or as in the layout."
    )
    preview_steps: int = option(10, label="Steps of a profile", help="Of each adapter's picture.", low=1, high=100)
    low: int = option(
        1, label="Low ones", help="How many of the last in order wait until the late part.", low=0, high=9
    )
    phases: Literal["steps", "online"] = option(
        "steps",
        label="Late part begins",
        help="After a share of the steps, or when the latents have lost detail.",
    )
    early: float = option(0.55, label="Early part", help="Share of the steps, with phases by steps.", low=0, high=1)
    threshold: float = option(
        0.4, label="Threshold", help="High-frequency score below which it is late, with phases online.", low=0, high=1
    )
    interval: int = option(
        0, label="Interval", help="Steps of a turn; 0: 2, 3 and 2, as in the paper; 1: nothing is kept.", low=0, high=50
    )
    renew: Literal["dominant", "all"] = option(
        "dominant", label="Renewed", help="Whose middle runs where a turn begins; all is slower and more exact."
    )
    emphasis: float | None = option(
        None, label="Emphasis", help="How heavy the dominant one is at first. Empty: concepts less 1/2.", low=1, high=20
    )
    decay: bool = option(True, label="Decay", help="Let the emphasis fall with every turn, down to 1.")
    depth: int = option(
        2, label="Blocks at each end", help="That always run, with transformers.", low=1, high=16, unit="blocks"
    )
    compat: Literal["paper", "release"] = option(
        "paper", label="As in", help="release: with the defects of the published code, which sets renewal and decay."
    )


def refreshes(total: int, interval: int) -> frozenset[int]:
    """The steps at which a turn begins, of `total`; interval 0 is every 2nd, 3rd and 2nd step."""
    if interval:
        return frozenset(range(0, total, interval))
    first, last = int(0.375 * total), int(0.875 * total)
    return frozenset((*range(0, first, 2), *range(first, last, 3), *range(last, total, 2)))


def emphasis(count: int, turns: int, options: CmloraOptions) -> float:
    """How much heavier the dominant one is than each other, after so many turns were over."""
    first = count - 0.5 if options.emphasis is None else options.emphasis
    if not options.decay or options.compat == "release":
        return first
    return max(1.0, first - 2 * (1 - 0.5**turns))  # the sum of 1/2^k


def parts(count: int, dominant: int, c: float) -> list[float]:
    """Share of each prediction: w/N with w = N / (c + N - 1) of the paper, and c times that; they add up to 1."""
    return [(c if index == dominant else 1.0) / (c + count - 1) for index in range(count)]


@dataclass(frozen=True)
class Turn:
    """What one step does; concepts by their index in the composition.

    Args:
        dominant: Who dominates.
        stale: Whose kept middle is dropped first.
        partial: Whether those with a kept middle run without it.
        shares: Of each prediction.
    """

    dominant: int
    stale: frozenset[int]
    partial: bool
    shares: Sequence[float]


class Cycle:
    """Counts turns; asked once for every step, in their order.

    Args:
        order: Indices of the concepts, highest frequencies first.
        options: Of the method.
        total: Steps.
    """

    def __init__(self, order: Sequence[int], options: CmloraOptions, total: int) -> None:
        self._order, self._options = tuple(order), options
        self._window = len(order) - options.low
        self._refreshes = refreshes(total, options.interval)
        self._turns = 0

    def turn(self, index: int, early: bool) -> Turn:
        """Say what a step does.

        Args:
            index: Counter from 0.
            early: Whether it is in the early part.
        """
        options, count = self._options, len(self._order)
        begins = index in self._refreshes
        self._turns += begins
        place = (self._turns - 1) % self._window + (0 if early else options.low)
        dominant = self._order[place]
        c = emphasis(count, self._turns - 1, options)
        if options.compat == "release":
            stale = frozenset({dominant}) if begins and (early or not options.low) else frozenset[int]()
            return Turn(dominant, stale, options.interval > 1, parts(count, dominant, c))
        everybody = begins and options.renew == "all"
        stale = frozenset(self._order) if everybody else frozenset({dominant})
        return Turn(dominant, stale, options.interval != 1, parts(count, dominant, c))


class _Phases:
    """A step hook that knows whether the early part lasts, and asks the cycle for the turn of each step."""

    def __init__(self, composition: Composition, cycle: Cycle, options: CmloraOptions) -> None:
        self._composition, self._cycle, self._options = composition, cycle, options
        self._score = 1.0
        self.now: Turn | None = None
        self.full = 0  # predictions that were computed in full in this step

    def before(self, step: Step) -> Tensor:
        if self._options.phases == "online":
            late = self._options.compat == "release" and step.index > 0
            early = not late and self._score >= self._options.threshold
        else:
            early = step.index < round(self._options.early * step.total)
        self.now = self._cycle.turn(step.index, early)
        return step.latents

    def after(self, step: Step) -> Tensor:
        if self._options.phases == "online":
            from ..frequency import latent_score

            spatial = self._composition.model.engine.spatial(step.latents, self._composition.size)
            self._score = latent_score(spatial[0])
        return step.latents

    def facts(self) -> Mapping[str, float]:
        """The dominant concept (counted from 1), how many were computed in full, and the online score."""
        told = {} if self.now is None else {"dominant": self.now.dominant + 1.0, "computed in full": float(self.full)}
        return told | ({"high frequencies": self._score} if self._options.phases == "online" else {})


def predictions(
    fan: Fan, middle: Middle, names: Sequence[str], turn: Turn, together: int, latents: Tensor, timestep: Tensor
) -> tuple[Tensor, int]:
    """Predict with every concept, in full or from what is kept of it.

    Args:
        fan: One branch per concept.
        middle: Of the denoiser.
        names: Of the concepts, which name what is kept.
        turn: What the step does.
        together: Most branches in one batch.
        latents: `(1, ...)`.
        timestep: 0-d.

    Returns:
        `(concepts, ...)`, and how many were computed in full.
    """
    import torch

    middle.forget(names[index] for index in turn.stale)
    kept = middle.kept if turn.partial else {}
    full = [index for index, name in enumerate(names) if name not in kept]
    found: dict[int, Tensor] = {}
    for which, run in ((full, middle.whole), ([i for i in range(len(names)) if i not in full], middle.without)):
        for start in range(0, len(which), together):
            chunk = which[start : start + together]
            with run([names[index] for index in chunk]):
                found |= zip(chunk, fan(latents, timestep, chunk), strict=True)
    return torch.stack([found[index] for index in range(len(names))]), len(full)


def _order(composition: Composition, options: CmloraOptions) -> list[int]:
    """Highest frequencies first; tells the page of the profiles."""
    if options.order == "given":
        return list(range(len(composition.concepts)))
    from ..frequency import ordered
    from ..spectra import for_page, profiles

    memo: dict[str, Any] = composition.memo.setdefault("cmlora", {})
    found = profiles(composition, options.preview_steps, memo.setdefault("profiles", {}))
    memo["spectrum"] = for_page(composition.names, found, (composition.size[1], composition.size[0]))
    return ordered(memo["spectrum"]["scores"])


@contextmanager
def _attach(composition: Composition, options: CmloraOptions) -> Generator[Drawing]:
    from ...pipelines.attach import attached
    from ...pipelines.step_ranges import StepRanges
    from ..composition import Fan
    from ..middle import Middle

    names, order = composition.names, _order(composition, options)
    with attached(composition.model.components, composition.attachments) as hung:
        prompt = composition.encode(hung, composition.prompt, hung.names)
        works = composition.begin([prompt] * len(names))
        together = composition.together or len(names)
        fan = Fan(hung, works, [(name, *composition.style_names) for name in names], together)
        middle = Middle(composition.model.denoiser, options.depth)
        phases = _Phases(composition, Cycle(order, options, len(works[0].timesteps)), options)

        def network(latents: Tensor, timestep: Tensor) -> Tensor:
            assert phases.now is not None  # the hook stands before the network
            each, phases.full = predictions(fan, middle, names, phases.now, together, latents, timestep)
            shares = each.new_tensor(phases.now.shares).view(-1, *[1] * (each.ndim - 1))
            return (shares * each).sum(0, keepdim=True)

        hooks = (phases, StepRanges(hung, composition.attachments))
        yield Drawing(replace(works[0], network=network), hooks, facts=phases.facts)


def _check(request: ComposeRequest, options: CmloraOptions) -> None:
    if options.low >= len(request.concepts):
        raise InputError(
            f"CMLoRA cannot let {options.low} of {len(request.concepts)} concepts wait.",
            f"Choose at most {len(request.concepts) - 1} as low ones.",
        )


METHOD = CompositionMethod(
    "cmlora", "CMLoRA", "One adapter dominates at a time, fine detail first; the others run on what is kept of them.",
    "arXiv:2502.04923",
    CmloraOptions, _attach, least=2, check=_check,
)  # fmt: skip
