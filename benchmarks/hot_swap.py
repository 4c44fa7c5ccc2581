"""Switching between two adapters in memory on Mini: what the switch adds to the step after it, and what memory grows.

Beside it plain diffusers with the same two files loaded, switched by `set_adapters`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch
from intarsia.pipelines.adapter_file import read_adapter, write_adapter
from intarsia.pipelines.adapter_types import LowRank
from intarsia.pipelines.attach import Attachment, attached
from intarsia.pipelines.models import Resident
from intarsia.pipelines.sources import mini_folder, unet_shapes

from .report import Row, save, say

SWITCHES, TIMED, STEADY = 1000, 30, 15
D: Any = diffusers


def main() -> None:
    model = Resident().get("mini")
    shapes = unet_shapes(model.source)
    fast = Path(str(files("intarsia.assets").joinpath("adapters/mini-fast.safetensors")))
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "other.safetensors"
        _opposite(fast, other)
        say("Intarsia")
        uses = [Attachment(name, read_adapter(path, shapes)) for name, path in (("a", fast), ("b", other))]
        with attached(model.components, uses) as branches:
            ours = _measure(model.denoiser, lambda name: branches.activate({name}))
            growth = _growth(model.denoiser, lambda name: branches.activate({name}))
        say("diffusers")
        pipeline = D.StableDiffusionXLPipeline.from_pretrained(mini_folder())
        pipeline.load_lora_weights(fast, adapter_name="a")
        pipeline.load_lora_weights(other, adapter_name="b")
        plain = _measure(pipeline.unet, pipeline.set_adapters)
    rows = [
        Row("Switch between two adapters, Mini", ours["switch"], "s", 0.02, plain=plain["switch"]),
        Row(f"Memory after {SWITCHES} switches", growth, "MB", 8),
    ]
    save("hot_swap", rows, {"ours": ours, "plain": plain, "switches": SWITCHES})


def _opposite(source: Path, target: Path) -> None:
    """The same adapter with its sign turned: another one of the same size."""
    adapter = read_adapter(source)
    layers = {path: layer for path, layer in adapter.layers.items() if isinstance(layer, LowRank)}
    turned = {path: LowRank(layer.down, -layer.up, layer.alpha) for path, layer in layers.items()}
    write_adapter(target, turned, {}, torch.float16)


def _step(denoiser: Any, side: int) -> Callable[[], float]:  # noqa: ANN401
    """One pass through the denoiser, timed; latents of `side` x `side`, with guidance."""
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(2, denoiser.config.in_channels, side, side, generator=rng)
    states = torch.randn(2, 77, denoiser.config.cross_attention_dim, generator=rng)
    times = torch.ones(2, 6)
    pooled_width = denoiser.add_embedding.linear_1.in_features - 6 * denoiser.config.addition_time_embed_dim
    conditions = {"text_embeds": torch.randn(2, pooled_width, generator=rng), "time_ids": times}

    def run() -> float:
        begun = time.perf_counter()
        with torch.no_grad():
            denoiser(latents, 500, states, added_cond_kwargs=conditions)
        return time.perf_counter() - begun

    return run


def _measure(denoiser: Any, switch: Callable[[str], object]) -> dict[str, Any]:  # noqa: ANN401
    """Seconds of a switch: the call, and how much longer the step after it takes than any other."""
    step = _step(denoiser, 32)
    switch("a")
    for _ in range(5):
        step()
    steady = statistics.median(step() for _ in range(STEADY))
    calls: list[float] = []
    steps: list[float] = []
    for number in range(TIMED):
        begun = time.perf_counter()
        switch("ba"[number % 2])
        calls.append(time.perf_counter() - begun)
        steps.append(step())
    switched = statistics.median(calls) + max(0.0, statistics.median(steps) - steady)
    return {"switch": switched, "call": statistics.median(calls), "steady_step": steady, "steps": steps}


def _growth(denoiser: Any, switch: Callable[[str], object]) -> float:  # noqa: ANN401
    """Megabytes the process grows over many switches, each followed by a small step that uses the adapter."""
    step, process = _step(denoiser, 8), psutil.Process()
    before = 0
    for number in range(SWITCHES + 100):  # the first hundred fill the allocator's pools
        switch("ba"[number % 2])
        step()
        if number == 99:
            before = process.memory_info().rss
    return (process.memory_info().rss - before) / 2**20


if __name__ == "__main__":
    main()
