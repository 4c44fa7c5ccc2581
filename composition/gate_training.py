"""Train the gates of AutoLoRA on a model: let an adapter through where its prompt asks for it, and keep others out.

Every step takes a picture, its adapter and one more; the gates learn to predict the picture with its own prompt (L1),
and not with the other's: L1 + max(0, margin - L2) (arXiv:2508.02107). Deviations: one other adapter instead of one and
a decomposed "global" one, and models that predict noise or velocity only.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor
from torch.nn import functional as F

from ..pipelines.attach import Attachment, Branches, attached
from ..pipelines.denoise import Work
from ..pipelines.errors import InputError
from ..pipelines.events import Artifact, CancelToken, Event, Metric, Progress
from ..pipelines.models import Model
from ..pipelines.options import Options, option
from ..pipelines.requests import MAX_SEED
from .composition import network_of
from .gate import Gate, initial, widths, write_gate


class GateOptions(Options):
    """Options of training gates."""

    steps: int = option(200, label="Steps", help="One picture each.", low=1, high=100_000, unit="steps")
    rate: float = option(1e-2, label="Learning rate", help="Of AdamW, falling to zero by a cosine.", low=0, high=1)
    margin: float = option(0.5, label="Margin", help="How wrong the other's prompt must be.", low=0, high=10)
    dropped: float = option(0.3, label="Prompts dropped", help="Share of steps without a prompt.", low=0, high=1)
    save_every: int = option(100, label="Save every", help="Steps between two files.", low=1, high=100_000)
    seed: int = option(0, label="Seed", help="Everything random follows from it.", low=0, high=MAX_SEED)


@dataclass(frozen=True)
class Lesson:
    """One picture to learn from.

    Args:
        clean: `(1, channels, height / 8, width / 8)`, as the denoiser has latents.
        adapter: Name of the attachment that was trained on it, or on its like.
        prompt: What it shows.
    """

    clean: Tensor
    adapter: str
    prompt: str


class School:
    """Asks a model with adapters and gates how wrong it is about a lesson.

    Args:
        model: Loaded.
        hung: The adapters on it.
        lessons: All there are.

    Raises:
        InputError: The model predicts neither noise nor velocity, or the pictures differ in size.
    """

    def __init__(self, model: Model, hung: Branches, lessons: Sequence[Lesson]) -> None:
        own = model.components["scheduler"].config
        self._kind: str = own.get("prediction_type", "flow_prediction")
        if self._kind not in ("epsilon", "v_prediction"):
            raise InputError(f"Gates cannot be trained on {model.spec.title} yet.", "Choose an SD1.5 or SDXL model.")
        if len({lesson.clean.shape for lesson in lessons}) != 1:
            raise InputError("The pictures to learn from differ in size.", "Scale them to one size.")
        self._model, self._hung = model, hung
        self.noising = cast(Any, DDPMScheduler.from_config(own))
        sides = lessons[0].clean.shape[2:]
        self._size = (sides[1] * 8, sides[0] * 8)
        self._works: dict[tuple[str, str], Work] = {}

    def work(self, prompt: str, adapter: str) -> Work:
        """The network with a prompt, read with one adapter's text encoders."""
        if (prompt, adapter) not in self._works:
            self._hung.activate([adapter] if adapter else [])
            with torch.no_grad():
                read = self._model.engine.encode(prompt, "", 1.0)
                generator = torch.Generator().manual_seed(0)
                self._works[prompt, adapter] = self._model.engine.begin(read, self._size, 1, self.noising, generator)
        return self._works[prompt, adapter]

    def wrong(
        self, lesson: Lesson, said: Work, others: Sequence[str], rng: torch.Generator, gate: Gate | None
    ) -> Tensor:
        """Mean square error of the prediction, with the lesson's adapter and others on the model.

        Args:
            lesson: What the picture is.
            said: The network with the prompt.
            others: Names of further adapters that act.
            rng: Draws time and noise.
            gate: None for the plain sum.
        """
        steps = self.noising.config.num_train_timesteps
        timestep = torch.randint(steps, (1,), generator=rng)
        clean = lesson.clean
        noise = torch.randn(clean.shape, generator=rng).to(clean)
        at = timestep.to(clean.device)
        target = noise if self._kind == "epsilon" else self.noising.get_velocity(clean, noise, at)
        acting = {lesson.adapter, *others}
        if gate is None:
            self._hung.activate(acting)
        else:
            self._hung.combine(gate.fuse)
            self._hung.mute(set(self._hung.names) - acting)
        answer = network_of(said).conditional(self.noising.add_noise(clean, noise, at), at[0])
        self._hung.mute(())
        return F.mse_loss(answer, target)


