"""Distil Mini into four steps: the recipe "lcm" on pictures drawn from the corpus instead of files.

What is drawn is what Mini itself was trained on (objects, backgrounds, scenes); loss, layers and ranks are the
recipe's. A run that was cut goes on from its checkpoint as if it had not been; asking for more steps goes on too.

Run: python -m intarsia.training.distil --data runs/corpus --model assets/mini --out runs/out/fast.safetensors
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import math
import signal
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..pipelines.adapter_file import card, write_adapter
from . import checkpoint
from . import mini as shape
from .base import LatentPool, hash_seed
from .consistency import Consistency
from .layers import TrainedLayers, trainable, trainable_layers, untaught
from .recipe import ModelFacts, Moment, Settings
from .recipes.lcm import DRAWING, RECIPE, LcmOptions
from .run import fingerprint
from .scenes import Bank, Planner, read_folder
from .schedule import NoiseSchedule
from .splits import check_training_rows

LOG = logging.getLogger("intarsia.distil")
MAX_NORM = 1.0


@dataclass(frozen=True)
class Wish:
    """What one run shall be; a checkpoint fits another run only if all of this is equal but `steps`.

    Args:
        size: Side of the pictures in pixels.
        pool: Pictures drawn and encoded ahead; drawn anew every `refresh` steps.
    """

    steps: int
    batch: int
    rank: int
    guidance: float
    learning_rate: float | None
    size: int
    pool: int
    refresh: int
    seed: int


@dataclass(frozen=True)
class Network:
    """Mini as `recipe.Ask`, for the captions of one batch; "no caption" is zeros, as Mini was trained.

    Args:
        unet: With the trainable layers in it.
        layers: Those layers.
        states: `(batch, 40, 256)` token states.
        pooled: `(batch, 192)`.
        sizes: `(batch, 6)`, SDXL's size conditioning.
        half: Compute in bfloat16.
    """

    unet: shape.Part
    layers: TrainedLayers
    states: Tensor
    pooled: Tensor
    sizes: Tensor
    half: bool

    def __call__(self, noisy: Tensor, timesteps: Tensor, *, taught: bool = True, captions: bool = True) -> Tensor:
        if taught:
            return self._predict(noisy, timesteps, float(captions))
        with torch.no_grad(), untaught(self.unet, self.layers):
            return self._predict(noisy, timesteps, float(captions))

    def _predict(self, noisy: Tensor, timesteps: Tensor, keep: float) -> Tensor:
        conditions = {"text_embeds": self.pooled * keep, "time_ids": self.sizes}
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=self.half):
            made = self.unet(noisy, timesteps, self.states * keep, added_cond_kwargs=conditions, return_dict=False)[0]
        return made.float()


class Distiller:
    """Takes single steps; everything random in one follows from the seed and its number.

    Args:
        parts: Mini, frozen but for the layers.
        layers: Trainable, in `parts.unet`.
        schedule: Of Mini.
        wish: What to do.
        settings: The recipe's, for this wish.
    """

    def __init__(
        self, parts: shape.Mini, layers: TrainedLayers, schedule: NoiseSchedule, wish: Wish, settings: Settings
    ) -> None:
        self.parts, self.layers, self.wish, self.settings = parts, layers, wish, settings
        self.device = next(parts.unet.parameters()).device
        self.consistency = Consistency.of(schedule)
        gpu = self.device.type == "cuda"
        self.half = gpu or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.parameters = list(layers.parameters.values())
        self.adamw = torch.optim.AdamW(self.parameters, lr=settings.learning_rate, weight_decay=0.0, fused=gpu)

    def step(self, number: int, pool: LatentPool) -> float:
        """Take step `number` (from 0) on pictures of the pool, and give its loss."""
        batch, device, rng = self.wish.batch, self.device, torch.Generator()
        rng.manual_seed(hash_seed(self.wish.seed, number))
        chosen = torch.randint(len(pool.latents), (batch,), generator=rng).to(device)
        clean = pool.latents[chosen].float()
        noise = torch.randn(clean.shape, generator=rng).to(device)
        with torch.no_grad():
            states, pooled = self.parts.encode(pool.ids[chosen], torch.zeros(batch, dtype=torch.bool, device=device))
        sizes = shape.size_conditioning(batch, self.wish.size, device)
        network = Network(self.parts.unet, self.layers, states, pooled, sizes, self.half)
        guidance = torch.full((batch,), self.wish.guidance, device=device)
        moment = Moment(clean, noise, self.consistency.schedule, network)
        compared = self.consistency.compare(moment, guidance, rng)
        snr = self.consistency.schedule.snr(compared.timesteps)
        loss = RECIPE.loss(compared.prediction, compared.target, snr, LcmOptions(), rng)
        for group in self.adamw.param_groups:
            group["lr"] = self.settings.learning_rate * self._pace(number)
        self.adamw.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        self.adamw.step()
        return float(loss.detach())

    def _pace(self, number: int) -> float:
        """Share of the learning rate: risen after 20 steps, brought down over the last third."""
        return min(1.0, (number + 1) / 20, max(0.02, (self.wish.steps - number) / (self.wish.steps / 3)))


def distil(
    distiller: Distiller, bank: Bank, planner: Planner, until: float, folder: Path, identity: dict[str, Any]
) -> int:
    """Train until done, until the clock reads `until` or until SIGTERM; a checkpoint is kept in each case.

    Returns:
        Steps done in all.
    """
    wish, start, pool, drawn, losses = distiller.wish, 0, None, -1, list[float]()
    if checkpoint.resumable(folder):
        found = checkpoint.load(folder)
        start = checkpoint.restore(found, identity, distiller.layers.parameters, distiller.adamw)
        LOG.info("going on after step %d", start)
    begun, done = time.monotonic(), start

    def keep() -> None:
        checkpoint.save(folder, done, identity, distiller.layers.parameters, distiller.adamw)

    with _asked_to_stop() as asked:
        while done < wish.steps and time.monotonic() < until and not asked:
            since = done - done % wish.refresh  # a run resumed in between must draw the same pool
            if pool is None or since != drawn:
                pool, drawn = LatentPool(bank, planner, distiller.parts, wish.pool, hash_seed(wish.seed, since)), since
            losses.append(distiller.step(done, pool))
            done += 1
            if done % 25 == 0:
                rate = (done - start) / (time.monotonic() - begun)
                LOG.info("step %d of %d: loss %.4f, %.2f steps/s", done, wish.steps, sum(losses) / len(losses), rate)
                losses.clear()
            if done % 250 == 0:
                keep()
    if done > start:
        keep()
    return done


@contextmanager
def _asked_to_stop() -> Generator[list[int]]:
    """Collect SIGTERM instead of dying of it."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def load_mini(folder: Path, device: torch.device) -> tuple[shape.Mini, NoiseSchedule]:
    """Read an exported Mini, in float32 and frozen."""
    pipeline = shape.diffusers.StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    parts = shape.Mini(
        pipeline.tokenizer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.unet, pipeline.vae
    )  # fmt: skip
    for part in (*parts.trained().values(), parts.vae):
        part.to(device).eval().requires_grad_(False)
    return parts, NoiseSchedule.of(pipeline.scheduler, device)


