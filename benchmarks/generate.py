"""Time of one Mini picture, 20 steps with guidance, against a bare diffusers call of the same folder.

Ours is all a person gets: previews of every step, settings, the PNG on disk. Both are loaded and warm, take turns, and
the median of their times counts. The two pictures are compared: a faster picture that is another picture is no gain.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from intarsia.pipelines.events import Artifact, CancelToken
from intarsia.pipelines.image import generate
from intarsia.pipelines.models import Model, Resident
from intarsia.pipelines.requests import GenerateRequest
from PIL import Image

from .report import Row, save, say

PROMPT = "a red apple, twemoji style"
STEPS = 20
GUIDANCE = 5.0


def ours(model: Model, request: GenerateRequest, folder: Path) -> Path:
    """Make the picture as a job does; give its file."""
    paths = [
        Path(event.path)
        for event in generate(request, model, [], folder, folder, CancelToken())
        if isinstance(event, Artifact)
    ]
    return paths[0]


def bare(pipeline: Any, request: GenerateRequest) -> Image.Image:  # noqa: ANN401 - a diffusers pipeline
    """Make the same picture with one plain call."""
    import torch

    made = pipeline(
        request.prompt,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        width=request.width,
        height=request.height,
        generator=torch.Generator().manual_seed(request.seed),
    )
    return made.images[0]


def main() -> None:
    import torch
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini", help="mini or a folder of an SDXL-shaped pipeline")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()

    model = Resident().get(arguments.model, device="cpu")
    width, height = model.native_size
    folder = model.source.path
    if folder is None:
        raise SystemExit("The benchmark wants a model that is a folder.")
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    request = GenerateRequest(
        prompt=PROMPT, model=arguments.model, seed=7, steps=STEPS, guidance=GUIDANCE, width=width, height=height
    )
    times: dict[str, list[float]] = {"ours": [], "bare": []}
    difference = 0
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(arguments.repeats + 1):
            say(f"turn {turn} of {arguments.repeats}" + (" (warming up)" if turn == 0 else ""))
            began = time.perf_counter()
            path = ours(model, request, Path(scratch))
            between = time.perf_counter()
            picture = bare(pipeline, request)
            ended = time.perf_counter()
            difference = grey_levels(Image.open(path), picture)
            if turn:
                times["ours"].append(between - began)
                times["bare"].append(ended - between)
    our_time, bare_time = (statistics.median(times[name]) for name in ("ours", "bare"))
    details = {
        "request": request.model_dump(mode="json"),
        "seconds": times,
        "largest_difference_in_grey_levels": difference,
        "threads": torch.get_num_threads(),
    }
    what = f"A Mini picture, {width}x{height}, {STEPS} steps, guidance {GUIDANCE:g}"
    save(
        "generate",
        [
            Row(f"{what}, against plain diffusers", our_time, "s", 1.1, plain=bare_time, of="ratio"),
            Row(what, our_time, "s", 3.0),
        ],
        details,
    )


def grey_levels(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of two pictures' values, 0..255."""
    return int(np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max())


if __name__ == "__main__":
    main()
