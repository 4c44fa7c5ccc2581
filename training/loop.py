"""The only training loop: low-rank layers learn to predict noise (or velocity) on cached latents.

Everything random in step n follows from (seed, n), so a run resumed at n goes on exactly as if it had never stopped.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..pipelines.errors import InputError
from ..pipelines.events import CancelToken, Event, Metric, Progress
from .data import batches
from .encode import Cache, Text
from .layers import TrainedLayers, untaught
from .recipe import Compared, Comparing, Moment, Settings, TrainingOptions, TrainingRecipe
from .schedule import NoiseSchedule

MAX_NORM = 1.0  # of the gradient, as in the B-LoRA and diffusers scripts


@dataclass(frozen=True)
class Task:
    """What the loop is to do.

    Args:
        recipe: Gives the loss.
        options: The recipe's.
        settings: Resolved from the options.
        cache: Latents and embeddings on the denoiser's device.
        schedule: Noise levels and kind of prediction.
        seed: Of the run.
    """

    recipe: TrainingRecipe[Any]
    options: TrainingOptions
    settings: Settings
    cache: Cache
    schedule: NoiseSchedule
    seed: int


@dataclass(frozen=True)
class Batch:
    """Input of one step; first axis of each tensor is the batch.

    Args:
        noisy: `(batch, channels, height / 8, width / 8)`.
        target: Same shape: what the network shall predict.
        timesteps: `(batch,)` integers.
        tokens: `(batch, tokens, width)`.
        added: SDXL's pooled text and size ids; empty for SD1.5.
        clean: What `noisy` was made of, with `noise`; same shape.
        noise: Same shape.
    """

    noisy: Tensor
    target: Tensor
    timesteps: Tensor
    tokens: Tensor
    added: dict[str, Tensor]
    clean: Tensor
    noise: Tensor


class Trainer:
    """Holds the optimizer and takes single steps.

    Args:
        denoiser: U-Net with the trainable layers in it.
        layers: Those layers.
        task: What to do.
    """

    def __init__(self, denoiser: Any, layers: TrainedLayers, task: Task) -> None:  # noqa: ANN401 - a diffusers model
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        self.denoiser, self.layers, self.task = denoiser, layers, task
        self.device, self.dtype = denoiser.device, denoiser.dtype
        # The worker lives for many jobs and devices, accelerate's state for one process: forget the last job's.
        AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore[reportPrivateUsage]
        mixed = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(self.dtype, "no")
        self.accelerator = Accelerator(cpu=self.device.type == "cpu", mixed_precision=mixed)
        self.parameters = list(layers.parameters.values())
        self.adamw = torch.optim.AdamW(
            self.parameters,
            lr=task.settings.learning_rate,
            weight_decay=task.settings.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.optimizer: Any = self.accelerator.prepare(self.adamw)

    def step(self, number: int) -> float:
        """Take step `number` (from 0) and give its loss.

        Raises:
            InputError: The loss is not a number: the run has diverged.
        """
        task = self.task
        rng = generator(task.seed, number)
        batch = self.batch(number, rng)
        compared = self.compared(batch, rng)
        snr = task.schedule.snr(compared.timesteps)
        loss = task.recipe.loss(
            compared.prediction, compared.target, snr, task.options, rng, kind=task.schedule.kind
        )  # fmt: skip
        value = float(loss.detach())
        if not math.isfinite(value):
            raise InputError(
                f"The training diverged at step {number + 1}: its loss is not a number.",
                f"Lower the learning rate; it was {task.settings.learning_rate:g}.",
            )
        rate = task.settings.learning_rate * min(1.0, (number + 1) / (task.settings.warmup + 1))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.parameters, MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value

    def compared(self, batch: Batch, rng: torch.Generator) -> Compared:
        """Make what the loss compares: the answer to `noisy` and its target, or what the recipe makes of the batch."""
        recipe: object = self.task.recipe
        if isinstance(recipe, Comparing):
            moment = Moment(batch.clean, batch.noise, self.task.schedule, Network(self, batch))
            return recipe.compare(moment, self.task.options, rng)
        with self.accelerator.autocast():
            prediction = self.predict(batch)
        return Compared(prediction.float(), batch.target, batch.timesteps)

    def predict(self, batch: Batch) -> Tensor:
        """Run the denoiser: `(batch, channels, height / 8, width / 8)`."""
        return self.denoiser(
            batch.noisy.to(self.dtype),
            batch.timesteps,
            encoder_hidden_states=batch.tokens.to(self.dtype),
            added_cond_kwargs={name: value.to(self.dtype) for name, value in batch.added.items()},
            return_dict=False,
        )[0]

    def batch(self, number: int, rng: torch.Generator) -> Batch:
        """Make the input of step `number`; all draws come from `rng`, on the CPU, so every device sees the same."""
        task = self.task
        examples = task.cache.examples
        chosen = [
            examples[i]
            for i in batches([e.size for e in examples], task.settings.batch, task.seed, number)
        ]  # fmt: skip
        variants = [int(torch.randint(len(e.mean), (), generator=rng)) for e in chosen]
        dropped = torch.rand(len(chosen), generator=rng) < task.settings.caption_dropout
        texts = [task.cache.prompts[-1 if drop else e.prompt] for e, drop in zip(chosen, dropped, strict=True)]
        clean = torch.stack([e.mean[v] for e, v in zip(chosen, variants, strict=True)])
        if chosen[0].deviation is not None:
            spread = torch.stack(
                [e.deviation[v] for e, v in zip(chosen, variants, strict=True) if e.deviation is not None]
            )
            clean = clean + spread * torch.randn(clean.shape, generator=rng).to(clean.device)
        noise = torch.randn(clean.shape, generator=rng).to(clean.device)
        timesteps = torch.randint(len(task.schedule.alphas), (len(chosen),), generator=rng).to(clean.device)
        ids = torch.stack([e.time_ids[v] for e, v in zip(chosen, variants, strict=True)])
        return Batch(
            noisy=task.schedule.noised(clean, noise, timesteps),
            target=task.schedule.target(clean, noise, timesteps),
            timesteps=timesteps,
            tokens=torch.stack([text.tokens for text in texts]),
            added=_added(texts, ids),
            clean=clean,
            noise=noise,
        )


@dataclass(frozen=True)
class Network:
    """A trainer's denoiser as `recipe.Ask`, for the texts of one batch."""

    trainer: Trainer
    batch: Batch

    def __call__(self, noisy: Tensor, timesteps: Tensor, *, taught: bool = True, captions: bool = True) -> Tensor:
        trainer, batch = self.trainer, replace(self.batch, noisy=noisy, timesteps=timesteps)
        if not captions:
            empty = [trainer.task.cache.prompts[-1]] * len(noisy)
            added = _added(empty, batch.added["time_ids"]) if batch.added else {}
            batch = replace(batch, tokens=torch.stack([text.tokens for text in empty]), added=added)
        with trainer.accelerator.autocast():
            if taught:
                return trainer.predict(batch).float()
            with torch.no_grad(), untaught(trainer.denoiser, trainer.layers):
                return trainer.predict(batch).float()


