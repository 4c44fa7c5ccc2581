"""Train the judge on every content and style of the corpus, held-out ones too: it is an instrument, not a teacher.

Two things it never sees, so that its error can be told: every twentieth rendering (a content in a style), and all
renderings of forty contents. Which they are follows from a hash, see `unseen`.

Run: python -m intarsia.training.judge --data runs/corpus --work runs/judge --out assets/judge
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..pipelines.atomic import replacing
from ..pipelines.judge import CONTENT, SIZE, STYLE, JudgeNetwork
from .corpus import Captioned
from .scenes import COLOURS, Bank, read_folder

LOG = logging.getLogger("intarsia.judge")
CELLS, CONTENTS = 0.05, 40  # share of renderings, number of contents never seen
CONTENT_SCALE, STYLE_SCALE = 24.0, 12.0  # of the cosines before the softmax
MARGIN = 0.1  # taken off the right content's cosine while training (CosFace, arXiv:1801.09414, eq. 4)


def chance(text: str) -> float:
    """A number in 0..1 that is always the same for a text."""
    return int(hashlib.sha256(f"intarsia judge {text}".encode()).hexdigest()[:12], 16) / 16**12


def unseen(rows: Sequence[Captioned]) -> list[str]:
    """For each picture why the judge never sees it: "content", "rendering", or "" if it is trained on."""
    styles: dict[str, set[str]] = {}
    for row in rows:
        styles.setdefault(row.code, set()).add(row.style)
    many = [code for code, found in styles.items() if len(found) >= 8 and "200D" not in code]
    hidden = set(sorted(many, key=chance)[:CONTENTS])
    return [
        "content" if r.code in hidden
        else "rendering" if len(styles[r.code]) > 2 and chance(f"{r.code} {r.style}") < CELLS
        else ""
        for r in rows
    ]  # fmt: skip


class Views:
    """Pictures as the judge may meet them: anywhere, on any ground, with neighbours, blurred, noisy, off in colour.

    Args:
        pixels: `(pictures, 4, 64, 64)` uint8, straight alpha.
    """

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def draw(self, chosen: Tensor, rng: torch.Generator) -> Tensor:
        """Draw the chosen pictures: `(batch, 3, 64, 64)` in -1..1."""
        count = len(chosen)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.rand(*(shape or (count,)), generator=rng) * (high - low) + low

        canvas = self._grounds(count, rng)
        beside = torch.rand(count, generator=rng) < 0.25  # a neighbour looks into the box from one side
        other = self._moved(torch.randint(len(self.pixels), (count,), generator=rng), *_outside(count, rng), rng)
        other = other * beside[:, None, None, None]
        canvas = canvas * (1 - other[:, 3:]) + other[:, :3]
        whole = torch.rand(count, generator=rng) < 0.35
        size = torch.where(whole, torch.ones(count), uniform(0.55, 1.15))
        room = 0.5 * (1 - size).abs()
        x, y = (torch.where(whole, torch.zeros(count), uniform(-1, 1) * room) for _ in range(2))
        paint = self._moved(chosen, size, x, y, rng)
        picture = canvas * (1 - paint[:, 3:]) + paint[:, :3]
        picture = picture * uniform(0.9, 1.1)[:, None, None, None] + uniform(-0.06, 0.06, count, 3)[:, :, None, None]
        soft = torch.rand(count, generator=rng) < 0.4
        low = int(torch.randint(24, 48, (1,), generator=rng))
        blurred = F.interpolate(picture[soft], size=low, mode="area")
        picture[soft] = F.interpolate(blurred, size=SIZE, mode="bilinear", align_corners=False)
        noise = torch.randn(picture.shape, generator=rng) * uniform(0, 0.05)[:, None, None, None]
        return ((picture + noise).clamp(0, 1) * 2 - 1).contiguous(memory_format=torch.channels_last)

    def _grounds(self, count: int, rng: torch.Generator) -> Tensor:
        palette = torch.tensor(list(COLOURS.values())) / 255
        top = palette[torch.randint(len(palette), (count,), generator=rng)]
        bottom = torch.where(torch.rand(count, 1, generator=rng) < 0.6, top, top * 0.7)
        white = torch.rand(count, 1, generator=rng) < 0.45
        top, bottom = (torch.where(white, torch.ones(3), ground)[:, :, None, None] for ground in (top, bottom))
        return (top + (bottom - top) * torch.linspace(0, 1, SIZE)[:, None]).expand(-1, -1, -1, SIZE)

    def _moved(self, chosen: Tensor, size: Tensor, x: Tensor, y: Tensor, rng: torch.Generator) -> Tensor:
        """Premultiplied `(batch, 4, 64, 64)`: scaled by `size` (0..1), moved by x and y (fractions), some mirrored."""
        rgba = self.pixels[chosen].float() / 255
        rgba = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1)
        across = torch.where(torch.rand(len(chosen), generator=rng) < 0.25, -1.0, 1.0) / size
        zero = torch.zeros(len(chosen))
        rows = [torch.stack([across, zero, -2 * x * across], 1), torch.stack([zero, 1 / size, -2 * y / size], 1)]
        grid = F.affine_grid(torch.stack(rows, 1), list(rgba.shape), align_corners=False)
        return F.grid_sample(rgba, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _outside(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Size and place of a neighbour: beyond one of the four sides, a little of it inside."""
    size = torch.rand(count, generator=rng) * 0.5 + 0.6
    away = 0.5 + size / 2 - torch.rand(count, generator=rng) * 0.22
    along = torch.rand(count, generator=rng) - 0.5
    side = torch.randint(4, (count,), generator=rng)
    x = torch.where(side == 0, away, torch.where(side == 1, -away, along))
    y = torch.where(side == 2, away, torch.where(side == 3, -away, along))
    return size, x, y


