"""Steps per second of B-LoRA on Mini, against a plain loop built as diffusers' DreamBooth-LoRA script for SDXL is.

The plain loop follows `examples/dreambooth/train_dreambooth_lora_sdxl.py` without its options: PEFT layers added to the
U-Net, AdamW, a constant schedule, everything through `Accelerator.prepare`; the prompt is embedded once, since the text
encoders are not trained; each step takes the picture from a DataLoader, encodes it, draws noise and timestep, predicts,
clips at 1, shows the loss on a progress bar. It trains the very same layers at the same ranks, resolution and batch.
One thing had to give: the script knows only autoencoders with a distribution, Mini's gives points.

Each side runs twice, in turns, in a process of its own; the better run counts. Samples and checkpoints are off on both
sides, and on in a last run of ours alone, which is timed from the first event to the adapter files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .report import Row, save, say

STEPS = 300
SIDES = ("ours", "plain")


def draw(path: Path) -> Path:
    """Draw the picture to learn from: a cat's head in flat colours."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (512, 512), "#f6ead7")
    pen = ImageDraw.Draw(image)
    pen.polygon([(120, 230), (140, 70), (250, 170)], fill="#c8643c")
    pen.polygon([(392, 230), (372, 70), (262, 170)], fill="#c8643c")
    pen.ellipse((96, 130, 416, 430), fill="#d9774a")
    for x in (190, 322):
        pen.ellipse((x - 28, 230, x + 28, 290), fill="#fff7e6")
        pen.ellipse((x - 12, 240, x + 12, 284), fill="#27221f")
    pen.polygon([(240, 320), (272, 320), (256, 342)], fill="#5b2a1f")
    image.save(path)
    return path


def request(arguments: argparse.Namespace, picture: Path, quiet: bool) -> Any:  # noqa: ANN401 - heavy import
    from intarsia.pipelines.requests import TrainingPicture, TrainRequest

    options: dict[str, Any] = {"steps": arguments.steps}
    if quiet:
        options |= {"sample_every": 0, "checkpoint_every": 0}
    pictures = (TrainingPicture(path=str(picture)),)
    return TrainRequest(recipe="blora", model=arguments.model, name="cat", pictures=pictures, seed=1, options=options)


def run_ours(arguments: argparse.Namespace, quiet: bool) -> dict[str, float]:
    """Train with Intarsia; give the seconds of all steps but the first, and of everything."""
    from intarsia.pipelines.events import CancelToken, Progress
    from intarsia.pipelines.models import Resident
    from intarsia.training.run import train

    model = Resident().get(arguments.model, device="cpu")
    marks: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        wanted = request(arguments, draw(Path(folder, "cat.png")), quiet)
        began = time.perf_counter()
        for event in train(wanted, model, Path(folder), CancelToken()):
            if isinstance(event, Progress) and event.stage == "train":
                marks.append(time.perf_counter())
        ended = time.perf_counter()
    return {"steps": len(marks) - 1, "seconds": marks[-1] - marks[0], "whole": ended - began}


def run_plain(arguments: argparse.Namespace, quiet: bool) -> dict[str, float]:
    """Train with the plain loop; same numbers."""
    from intarsia.training.recipe import ModelFacts, recipes

    from .plain_loop import Wish, linear_layers, load, train

    assert quiet, "the plain loop has neither samples nor checkpoints here"
    parts = load(arguments.model)
    recipe = recipes()["blora"]
    layers = linear_layers(parts.unet)
    width = max(parts.unet.config["block_out_channels"])
    facts = ModelFacts("sdxl", layers, width, parts.resolution, 1)
    settings = recipe.settings(facts, recipe.options(steps=arguments.steps))
    prompt = f"A {recipe.trigger('cat', recipe.options())}"
    marks: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        picture = draw(Path(folder, "cat.png"))
        wish = Wish(settings.ranks, settings.resolution, settings.learning_rate, arguments.steps, prompt, 1)
        began = time.perf_counter()
        for _ in train(parts, picture, wish):
            marks.append(time.perf_counter())
        ended = time.perf_counter()
    return {"steps": len(marks) - 1, "seconds": marks[-1] - marks[0], "whole": ended - began}


@contextmanager
def result_file() -> Generator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder, "result.json")


def apart(arguments: argparse.Namespace, side: str, quiet: bool) -> dict[str, float]:
    """Run one side in a process of its own, so that neither inherits the other's memory or warm caches."""
    with result_file() as path:
        command = [sys.executable, "-m", "benchmarks.train_blora", "--model", arguments.model]
        command += ["--steps", str(arguments.steps), "--only", side, "--out", str(path)]
        subprocess.run([*command, *([] if quiet else ["--with-samples"])], check=True)
        return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini", help="mini or a folder of an SDXL-shaped pipeline")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--with-samples", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        run = run_ours if arguments.only == "ours" else run_plain
        arguments.out.write_text(json.dumps(run(arguments, not arguments.with_samples)))
        return
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for turn in range(arguments.repeats):
        for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
            runs[side].append(apart(arguments, side, quiet=True))
            say(f"{side}: {rate(runs[side][-1]):.2f} steps/s")
    full = apart(arguments, "ours", quiet=False)
    best = {side: max(rate(one) for one in runs[side]) for side in SIDES}
    what = f"B-LoRA on Mini, {arguments.steps} steps"
    save(
        "train_blora",
        [
            Row(f"{what}, speed", best["ours"], "steps/s", 1.3, at_least=True, plain=best["plain"], of="ratio"),
            Row(f"{what}, with samples and checkpoints", full["whole"], "s", 180),
        ],
        {"model": arguments.model, "runs": runs, "with_samples": full},
    )


def rate(run: dict[str, float]) -> float:
    """Steps per second, the first step left out on both sides."""
    return run["steps"] / run["seconds"]


if __name__ == "__main__":
    main()
