"""CLoRA and LoRA-Composer against their official procedures: processor time, memory, bytes kept for gradients, passes.

A random UNet of SD 1.5's shape at a fifth of its width draws one picture of two concepts; every arm is a process of its
own, and both arms of a pair draw the same picture.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch
import transformers
from intarsia.composition.composition import Composition, Concept
from intarsia.composition.draw import moments, prepared
from intarsia.composition.method import method_named
from intarsia.pipelines.adapter_types import AdapterFile, LowRank
from intarsia.pipelines.attach import Attachment
from intarsia.pipelines.loading import clip_tokenizer
from intarsia.pipelines.models import Model, load
from intarsia.pipelines.sources import resolve
from torch import Tensor, nn

from . import composition_naive
from .report import Row, save, say

D: Any = diffusers
T: Any = transformers
STEPS, SIDE, WIDTH = 10, 256, 64
CHANNELS = (64, 128, 256, 256)
NAIVE: dict[str, Callable[..., Tensor]] = {
    "clora": composition_naive.clora,
    "lora_composer": composition_naive.lora_composer,
}
ARMS: dict[str, tuple[str, bool, dict[str, Any]]] = {  # method, whether it is the official procedure, options
    "clora": ("clora", False, {"cell": "32"}),
    "clora, all graphs": ("clora", False, {"cell": "32", "graphs": "all"}),
    "clora official": ("clora", True, {"cell": "32"}),
    "clora, release's order": ("clora", False, {"cell": "32", "order": "release"}),
    "clora official, release's order": ("clora", True, {"cell": "32", "order": "release"}),
    "lora_composer": ("lora_composer", False, {"cell": "32", "patience": 1.0}),
    "lora_composer official": ("lora_composer", True, {"cell": "32", "patience": 1.0}),
}
PAIRS = (
    ("CLoRA", "clora", "clora official"),
    ("CLoRA, graphs of all branches", "clora, all graphs", "clora official"),
    ("CLoRA, release's order", "clora, release's order", "clora official, release's order"),
    ("LoRA-Composer", "lora_composer", "lora_composer official"),
)


@dataclass
class Kept:
    """Bytes that graphs hold for their backward passes, now and at most; a storage counts once, weights never."""

    weights: frozenset[int]
    held: dict[int, int] = field(default_factory=dict[int, int])
    now: int = 0
    most: int = 0

    def pack(self, tensor: Tensor) -> Saved:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        saved = Saved(tensor.detach())  # its own graph would hold it for ever
        if place not in self.weights:
            self.held[place] = self.held.get(place, 0) + 1
            size = storage.nbytes()
            self.now += size if self.held[place] == 1 else 0
            self.most = max(self.most, self.now)
            weakref.finalize(saved, self._let_go, place, size)
        return saved

    def _let_go(self, place: int, size: int) -> None:
        self.held[place] -= 1
        self.now -= size if not self.held[place] else 0


class Saved:
    """A tensor that a graph holds."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(_measured(sys.argv[1], Path(sys.argv[2]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder))
        found = {arm: _apart(arm, folder) for arm in ARMS}
    save("composition_gradients", _rows(found), {"arms": found, "steps": STEPS, "pixels": SIDE, "channels": CHANNELS})


def _rows(found: dict[str, dict[str, Any]]) -> list[Row]:
    rows: list[Row] = []
    for title, ours, official in PAIRS:
        one, other = found[ours], found[official]
        rows += [
            Row(f"{title}: processor time of a picture (plain: its official procedure)", one["seconds"], "s", 0.5,
                plain=other["seconds"], of="ratio"),
            Row(f"{title}: peak memory above the model's", one["memory"], "MB", 0.5, plain=other["memory"], of="ratio"),
            Row(f"{title}: kept for gradients", one["kept"], "MB", 0.5, plain=other["kept"], of="ratio"),
        ]  # fmt: skip
    return rows


