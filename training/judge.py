"""Train the judge on every content and style of the corpus, held-out ones too: it is an instrument, not a teacher.

Content and style have a network each. Content is learned from pictures changed in everything but what they show, style
from pictures changed as little as the camera of a bench would.

Two things it never sees, so that its error can be told: every twentieth rendering (a content in a style), and all
renderings of forty contents. Which they are follows from a hash, see `unseen`.

Run: python -m intarsia.training.judge --data runs/corpus --work runs/judge --part content --out assets/judge
Then the same with --part style; the judge is written when both are there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..pipelines.atomic import replacing
from ..pipelines.judge import CONTENT, SIZE, STYLE, STYLE_SIZE, ContentNetwork, StyleNetwork
from .corpus import Captioned
from .judge_views import Views
from .scenes import Bank, read_folder

LOG = logging.getLogger("intarsia.judge")
CELLS, CONTENTS = 0.05, 40  # share of renderings, number of contents never seen
CONTENT_SCALE, STYLE_SCALE = 24.0, 12.0  # of the cosines before the softmax
VIEWS = 4  # of every picture, on which the style network's last layers settle
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


def load_pixels(data: Path, rows: Sequence[Captioned], size: int, cache: Path) -> Tensor:
    """All pictures at one size, kept in a file for the next run."""
    which = hashlib.sha256("\n".join(row.file for row in rows).encode()).hexdigest()[:8]
    cache = cache.with_name(f"{cache.stem}-{which}{cache.suffix}")  # of these pictures in this order, and no others
    if cache.exists():
        return torch.from_numpy(np.load(cache))
    made = Bank(data, rows, size, torch.device("cpu")).pixels
    with replacing(cache) as fresh, fresh.open("wb") as file:
        np.save(file, made.numpy())
    return made


class Lesson:
    """A network with the classifiers it is trained through, and the labels of the pictures.

    Args:
        views: The pictures.
        labels: For each classifier the class of every picture; -1 where it is the only one of its kind.
    """

    def __init__(self, part: str, views: Views, labels: Sequence[Tensor], seed: int) -> None:
        torch.manual_seed(seed)  # initial weights come from the global generator
        self.part, self.views, self.labels = part, views, tuple(labels)
        network: Any = ContentNetwork() if part == "content" else StyleNetwork()
        self.network: torch.nn.Module = network.to(
            memory_format=torch.channels_last
        )  # which the types of `to` leave out
        widths = (CONTENT, STYLE) if part == "content" else (STYLE,)
        kinds = [torch.randn(int(known.max()) + 1, width) for known, width in zip(labels, widths, strict=True)]
        self.heads = torch.nn.ParameterList(kinds)

    def loss(self, chosen: Tensor, rng: torch.Generator) -> tuple[Tensor, list[float]]:
        """Loss over a batch, and the share each classifier got right."""
        with torch.no_grad():
            pictures = (self.views.changed if self.part == "content" else self.views.whole)(chosen, rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            made = self.network(pictures)
        rows = made if isinstance(made, tuple) else (made,)
        scales = (
            ((CONTENT_SCALE, MARGIN, 1.0), (STYLE_SCALE, 0.0, 0.5)) if len(rows) > 1 else ((STYLE_SCALE, 0.0, 1.0),)
        )
        total, right = torch.zeros(()), list[float]()
        for row, head, known, (scale, margin, weight) in zip(rows, self.heads, self.labels, scales, strict=True):
            classes = known[chosen]
            there = classes >= 0
            cosines = row.float()[there] @ F.normalize(head, dim=1).T
            off = margin * F.one_hot(classes[there], cosines.shape[1])
            total = total + weight * F.cross_entropy(scale * (cosines - off), classes[there])
            right.append(float((cosines.argmax(1) == classes[there]).float().mean()))
        return total, right


def settle(lesson: Lesson, allowed: Tensor, steps: int, seed: int) -> float:
    """Fit the style network's last layers alone, on views measured once: many more steps than whole passes allow.

    Args:
        allowed: Pictures to learn from, each style as often as any other.
        steps: Of 512 measured views.

    Returns:
        Share that was right in the last tenth of the steps.
    """
    assert isinstance(lesson.network, StyleNetwork)
    network, known, rng = lesson.network.eval(), lesson.labels[0], torch.Generator().manual_seed(seed)
    measured: list[Tensor] = []
    for start in range(0, VIEWS * len(known), 128):  # every picture in several views
        chosen = torch.arange(start, min(start + 128, VIEWS * len(known))) % len(known)
        with torch.no_grad():
            measured.append(network.measure(lesson.views.whole(chosen, rng)))
    views = torch.cat(measured).view(VIEWS, len(known), -1)
    trained = [*network.to_style.parameters(), *lesson.heads]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    network.to_style.train()
    torch.manual_seed(seed)  # dropout draws from the global generator
    right: list[float] = []
    for _ in range(steps):
        chosen = allowed[torch.randint(len(allowed), (512,), generator=rng)]
        rows = network.embed(views[torch.randint(VIEWS, (512,), generator=rng), chosen])
        cosines = rows @ F.normalize(lesson.heads[0], dim=1).T
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(STYLE_SCALE * cosines, known[chosen]).backward()
        optimizer.step()
        schedule.step()
        right.append(float((cosines.argmax(1) == known[chosen]).float().mean()))
    last = right[-(max(1, steps // 10)) :]
    return sum(last) / len(last)


class Training:
    """One lesson with its optimizer and checkpoint.

    Args:
        steps: Of the whole run; the rate rises for a twentieth of it and falls along a cosine.
    """

    def __init__(self, lesson: Lesson, steps: int, rate: float, seed: int) -> None:
        self.lesson, self.steps, self.rate, self.seed, self.step = lesson, steps, rate, seed, 0
        self.optimizer = torch.optim.AdamW([*lesson.network.parameters(), *lesson.heads], lr=rate, weight_decay=0.05)

    def run(self, allowed: Tensor, batch: int, until: float, save: Path) -> None:
        """Train until the end or until the clock reads `until`."""
        begun, first = time.monotonic(), self.step
        while self.step < self.steps and time.monotonic() < until:
            loss, right = self.train_step(allowed, batch)
            if self.step % 100 == 0:
                rate, shares = (self.step - first) / (time.monotonic() - begun), " ".join(f"{r:.2f}" for r in right)
                LOG.info("step %d of %d: loss %.3f, right %s, %.1f steps/s", self.step, self.steps, loss, shares, rate)
            if self.step % 500 == 0:
                self.save(save)
        self.save(save)

    def train_step(self, allowed: Tensor, batch: int) -> tuple[float, list[float]]:
        """One step on pictures drawn from `allowed`: the loss, and the share each classifier got right."""
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        torch.manual_seed(rng.initial_seed())  # dropout draws from the global generator
        chosen = allowed[torch.randint(len(allowed), (batch,), generator=rng)]
        warm = min(1.0, (self.step + 1) / (self.steps / 20))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * warm * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        loss, right = self.lesson.loss(chosen, rng)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return float(loss.detach()), right

    def save(self, path: Path) -> None:
        """Write weights and optimizer state under a temporary name, then move it."""
        tensors = {f"network/{key}": value for key, value in self.lesson.network.state_dict().items()}
        tensors |= {f"heads/{key}": value for key, value in self.lesson.heads.state_dict().items()}
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
        self.lesson.network.load_state_dict(parts["network"])
        self.lesson.heads.load_state_dict(parts["heads"])
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in parts["optimizer"].items():
            number, _, name = key.partition("/")
            moments.setdefault(int(number), {})[name] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})


def evenly(pictures: Sequence[int], kinds: Sequence[str]) -> list[int]:
    """Repeat pictures so that each kind is drawn as often as any other."""
    groups: dict[str, list[int]] = {}
    for picture, kind in zip(pictures, kinds, strict=True):
        groups.setdefault(kind, []).append(picture)
    most = max(map(len, groups.values()))
    return [group[i % len(group)] for group in groups.values() for i in range(most)]


def prototypes(network: ContentNetwork, pixels: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Mean content embedding of each group of pictures, plain on white: unit rows."""
    network.eval()
    made: list[Tensor] = []
    with torch.no_grad():
        for group in groups:
            rgba = pixels[list(group)].float() / 255
            made.append(network((rgba[:, :3] * rgba[:, 3:] + 1 - rgba[:, 3:]) * 2 - 1)[0].mean(0))
    return F.normalize(torch.stack(made), dim=1)


def export(parts: dict[str, dict[str, Tensor]], pixels: Tensor, rows: Sequence[Captioned], out: Path) -> None:
    """Write networks and prototypes in fp16; renderings the judge never saw have no part in its prototypes.

    A content's prototype is the mean of its pictures; a style has enough of them that its classifier's own vector is
    the better one.

    Args:
        parts: Tensors of the lessons `content` and `style`, as `Training.save` writes them.
        pixels: All pictures as the content network sees them.
    """
    why = unseen(rows)
    by_content: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        if why[index] != "rendering" and _shared(row):
            by_content.setdefault(row.content, []).append(index)
    tensors: dict[str, Tensor] = {}
    for part, saved in parts.items():
        weights = {k.removeprefix("network/"): v for k, v in saved.items() if k.startswith("network/")}
        tensors |= {f"{part}.{k}": v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
        if part == "content":
            network = ContentNetwork()
            network.load_state_dict(weights)
            tensors["prototypes.content"] = prototypes(network, pixels, list(by_content.values()))
        else:
            tensors["prototypes.style"] = F.normalize(saved["heads/0"], dim=1)
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "judge.safetensors") as fresh:
        save_file({key: value.half().contiguous() for key, value in tensors.items()}, fresh)
    labels = {
        "contents": list(by_content),
        "styles": list(_numbered(row.style for row in rows)),
        "unseen_contents": sorted({row.content for row, reason in zip(rows, why, strict=True) if reason == "content"}),
        "unseen_renderings": [row.file for row, reason in zip(rows, why, strict=True) if reason == "rendering"],
    }
    with replacing(out / "labels.json") as fresh:
        fresh.write_text(json.dumps(labels, ensure_ascii=False, indent=0), "utf-8")