def train_gate(
    model: Model,
    attachments: Sequence[Attachment],
    lessons: Sequence[Lesson],
    options: GateOptions,
    path: Path,
    token: CancelToken,
) -> Iterator[Event]:
    """Train gates and write them; the same seed gives the same file.

    Args:
        model: Loaded; as before afterwards, whatever happens.
        attachments: At least two adapters.
        lessons: Pictures, each of one of these adapters.
        options: How.
        path: Where to write; the folder must exist.
        token: Checked before every step; a stop keeps the last file written.

    Yields:
        Progress and loss of every step, and the file whenever it is written.

    Raises:
        InputError: There are too few adapters or pictures, the model cannot be trained, or the loss is not a number.
        Cancelled: A stop was asked for.
    """
    names = [attachment.name for attachment in attachments]
    if len(names) < 2 or not lessons:
        raise InputError("Gates learn from two adapters or more, and their pictures.", "Add an adapter and a picture.")
    if lost := sorted({lesson.adapter for lesson in lessons} - set(names)):
        raise InputError(f"There is a picture of {lost[0]}, but no such adapter.", f"Adapters: {', '.join(names)}.")
    start = initial(widths(model.components, tuple(attachments)), options.seed)
    layers = {path: tensor.to(model.device).requires_grad_() for path, tensor in start.layers.items()}
    gate, leaves = Gate(layers, trained=True), list(layers.values())
    adam = torch.optim.AdamW(leaves, lr=options.rate)
    with attached(model.components, attachments) as hung, _resting(model):
        school = School(model, hung, lessons)
        for number in range(options.steps):
            token.check()
            rng = generator(options.seed, number)
            with torch.enable_grad():
                loss = _loss(school, lessons, names, options, rng, gate)
                gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise InputError(f"The training diverged at step {number + 1}.", "Lower the learning rate.")
            for group in adam.param_groups:
                group["lr"] = options.rate * 0.5 * (1 + math.cos(math.pi * number / options.steps))
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.grad = gradient
            adam.step()
            done = number + 1
            yield Progress(stage="train", step=done, total=options.steps)
            yield Metric(name="loss", value=value, step=done)
            if done % options.save_every == 0 or done == options.steps:
                write_gate(path, gate, model.denoiser, {"steps": done, "seed": options.seed})
                yield Artifact(kind="checkpoint", path=str(path), label=f"{done} steps", step=done)


def _loss(
    school: School,
    lessons: Sequence[Lesson],
    names: Sequence[str],
    options: GateOptions,
    rng: torch.Generator,
    gate: Gate,
) -> Tensor:
    lesson = lessons[_draw(len(lessons), rng)]
    rest = [name for name in names if name != lesson.adapter]
    other = rest[_draw(len(rest), rng)]
    if float(torch.rand((), generator=rng)) < options.dropped:
        return school.wrong(lesson, school.work("", ""), [other], rng, gate)
    own = school.wrong(lesson, school.work(lesson.prompt, lesson.adapter), [other], rng, gate)
    theirs = [one for one in lessons if one.adapter == other]
    if not theirs or not options.margin:
        return own
    prompt = theirs[_draw(len(theirs), rng)].prompt
    away = school.wrong(lesson, school.work(prompt, other), [other], rng, gate)
    return own + (options.margin - away).clamp(min=0)


def compared(
    model: Model,
    attachments: Sequence[Attachment],
    lessons: Sequence[Lesson],
    arms: Mapping[str, Gate | None],
    draws: int,
    seed: int,
    token: CancelToken,
) -> dict[str, float]:
    """Measure gates, or the plain sum (None), on pictures: the mean loss with every other adapter in turn.

    All arms see the same times and noise. The arm "alone" is added: each picture's adapter without another.

    Raises:
        Cancelled: A stop was asked for.
    """
    sums = dict.fromkeys([*arms, "alone"], 0.0)
    count = 0
    with attached(model.components, attachments) as hung, _resting(model), torch.no_grad():
        school = School(model, hung, lessons)
        for index, lesson in enumerate(lessons):
            said = school.work(lesson.prompt, lesson.adapter)
            for other in (name for name in hung.names if name != lesson.adapter):
                for draw in range(draws):
                    token.check()
                    count += 1
                    ask = _asker(school, lesson, said, f"{seed} {index} {draw}")
                    for name, gate in arms.items():
                        sums[name] += ask([other], gate)
                    sums["alone"] += ask([], None)
    return {name: value / count for name, value in sums.items()}


def _asker(school: School, lesson: Lesson, said: Work, key: str) -> Callable[[Sequence[str], Gate | None], float]:
    def ask(others: Sequence[str], gate: Gate | None) -> float:
        return float(school.wrong(lesson, said, others, generator(key, 0), gate))

    return ask


def generator(seed: int | str, step: int) -> torch.Generator:
    """Give the source of everything random in one step."""
    mixed = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed[:8], "big") >> 1)


def _draw(count: int, rng: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=rng))


@contextmanager
def _resting(model: Model) -> Generator[None]:
    """Let a model with CPU offload go back to the CPU, whatever happened."""
    try:
        yield
    finally:
        model.rest()