def _added(texts: list[Text], time_ids: Tensor) -> dict[str, Tensor]:
    pooled = [text.pooled for text in texts if text.pooled is not None]
    return {"text_embeds": torch.stack(pooled), "time_ids": time_ids} if pooled else {}


def generator(seed: int, step: int) -> torch.Generator:
    """Give the source of everything random in one step."""
    mixed = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed[:8], "big") >> 1)


def run(
    trainer: Trainer, start: int, token: CancelToken, after: Callable[[int], Iterator[Event]]
) -> Iterator[Event]:  # fmt: skip
    """Train from step `start` to the end.

    Args:
        trainer: Takes the steps.
        start: Steps already done.
        token: Checked before every step.
        after: Called with the number of steps done, after each; its events are passed on (samples, checkpoints).

    Yields:
        Per step: progress, loss, steps per second (over the last ten, samples not counted), memory in bytes.
    """
    total = trainer.task.settings.steps
    times: deque[float] = deque(maxlen=10)
    for number in range(start, total):
        token.check()
        began = time.perf_counter()
        loss = trainer.step(number)
        times.append(time.perf_counter() - began)
        done = number + 1
        yield Progress(stage="train", step=done, total=total)
        yield Metric(name="loss", value=loss, step=done)
        yield Metric(name="rate", value=len(times) / sum(times), step=done)
        yield Metric(name="memory", value=float(memory(trainer.device)), step=done)
        yield from after(done)


def memory(device: torch.device) -> int:
    """Bytes in use: the most so far on the accelerator, or this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss
