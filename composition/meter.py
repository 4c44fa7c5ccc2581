"""What drawing costs: time, rows through the denoiser, and the most memory seen."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..pipelines.image import peak_memory
from ..pipelines.models import Model


@dataclass
class Meter:
    """What drawing cost.

    Args:
        rows: Latents the denoiser was run on; with guidance two per step of a picture.
        memory: Most bytes seen: on an accelerator by tensors, on the CPU by the process.
        seconds: On the wall.
    """

    rows: int = 0
    memory: int = 0
    seconds: float = 0.0


@contextmanager
def metered(model: Model) -> Generator[Meter]:
    """Count what the denoiser is asked for within the block; nothing is left on it afterwards."""
    meter = Meter()
    if model.device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(model.device)

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:  # noqa: ANN401
        latents = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
        meter.rows += len(latents)
        meter.memory = max(meter.memory, peak_memory(model.device))

    handle = model.denoiser.register_forward_hook(count, with_kwargs=True)
    started = time.perf_counter()
    try:
        yield meter
    finally:
        meter.seconds = time.perf_counter() - started
        handle.remove()