def load_pixels(data: Path, rows: Sequence[Captioned], cache: Path) -> Tensor:
    """All pictures at 64 pixels, kept in a file for the next run."""
    if cache.exists():
        kept: Tensor = torch.from_numpy(np.load(cache))
        if len(kept) == len(rows):
            return kept
    made = Bank(data, rows, SIZE, torch.device("cpu")).pixels
    with replacing(cache) as fresh, fresh.open("wb") as file:
        np.save(file, made.numpy())
    return made


class Training:
    """The network with its two classifiers, one optimizer, and a checkpoint.

    Args:
        contents: Label of each picture, -1 where it is the only one of its kind.
        styles: Style of each picture.
        steps: Of the whole run; the rate rises for a twentieth of it and falls along a cosine.
    """

    def __init__(self, contents: Tensor, styles: Tensor, steps: int, rate: float, seed: int) -> None:
        torch.manual_seed(seed)  # initial weights come from the global generator
        self.contents, self.styles, self.steps, self.rate, self.seed, self.step = contents, styles, steps, rate, seed, 0
        network: Any = JudgeNetwork()
        self.network: JudgeNetwork = network.to(memory_format=torch.channels_last)  # which the types of `to` leave out
        self.heads = torch.nn.ParameterList(
            [torch.randn(int(contents.max()) + 1, CONTENT), torch.randn(int(styles.max()) + 1, STYLE)]
        )
        self.optimizer = torch.optim.AdamW([*self.network.parameters(), *self.heads], lr=rate, weight_decay=0.05)

    def run(self, views: Views, allowed: Tensor, batch: int, until: float, save: Path) -> None:
        """Train until the end or until the clock reads `until`."""
        bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        begun, first = time.monotonic(), self.step
        while self.step < self.steps and time.monotonic() < until:
            rng = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
            chosen = allowed[torch.randint(len(allowed), (batch,), generator=rng)]
            with torch.no_grad():
                pictures = views.draw(chosen, rng)
            warm = min(1.0, (self.step + 1) / (self.steps / 20))
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * warm * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                content, style = self.network(pictures)
            loss, right = self._loss(content.float(), style.float(), chosen)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.step += 1
            if self.step % 100 == 0:
                rate = (self.step - first) / (time.monotonic() - begun)
                done = (self.step, self.steps, float(loss.detach()), *right, rate)
                LOG.info("step %d of %d: loss %.3f, right %.2f %.2f, %.1f steps/s", *done)
            if self.step % 500 == 0:
                self.save(save)
        self.save(save)

    def _loss(self, content: Tensor, style: Tensor, chosen: Tensor) -> tuple[Tensor, tuple[float, float]]:
        labels, styles = self.contents[chosen], self.styles[chosen]
        known = labels >= 0
        cosines = content[known] @ F.normalize(self.heads[0], dim=1).T
        margin = MARGIN * F.one_hot(labels[known], cosines.shape[1])
        style_cosines = style @ F.normalize(self.heads[1], dim=1).T
        loss = F.cross_entropy(CONTENT_SCALE * (cosines - margin), labels[known])
        loss = loss + 0.5 * F.cross_entropy(STYLE_SCALE * style_cosines, styles)
        right = (cosines.argmax(1) == labels[known]).float().mean(), (style_cosines.argmax(1) == styles).float().mean()
        return loss, (float(right[0]), float(right[1]))

    def save(self, path: Path) -> None:
        """Write weights and optimizer state under a temporary name, then move it."""
        tensors = {f"network/{key}": value for key, value in self.network.state_dict().items()}
        tensors |= {f"heads/{key}": value for key, value in self.heads.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{name}": value for name, value in state.items()}
        with replacing(path) as fresh:
            save_file({k: v.contiguous() for k, v in tensors.items()}, fresh, {"step": str(self.step)})

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        with safe_open(path, "pt") as file:
            self.step = int(file.metadata()["step"])
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "heads": {}, "optimizer": {}}
        for key, value in load_file(path).items():
            part, _, name = key.partition("/")
            parts[part][name] = value
        self.network.load_state_dict(parts["network"])
        self.heads.load_state_dict(parts["heads"])
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in parts["optimizer"].items():
            number, _, name = key.partition("/")
            moments.setdefault(int(number), {})[name] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})


