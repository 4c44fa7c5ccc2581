"""One picture to be composed: everything a method may know, and what methods share in getting it under way."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..pipelines import schedule
from ..pipelines.attach import Attachment, Branches
from ..pipelines.boxes import Box
from ..pipelines.denoise import Work
from ..pipelines.errors import MemoryLimitError
from ..pipelines.events import CancelToken
from ..pipelines.models import Model
from ..pipelines.modular import Prompt
from ..pipelines.network import Network


@dataclass(frozen=True)
class Concept:
    """One concept, resolved.

    Args:
        attachment: Its adapter at its weight, under the concept's name.
        prompt: What its place shows.
        phrase: Its words in the prompt of the whole picture.
        box: Its place, if it is a box.
        mask: Its place, if it was painted: `(height, width)` of any size, from 0 to 1; counts before the box.
        order: Higher lies on top.
    """

    attachment: Attachment
    prompt: str = ""
    phrase: str = ""
    box: Box | None = None
    mask: Tensor | None = None
    order: int = 0

    @property
    def name(self) -> str:
        return self.attachment.name

    @property
    def placed(self) -> bool:
        return self.box is not None or self.mask is not None


@dataclass(frozen=True)
class Composition:
    """One picture.

    Args:
        model: Loaded; nothing is attached to it.
        concepts: At least one.
        styles: Adapters that act on the whole picture.
        prompt: Of the whole.
        negative: What it must not show.
        seed: Everything random follows from it.
        steps: Denoising steps.
        guidance: Guidance scale.
        size: (width, height) in pixels.
        scheduler: Sampler, as in a request.
        together: Most branches in one batch; None for all.
        token: Carries the wish to stop into optimisation loops; the denoising loop checks it too.
        memo: What a method keeps from one picture to the next of the same layout, under its own name.
    """

    model: Model
    concepts: tuple[Concept, ...]
    styles: tuple[Attachment, ...] = ()
    prompt: str = ""
    negative: str = ""
    seed: int = 0
    steps: int = 20
    guidance: float = 5.0
    size: tuple[int, int] = (512, 512)
    scheduler: str = "default"
    together: int | None = None
    token: CancelToken = field(default_factory=CancelToken)
    memo: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def names(self) -> tuple[str, ...]:
        """Of the concepts, in their order."""
        return tuple(concept.name for concept in self.concepts)

    @property
    def style_names(self) -> tuple[str, ...]:
        return tuple(style.name for style in self.styles)

    @property
    def attachments(self) -> tuple[Attachment, ...]:
        """Everything to hang on: the concepts, then the styles."""
        return (*(concept.attachment for concept in self.concepts), *self.styles)

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of the latents; for transformers of the tokens, which are two cells wide."""
        cells = 8 if self.model.spec.denoiser == "unet" else 16
        return self.size[1] // cells, self.size[0] // cells

    def encode(self, hung: Branches, prompt: str, names: Iterable[str]) -> Prompt:
        """Read a prompt with some of the adapters acting on the text encoders; they stay active."""
        hung.activate(names)
        with torch.no_grad():
            return self.model.engine.encode(prompt, self.negative, self.guidance)

    def begin(self, prompts: Sequence[Prompt]) -> list[Work]:
        """Draw the noise of the seed and set the timesteps, once for each prompt, around one sampler."""
        sampler = schedule.make(self.scheduler, self.model.components["scheduler"], self.model.spec)
        made: list[Work] = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(self.seed)
            with torch.no_grad():
                made.append(self.model.engine.begin(prompt, self.size, self.steps, sampler, generator))
        return made

    def alone(self, name: str) -> Composition:
        """The same picture with one concept only."""
        return replace(self, concepts=tuple(concept for concept in self.concepts if concept.name == name))


class Fan:
    """Several predictions for one picture in one batch: each sample has its own prompt and its own adapters.

    Args:
        hung: The adapters.
        works: One per branch, of one picture and one sampler.
        rows: Names of the adapters of each branch.
        together: Most branches per pass; None for all.
    """

    def __init__(
        self, hung: Branches, works: Sequence[Work], rows: Sequence[Iterable[str]], together: int | None = None
    ) -> None:
        self._hung = hung
        self._networks = [network_of(work) for work in works]
        self._rows = [tuple(row) for row in rows]
        self._most = together or len(works)
        self._joined: dict[tuple[int, ...], Network] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __call__(self, latents: Tensor, timestep: Tensor, which: Sequence[int] | None = None) -> Tensor:
        """Predict, guided.

        Args:
            latents: Of the one picture, `(1, ...)`.
            timestep: 0-d.
            which: Branches; all if None.

        Returns:
            `(branches, ...)`.
        """
        return self._networks[0].guide(*self.halves(latents, timestep, which))

    def halves(
        self, latents: Tensor, timestep: Tensor, which: Sequence[int] | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Predict without and with the prompts, `(branches, ...)` each; the first is None without guidance."""
        found: list[tuple[Tensor | None, Tensor]] = []
        for chunk, network in self._chunks(which):
            with _enough_memory(len(chunk)):
                found.append(network.halves(_repeated(latents, len(chunk)), timestep))
        without = [half for half, _ in found if half is not None]
        return torch.cat(without) if without else None, torch.cat([half for _, half in found])

    def conditional(self, latents: Tensor, timestep: Tensor, which: Sequence[int] | None = None) -> Tensor:
        """Predict with the prompts alone, `(branches, ...)`; may be differentiated."""
        found: list[Tensor] = []
        for chunk, network in self._chunks(which):
            with _enough_memory(len(chunk)):
                found.append(network.conditional(_repeated(latents, len(chunk)), timestep))
        return torch.cat(found)

    def guide(self, unconditional: Tensor | None, conditional: Tensor) -> Tensor:
        """Put two halves together."""
        return self._networks[0].guide(unconditional, conditional)

    def _chunks(self, which: Sequence[int] | None) -> Iterable[tuple[tuple[int, ...], Network]]:
        wanted = tuple(range(len(self._rows)) if which is None else which)
        for start in range(0, len(wanted), self._most):
            chunk = wanted[start : start + self._most]
            self._hung.assign([self._rows[index] for index in chunk])
            yield chunk, self._network(chunk)

    def _network(self, chunk: tuple[int, ...]) -> Network:
        if chunk not in self._joined:
            networks = [self._networks[index] for index in chunk]
            self._joined[chunk] = networks[0] if len(networks) == 1 else Network.together(networks)
        return self._joined[chunk]


@contextmanager
def _enough_memory(count: int) -> Generator[None]:
    """Say what would fit where a batch of predictions does not.

    Raises:
        MemoryLimitError: With half as many as the way out.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        if count > 1:
            way = f"Set At once to {count // 2}: they are made in turns then."
        else:
            way = "Lower the size, or choose a method with one prediction per step, such as Region or Merge."
        raise MemoryLimitError(f"There is no room for {count} predictions at once.", way) from None


def network_of(work: Work) -> Network:
    """The plain network of a work just begun."""
    assert isinstance(work.network, Network)
    return work.network


def _repeated(latents: Tensor, count: int) -> Tensor:
    return latents if count == 1 else latents.expand(count, *latents.shape[1:])


def shares(weights: Sequence[float]) -> list[float]:
    """Weights as parts of their sum; equal parts where that is zero."""
    total = sum(weights)
    return [weight / total for weight in weights] if total else [1 / len(weights)] * len(weights)