def resolved(parts: shape.Mini, wish: Wish, pictures: int) -> Settings:
    """Let the recipe choose layers, ranks and learning rate for Mini."""
    width = max(parts.unet.config["block_out_channels"])
    facts = ModelFacts("sdxl", trainable_layers(parts.unet), width, wish.size, pictures)
    options = LcmOptions(rank=wish.rank, learning_rate=wish.learning_rate, steps=wish.steps, guidance=wish.guidance)
    return RECIPE.settings(facts, options)


def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    given = _arguments().parse_args(arguments)
    until, device = time.monotonic() + 60 * given.minutes, torch.device(given.device)
    rows = [row for row in read_folder(given.data) if row.split == "train"]
    if given.contents:
        known = set(given.contents.read_text("utf-8").splitlines())
        rows = [row for row in rows if row.content in known]
    check_training_rows(rows)
    parts, schedule = load_mini(given.model, device)
    wish = Wish(
        given.steps, given.batch, given.rank, given.guidance, given.learning_rate,
        given.size or parts.unet.config["sample_size"] * 8, given.pool, given.refresh, given.seed,
    )  # fmt: skip
    settings = resolved(parts, wish, len(rows))
    planner = Planner(rows, given.scenes, given.plain)
    identity: dict[str, Any] = {
        "wish": {key: value for key, value in dataclasses.asdict(wish).items() if key != "steps"},
        "pictures": hashlib.sha256("".join(row.file for row in rows).encode()).hexdigest(),
        "shares": [given.scenes, given.plain],
        "model": fingerprint(parts.unet, settings.ranks),
    }
    LOG.info("%d pictures, %d layers, learning rate %g", len(rows), len(settings.ranks), settings.learning_rate)
    with trainable(parts.unet, settings.ranks, settings.scale, wish.seed) as layers:
        distiller = Distiller(parts, layers, schedule, wish, settings)
        bank = Bank(given.data, rows, wish.size, device)
        folder = given.work or given.out.with_suffix(".checkpoint")
        done = distil(distiller, bank, planner, until, folder, identity)
        factors = layers.factors("unet.")
    texts = card("sdxl", base=given.model.resolve().name, title=given.title) | {
        "intarsia.base_layers": identity["model"],
        "intarsia.recipe": RECIPE.name,
        "intarsia.paper": RECIPE.paper,
        "intarsia.steps": str(done),
        "intarsia.seed": str(wish.seed),
        "intarsia.learning_rate": f"{settings.learning_rate:g}",
        "intarsia.resolution": str(wish.size),
        "intarsia.guidance": f"{wish.guidance:g}",
        "intarsia.drawing": json.dumps(dataclasses.asdict(DRAWING)),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_adapter(given.out, factors, texts, torch.float16)
    rest = "" if done >= wish.steps else "; run again to go on"
    LOG.info("%s after step %d of %d%s", given.out, done, wish.steps, rest)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Teach Mini to draw in four steps, without guidance.")
    parser.add_argument("--data", type=Path, required=True, help="folder made by `intarsia corpus build`, or yours")
    parser.add_argument("--model", type=Path, required=True, help="folder of the finished Mini")
    parser.add_argument("--out", type=Path, required=True, help="the adapter, a .safetensors file")
    parser.add_argument("--work", type=Path, help="folder of the checkpoint; empty: beside the adapter")
    parser.add_argument("--contents", type=Path, help="text file of the contents Mini knows, one label a line")
    parser.add_argument("--title", default="Mini in four steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop, checkpoint and write after so long")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rank", type=int, default=32, help="capped at a quarter of a layer's width")
    parser.add_argument("--guidance", type=float, default=5.0, help="what is folded in")
    parser.add_argument("--learning-rate", type=float, help="empty: the recipe's")
    parser.add_argument("--size", type=int, help="side of the pictures; empty: Mini's own")
    parser.add_argument("--scenes", type=float, default=0.2, help="share of pictures of two or three objects")
    parser.add_argument("--plain", type=float, default=0.3, help="share of pictures shown as they are, on white")
    parser.add_argument("--pool", type=int, default=4096, help="pictures drawn and encoded ahead")
    parser.add_argument("--refresh", type=int, default=500, help="steps after which the pool is drawn anew")
    return parser


if __name__ == "__main__":
    main()