def prototypes(network: JudgeNetwork, views: Views, groups: Sequence[Sequence[int]], kind: int) -> Tensor:
    """Mean embedding of each group of pictures, plain on white: unit rows. `kind` 0 is content, 1 style."""
    white, made = torch.ones(1, 3, SIZE, SIZE), []
    with torch.no_grad():
        for start in range(0, len(views.pixels), 256):
            rgba = views.pixels[start : start + 256].float() / 255
            made.append(network((white * (1 - rgba[:, 3:]) + rgba[:, :3] * rgba[:, 3:]) * 2 - 1)[kind])
    every = torch.cat(made)
    return F.normalize(torch.stack([every[list(group)].mean(0) for group in groups]), dim=1)


def export(network: JudgeNetwork, views: Views, rows: Sequence[Captioned], out: Path) -> None:
    """Write network and prototypes in fp16; what the judge never saw has no part in the prototypes of the rest."""
    network.eval()
    why = unseen(rows)
    by_content: dict[str, list[int]] = {}
    by_style: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        if why[index] != "rendering":
            by_style.setdefault(row.style, []).append(index)
            if _shared(row):
                by_content.setdefault(row.content, []).append(index)
    tensors = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    tensors["prototypes.content"] = prototypes(network, views, list(by_content.values()), 0)
    tensors["prototypes.style"] = prototypes(network, views, list(by_style.values()), 1)
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "judge.safetensors") as fresh:
        save_file({key: value.half().contiguous() for key, value in tensors.items()}, fresh)
    labels = {
        "contents": list(by_content),
        "styles": list(by_style),
        "unseen_contents": sorted({row.content for row, reason in zip(rows, why, strict=True) if reason == "content"}),
        "unseen_renderings": [row.file for row, reason in zip(rows, why, strict=True) if reason == "rendering"],
    }
    with replacing(out / "labels.json") as fresh:
        fresh.write_text(json.dumps(labels, ensure_ascii=False, indent=0), "utf-8")


def _shared(row: Captioned) -> bool:
    """Whether other styles may draw the same content; the hand-drawn icons have names of their own."""
    return row.style != "streamline-freehand-color"


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    parser = argparse.ArgumentParser(description="Train the judge.")
    parser.add_argument("--data", type=Path, required=True, help="folder made by `intarsia corpus build`")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint; found there, work goes on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf)
    given = parser.parse_args()
    until = time.monotonic() + 60 * given.minutes
    rows = read_folder(given.data)
    given.work.mkdir(parents=True, exist_ok=True)
    views = Views(load_pixels(given.data, rows, given.work / "pixels.npy"))
    names = {name: i for i, name in enumerate(dict.fromkeys(r.content for r in rows if _shared(r)))}
    styles = {name: i for i, name in enumerate(dict.fromkeys(r.style for r in rows))}
    contents = torch.tensor([names[r.content] if _shared(r) else -1 for r in rows])
    allowed = torch.tensor([i for i, why in enumerate(unseen(rows)) if not why])
    training = Training(contents, torch.tensor([styles[r.style] for r in rows]), given.steps, given.rate, given.seed)
    state = given.work / "state.safetensors"
    if state.exists():
        training.load(state)
    training.run(views, allowed, given.batch, until, state)
    export(training.network, views, rows, given.out)
    LOG.info("exported to %s after step %d", given.out, training.step)


if __name__ == "__main__":
    main()