def _apart(arm: str, folder: str) -> dict[str, Any]:
    """Measure an arm in a process of its own: its peak memory is nobody else's."""
    say(arm)
    command = [sys.executable, "-m", "benchmarks.composition_gradients", arm, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measured(arm: str, folder: Path) -> dict[str, Any]:
    model = load(resolve(str(folder)), "cpu")
    made = _composition(model)
    before = psutil.Process().memory_info().rss
    with _passes(model) as passes:
        begun = time.process_time()  # others may be at work on the machine
        latents = _drawn(arm, made)
        seconds = time.process_time() - begun
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {
        "seconds": seconds,
        "memory": memory / 2**20,
        "kept": _kept(arm, model),
        "passes_begun": passes["conv_in"],
        "passes_ended": passes["conv_out"],
        "latents_mean": float(latents.mean()),
        "latents_deviation": float(latents.std()),
    }


def _kept(arm: str, model: Model) -> float:
    """Megabytes that graphs hold at most, over two steps."""
    kept = Kept(frozenset(weight.untyped_storage().data_ptr() for weight in model.denoiser.parameters()))
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda saved: saved.tensor):
        _drawn(arm, _composition(model, steps=2))
    return kept.most / 2**20


def _drawn(arm: str, made: Composition) -> Tensor:
    name, official, options = ARMS[arm]
    method = method_named(name)
    parsed = method.options.parse(options)
    if official:
        return NAIVE[name](made, parsed)
    latents = torch.empty(0)
    with prepared(made, method, parsed) as drawing:
        for moment in moments(made, drawing):
            latents = moment.stepped.latents
    return latents


@contextmanager
def _passes(model: Model) -> Generator[dict[str, int]]:
    """Count the samples that enter the denoiser, and those that leave it."""
    found = {"conv_in": 0, "conv_out": 0}

    def counting(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            found[name] += len(output)

        return count

    handles = [getattr(model.denoiser, name).register_forward_hook(counting(name)) for name in found]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _composition(model: Model, steps: int = STEPS) -> Composition:
    names, boxes = ("cat", "dog"), ((0.0, 0.1, 0.45, 0.9), (0.55, 0.1, 1.0, 0.9))
    concepts = tuple(
        Concept(Attachment(name, _adapter(model, seed)), f"a {name}", f"a {name}", box)
        for seed, (name, box) in enumerate(zip(names, boxes, strict=True))
    )
    return Composition(model, concepts, prompt="a cat and a dog in a garden", steps=steps, size=(SIDE, SIDE))


def _adapter(model: Model, seed: int, rank: int = 8) -> AdapterFile:
    """Random factors on every attention layer of the denoiser."""
    rng = torch.Generator().manual_seed(seed)
    found: dict[str, LowRank] = {}
    for path, module in model.denoiser.named_modules():
        if path.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            down = torch.randn(rank, module.in_features, generator=rng) / module.in_features**0.5
            found[f"unet.{path}"] = LowRank(down, 0.1 * torch.randn(module.out_features, rank, generator=rng), rank)
    return AdapterFile(Path(f"{seed}.safetensors"), "sd15", "concept", "", found, str(seed), {})


def _write(folder: Path) -> None:
    """Write a random pipeline with SD 1.5's blocks and number of layers, narrower throughout."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer("<|endoftext|>")
    reader = T.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
        num_attention_heads=4, projection_dim=WIDTH, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    unet = D.UNet2DConditionModel(
        sample_size=SIDE // 8, block_out_channels=CHANNELS, attention_head_dim=8, cross_attention_dim=WIDTH
    )
    vae = D.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4,
    )  # fmt: skip
    noise: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = D.DDIMScheduler(**noise, clip_sample=False, steps_offset=1)
    D.StableDiffusionPipeline(
        vae=vae, text_encoder=T.CLIPTextModel(reader), tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


if __name__ == "__main__":
    main()
