"""Train Mini: autoencoder, then text-to-image on its latents, from any folder of captioned pictures.

Every stage writes its result under `--work` and is skipped or resumed when found there; every random number follows
from `--seed` and the step, so a run that was cut goes on as if it had not been. Text-to-image trains at half size
first (a quarter of the cost per picture), then at Mini's own 256 pixels.

Run: python -m intarsia.training.base --data runs/corpus --work runs/mini --out assets/mini
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..pipelines.atomic import replacing
from . import mini as shape
from .autoencoder import AutoencoderOptions, fit_encoder, psnr, train_decoder
from .binding import Binding, boxes_of, named_tokens
from .corpus import Captioned
from .scenes import COLOURS, Bank, Planner, named, read_folder
from .splits import check_training_rows

LOG = logging.getLogger("intarsia.base")


@dataclass(frozen=True)
class Phase:
    """A stretch of text-to-image training at one picture size."""

    size: int
    steps: int
    batch: int
    pool: int  # pictures drawn and encoded ahead; drawn anew every `refresh` steps
    refresh: int
    noisy: float = 2.0  # by which power of an even draw the timesteps stay below the noisiest one


class LatentPool:
    """Pictures drawn from plans and encoded once: latents, token ids, and of scenes which tokens name what where."""

    def __init__(self, bank: Bank, planner: Planner, parts: shape.Mini, count: int, seed: int) -> None:
        rng, device = np.random.default_rng(seed), bank.pixels.device
        wanted = int(count * planner.plain_share)
        rounds = -(-wanted // len(planner.rows))  # each as it is, again and again, under other captions
        order = [int(i) for _ in range(rounds) for i in rng.permutation(len(planner.rows))]
        plans = planner.plain(order[:wanted], rng)
        plans += planner.draw(count - len(plans), rng)
        self.ids, offsets = shape.tokenize(parts.tokenizer, [p.caption for p in plans])
        self.named, self.boxes = named_tokens(plans, offsets).to(device), boxes_of(plans).to(device)
        self.ids = self.ids.to(device)
        made: list[Tensor] = []
        encode, at_once = patch_encoder(parts.vae), 128 if device.type == "cuda" else 8  # a CPU wants them in its cache
        with torch.no_grad():
            for start in range(0, count, at_once):
                made.append(encode(bank.render(plans[start : start + at_once])).half())
        self.latents = torch.cat(made)  # (count, 8, size / 8, size / 8)


class Trainer:
    """Text-to-image training that can be cut and resumed.

    Args:
        parts: The model; its autoencoder is frozen.
        phases: What to do, in order.
        learning_rate: Warmed up over at most 500 steps, held, and at the end brought down evenly to a fiftieth.
        cooldown: Share of all steps in which it comes down. What was trained so can be trained on: ask for more steps.
        binding: Weight of the second loss, by which names are looked at from where their object lies (binding.py).
        seed: Of everything random.
        work: Folder of the checkpoint.
    """

    def __init__(
        self,
        parts: shape.Mini,
        phases: Sequence[Phase],
        learning_rate: float,
        seed: int,
        work: Path,
        cooldown: float = 0.2,
        binding: float = 0.05,
    ) -> None:
        self.cooldown, self.weight = cooldown, binding
        self.parts, self.phases, self.seed, self.work = parts, tuple(phases), seed, work
        self.device = next(parts.unet.parameters()).device
        self.gpu = self.device.type == "cuda"
        self.bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # a third faster where the processor can
        self.learning_rate, self.step, self.asked_to_stop = learning_rate, 0, False
        self.weights = {f"{n}.{k}": p for n, part in parts.trained().items() for k, p in part.named_parameters()}
        self.average = {key: value.detach().clone() for key, value in self.weights.items()}
        self.optimizer = torch.optim.AdamW(
            list(self.weights.values()), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.99), fused=self.gpu
        )
        alphas = zero_terminal_alphas()
        self.importance = importance(parts.vae).to(self.device)
        self.signal, self.noise = alphas.sqrt().to(self.device), (1 - alphas).sqrt().to(self.device)
        self.predict = torch.compile(parts.unet) if self.gpu and not binding else parts.unet
        if binding or not self.gpu:  # on a CPU the backward of fused attention takes a third of the step
            parts.unet.set_attn_processor(AttnProcessor())
        self.binding = Binding(parts.unet)

    @property
    def total(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def run(self, bank_of: dict[int, Bank], planner: Planner, until: float) -> bool:
        """Train until done (true), or until the clock reads `until` or a signal (false); checkpoints either way."""
        signal.signal(signal.SIGTERM, self._stop)
        begun = time.monotonic()
        pool, pool_key, first = None, None, self.step
        while self.step < self.total and time.monotonic() < until and not self.asked_to_stop:
            phase, inside = self._phase()
            key = (phase.size, inside // phase.refresh)
            if key != pool_key:
                del pool  # both at once would not fit on a small machine
                since = self.step - inside % phase.refresh  # a run resumed in between must draw the same pool
                pool = LatentPool(bank_of[phase.size], planner, self.parts, phase.pool, hash_seed(self.seed, since))
                pool_key = key
            assert pool is not None
            with self.binding.watched():
                losses = self._train_step(pool, phase)
            self.step += 1
            if self.step % 25 == 0:
                rate = (self.step - first) / (time.monotonic() - begun)
                LOG.info(
                    "step %d of %d, %d px: loss %.4f, binding %.4f, %.1f steps/s",
                    self.step,
                    self.total,
                    phase.size,
                    *losses.tolist(),
                    rate,
                )
            if self.step % 250 == 0 and not self.gpu:
                self.save()
        self.save()
        return self.step >= self.total

    def _stop(self, number: int, frame: object) -> None:
        self.asked_to_stop = True

    def _phase(self) -> tuple[Phase, int]:
        inside = self.step
        for phase in self.phases:
            if inside < phase.steps:
                return phase, inside
            inside -= phase.steps
        raise AssertionError("all phases are over")

    def _train_step(self, pool: LatentPool, phase: Phase) -> Tensor:
        device, batch = self.device, phase.batch
        rng = torch.Generator(device).manual_seed(hash_seed(self.seed, self.step))
        chosen = torch.randint(len(pool.latents), (batch,), generator=rng, device=device)
        clean = pool.latents[chosen].float()
        noise = torch.randn(clean.shape, generator=rng, device=device)
        # With 2, half fall on the noisiest quarter, where it is decided what is drawn; even colours want 1 or less.
        timesteps = 999 - (1000 * torch.rand(batch, generator=rng, device=device) ** phase.noisy).long()
        dropped = torch.rand(batch, generator=rng, device=device) < 0.1
        told = torch.rand(batch, generator=rng, device=device) < 0.5  # the pooled text; see below
        a, s = (table[timesteps][:, None, None, None] for table in (self.signal, self.noise))
        noisy, target = a * clean + s * noise, a * noise - s * clean
        with torch.autocast(device.type, torch.bfloat16, enabled=self.gpu or self.bf16):
            states, pooled = self.parts.encode(pool.ids[chosen], dropped)
            # One vector for the whole picture is the easy way to say what is drawn, and useless for two things in one
            # scene; without it every other time, the words themselves are learned to be looked at.
            pooled = pooled * told[:, None]
            sizes = shape.size_conditioning(batch, phase.size, device)
            conditions = {"text_embeds": pooled, "time_ids": sizes}
            noisy = noisy.contiguous(memory_format=torch.channels_last if self.gpu else torch.contiguous_format)
            made = self.predict(noisy, timesteps, states, added_cond_kwargs=conditions, return_dict=False)[0]
        loss = (self.importance * (made.float() - target).square()).mean()
        bound = torch.zeros(())
        if self.weight:
            bound = self.binding.loss(pool.named[chosen] & ~dropped[:, None, None], pool.boxes[chosen])
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * self._pace()
        self.optimizer.zero_grad(set_to_none=True)
        (loss + self.weight * bound).backward()
        torch.nn.utils.clip_grad_norm_(list(self.weights.values()), 1.0)
        self.optimizer.step()
        decay = min(0.999, (1 + self.step) / (10 + self.step))
        for key, value in self.weights.items():
            self.average[key].lerp_(value.detach(), 1 - decay)
        return torch.stack([loss.detach(), bound.detach()])

    def _pace(self) -> float:
        warm = min(1.0, (self.step + 1) / min(500, self.total / 20 + 1))
        return warm * min(1.0, max(0.02, (self.total - self.step) / (self.cooldown * self.total)))

    def save(self) -> None:
        """Write weights, average and optimizer state under a temporary name, then move it."""
        tensors = {f"weight/{k}": v for k, v in self.weights.items()}
        tensors |= {f"average/{k}": v for k, v in self.average.items()}
        for key, value in self.weights.items():
            for name, state in self.optimizer.state.get(value, {}).items():
                tensors[f"{name}/{key}"] = state
        fresh = self.work / "state.new"
        tensors = {key: value.detach().contiguous() for key, value in tensors.items()}
        save_file(tensors, fresh, {"step": str(self.step)})
        fresh.replace(self.work / "state.safetensors")

    def load(self) -> None:
        """Go on from the checkpoint, if there is one."""
        path = self.work / "state.safetensors"
        if not path.exists():
            return
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            self.step = int(file.metadata()["step"])
        tensors = load_file(path, device=str(self.device))
        for key, value in self.weights.items():
            value.data.copy_(tensors[f"weight/{key}"])
            self.average[key].copy_(tensors[f"average/{key}"])
            if f"exp_avg/{key}" in tensors:  # SDXL never reads the last layer of the first text encoder
                names = ("exp_avg", "exp_avg_sq", "step")
                self.optimizer.state[value] = {name: tensors[f"{name}/{key}"].clone() for name in names}

    def averaged(self) -> shape.Mini:
        """Put the averaged weights in place; training cannot go on after this."""
        for key, value in self.weights.items():
            value.data.copy_(self.average[key])
        return self.parts


def patch_encoder(vae: shape.Part) -> torch.nn.Conv2d:
    """The autoencoder's encoder as the one convolution it amounts to, being linear in patches of 8 x 8 pixels."""
    first, side = next(vae.parameters()), 8
    patches = torch.eye(3 * side * side, device=first.device, dtype=first.dtype).view(-1, 3, side, side)
    conv = torch.nn.Conv2d(3, shape.LATENTS, side, side, device=first.device)
    with torch.no_grad():
        offset = vae.encode(torch.zeros_like(patches[:1])).latents.flatten()
        conv.bias.copy_(offset)  # type: ignore[union-attr]
        conv.weight.copy_((vae.encode(patches).latents.flatten(1) - offset).T.reshape(conv.weight.shape))
    return conv.requires_grad_(False)