def _shared(row: Captioned) -> bool:
    """Whether other styles may draw the same content; the hand-drawn icons have names of their own."""
    return row.style != "streamline-freehand-color"


def _numbered(names: Iterable[str]) -> dict[str, int]:
    """Names in order of appearance, each with its number."""
    return {name: i for i, name in enumerate(dict.fromkeys(names))}


def lesson(part: str, data: Path, rows: Sequence[Captioned], work: Path, seed: int) -> Lesson:
    """Read the pictures of a part and number its classes."""
    size = SIZE if part == "content" else STYLE_SIZE
    views = Views(load_pixels(data, rows, size, work / f"pixels-{size}.npy"))
    names = _numbered(row.content for row in rows if _shared(row))
    styles = _numbered(row.style for row in rows)
    of_content = torch.tensor([names[row.content] if _shared(row) else -1 for row in rows])
    of_style = torch.tensor([styles[row.style] for row in rows])
    return Lesson(part, views, (of_content, of_style) if part == "content" else (of_style,), seed)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    parser = argparse.ArgumentParser(description="Train the judge.")
    parser.add_argument("--data", type=Path, required=True, help="folder made by `intarsia corpus build`")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints; found there, work goes on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", choices=("content", "style"), required=True)
    parser.add_argument("--steps", type=int, default=8_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--settle", type=int, default=4_000, help="steps of the style network's last layers alone")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf)
    given = parser.parse_args()
    until = time.monotonic() + 60 * given.minutes
    rows = read_folder(given.data)
    given.work.mkdir(parents=True, exist_ok=True)
    chosen = lesson(given.part, given.data, rows, given.work, given.seed)
    seen = [i for i, why in enumerate(unseen(rows)) if not why]
    allowed = torch.tensor(seen if given.part == "content" else evenly(seen, [rows[i].style for i in seen]))
    training = Training(chosen, given.steps, given.rate, given.seed)
    state = given.work / f"{given.part}.safetensors"
    if state.exists():
        training.load(state)
    training.run(allowed, given.batch, until, state)
    if given.part == "style" and given.settle and training.step >= given.steps:
        LOG.info("settled: right %.3f", settle(chosen, allowed, given.settle, given.seed))
        training.save(state)
    saved = {part: given.work / f"{part}.safetensors" for part in ("content", "style")}
    if all(path.exists() for path in saved.values()):
        pixels = load_pixels(given.data, rows, SIZE, given.work / f"pixels-{SIZE}.npy")
        export({part: load_file(path) for part, path in saved.items()}, pixels, rows, given.out)
        LOG.info("exported to %s", given.out)


if __name__ == "__main__":
    main()