def importance(vae: shape.Part) -> Tensor:
    """Weight of each latent channel's error, `(channels, 1, 1)`, mean 1.

    The latents are whitened: a fine edge counts as much in them as the colour of a whole patch, though pictures differ
    mostly in the latter. Weighted by its standard deviation in pixels, shape and colour are learned before the edges.
    """
    deviation = patch_encoder(vae).weight.flatten(1).norm(dim=1).reciprocal()
    return (deviation / deviation.mean()).view(-1, 1, 1)


def hash_seed(seed: int, step: int) -> int:
    """A seed of its own for each step."""
    return (seed * 1_000_003 + step * 7_919 + 17) % 2**63


def zero_terminal_alphas() -> Tensor:
    """Cumulative alphas `(1000,)` whose last is zero, as in the exported scheduler (arXiv:2305.08891, alg. 1)."""
    from diffusers.schedulers.scheduling_euler_discrete import rescale_zero_terminal_snr

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    return torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)


def vocabulary(rows: Sequence[Captioned]) -> list[str]:
    """The texts the tokenizer learns from: names, tags, styles, colours and the words scenes use."""
    texts = [named(row.content) for row in rows] + [", ".join(row.tags) for row in rows]
    texts += [f"{row.style} style" for row in rows[:: max(1, len(rows) // 2000)]]
    for colour in COLOURS:
        texts += [f"on a {colour} gradient background", f"a {colour} thing"] * 20
    words = "left of, right of, above, below, next to, and, small, top, bottom, with, in, a picture of, made of, big"
    return texts + [words] * 50


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    given = _arguments().parse_args()
    until = time.monotonic() + 60 * given.minutes
    device = torch.device(given.device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    given.work.mkdir(parents=True, exist_ok=True)
    rows = read_folder(given.data)
    train = _known([row for row in rows if row.split == "train"], given.contents)
    if any(row.group for row in train):  # a corpus of ours; other people's folders are theirs to split
        check_training_rows(train)
    LOG.info("%d pictures, %d of them for training", len(rows), len(train))
    size = 256 if given.steps else 128  # without steps at 256 px, half the memory will do
    bank, planner = Bank(given.data, train, size, device), Planner(train, given.scenes, given.plain)
    if not (given.work / "tokenizer").exists():
        shape.train_tokenizer(vocabulary([r for r in rows if r.split == "train"]), given.work / "tokenizer")
    vae = _autoencoder(given, bank, planner, rows)
    if given.stage == "autoencoder":
        return
    tokenizer = shape.transformers.CLIPTokenizer.from_pretrained(given.work / "tokenizer")
    parts = shape.build(tokenizer, vae, given.seed)
    if given.start_from:
        shape.start_from(parts, given.start_from)
    for part in parts.trained().values():
        part.to(device).train()
    if device.type == "cuda":
        parts.unet.to(memory_format=torch.channels_last)
    phases = (
        Phase(128, given.small_steps, given.small_batch, given.pool, given.refresh, given.noisy),
        Phase(256, given.steps, given.batch, given.pool, given.refresh, given.noisy),
    )
    trainer = Trainer(parts, phases, given.learning_rate, given.seed, given.work, given.cooldown, given.binding)
    trainer.load()
    banks = {size: bank}
    if trainer.step < given.small_steps and 128 not in banks:
        banks[128] = Bank(given.data, train, 128, device)
    done = trainer.run(banks, planner, until)
    if (given.work / "vae").exists():  # its decoder may have been finished meanwhile by a run of its own
        parts.vae = shape.diffusers.AutoencoderTiny.from_pretrained(given.work / "vae")
    shape.export(trainer.averaged(), given.out, size if trainer.step > given.small_steps else 128)
    _write_card(given, trainer, [row.content for row in train])
    LOG.info("exported to %s after step %d%s", given.out, trainer.step, "" if done else "; run again to go on")


def _write_card(given: argparse.Namespace, trainer: Trainer, contents: Sequence[str]) -> None:
    """Say beside the weights what they were taught; the report card asks for these contents as known ones."""
    small = min(trainer.step, given.small_steps)
    card = {
        "contents": list(dict.fromkeys(contents)),
        "steps": trainer.step,
        "pictures": small * given.small_batch + (trainer.step - small) * given.batch,
        "seed": given.seed,
        "scenes": round(given.scenes * (1 - given.plain), 3),
    }
    with replacing(given.out / "card.json") as fresh:
        fresh.write_text(json.dumps(card, ensure_ascii=False, indent=1) + "\n", "utf-8")


def _autoencoder(given: argparse.Namespace, bank: Bank, planner: Planner, rows: Sequence[Captioned]) -> shape.Part:
    """The autoencoder, made as far as `given.stage` asks: its encoder alone suffices for text-to-image."""
    final, encoder, device = given.work / "vae", given.work / "encoder", bank.pixels.device
    options = AutoencoderOptions(steps=given.decoder_steps, batch=given.decoder_batch, seed=given.seed)
    if not encoder.exists():
        torch.manual_seed(given.seed)
        vae = shape.build_autoencoder()
        fit_encoder(vae, bank.render(planner.draw(2048, np.random.default_rng(given.seed))).cpu())
        vae.save_pretrained(encoder)
    if not final.exists() and given.stage != "text":
        vae = shape.diffusers.AutoencoderTiny.from_pretrained(encoder)
        train_decoder(vae, bank, planner, options, LOG.info)
        unseen = [row for row in rows if row.split != "train"][:256] or list(planner.rows[:64])
        held = Bank(given.data, unseen, bank.size, device)
        plans = Planner(unseen, scenes=0).plain(range(len(unseen)), np.random.default_rng(0))
        decibel = psnr(vae, held.render(plans))
        LOG.info("autoencoder: %.2f dB on %d unseen pictures of %d px", decibel, len(unseen), bank.size)
        vae.save_pretrained(final)
    vae = shape.diffusers.AutoencoderTiny.from_pretrained(final if final.exists() else encoder)
    return vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def _known(rows: list[Captioned], listed: Path | None) -> list[Captioned]:
    """Only the contents a text file lists, one label a line; all of them without a file."""
    if listed is None:
        return rows
    wanted = {line.strip() for line in listed.read_text().splitlines() if line.strip() and line[0] != "#"}
    return [row for row in rows if row.content in wanted]


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train Mini from a folder of captioned pictures.")
    parser.add_argument("--data", type=Path, required=True, help="folder made by `intarsia corpus build`, or yours")
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints; found there, work goes on")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--start-from", type=Path, help="an earlier Mini, of the same shape but other latents")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop and checkpoint after so long")
    parser.add_argument("--stage", choices=("all", "autoencoder", "text"), default="all")
    parser.add_argument("--contents", type=Path, help="text file of the contents to learn, one label a line")
    parser.add_argument("--scenes", type=float, default=0.2, help="share of pictures of two or three objects")
    parser.add_argument("--plain", type=float, default=0.3, help="share of pictures shown as they are, on white")
    parser.add_argument("--decoder-steps", type=int, default=10000)
    parser.add_argument("--decoder-batch", type=int, default=64)
    parser.add_argument("--small-steps", type=int, default=8000, help="text-to-image steps at 128 px")
    parser.add_argument("--small-batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=16000, help="text-to-image steps at 256 px")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--pool", type=int, default=96000, help="pictures drawn and encoded ahead")
    parser.add_argument("--refresh", type=int, default=8000, help="steps after which the pool is drawn anew")
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--cooldown", type=float, default=0.2, help="share of all steps in which the rate comes down")
    parser.add_argument("--binding", type=float, default=0.05, help="weight of the loss that binds names to places")
    parser.add_argument("--noisy", type=float, default=2.0, help="above 1 noisy timesteps prevail, below 1 clean ones")
    return parser


if __name__ == "__main__":
    main()
