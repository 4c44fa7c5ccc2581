"""What every way to compose costs for N concepts, as multiples of one plain picture with one adapter at the same steps.

A UNet of the shape of SD1.5 (or SDXL) with random weights, and random adapters of rank 16 on all its attention layers.
Seconds are measured; floating-point operations of the denoiser are counted. The results are written after every
measurement, and a run goes on from them.

python -m benchmarks.composition                                   SD1.5's shape at half its width, 128 x 128, CPU
python -m benchmarks.composition --shape sdxl --width 1 --size 1024 --device cuda
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from intarsia.composition.composition import Composition, Concept
from intarsia.composition.draw import moments, prepared
from intarsia.composition.layout import ComposeRequest, ConceptUse
from intarsia.composition.method import CompositionMethod, fitting, methods
from intarsia.pipelines.adapter_types import AdapterFile, LowRank
from intarsia.pipelines.attach import Attachment, attached
from intarsia.pipelines.batch import together
from intarsia.pipelines.denoise import denoise
from intarsia.pipelines.errors import InputError
from intarsia.pipelines.models import Model, load
from intarsia.pipelines.sources import resolve
from torch.utils.flop_counter import FlopCounterMode

from .report import RESULTS, machine, say

COUNTS = (2, 3, 4, 8)
WORDS = ("cat", "fox", "lion", "frog", "rose", "house", "star", "robot")
GRADIENTS = "benchmarks.composition_gradients"  # measures the methods that need them
RANK = 16
SHAPES: dict[str, dict[str, Any]] = {
    "sd15": {
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8, "cross_attention_dim": 768,
    },
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
        "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 1280,
    },
}  # fmt: skip


def build(shape: str, width: float, folder: Path) -> Path:
    """Write a pipeline with a random UNet of a shape and small other parts."""
    import diffusers
    import transformers

    kinds: Any = diffusers
    text: Any = transformers
    torch.manual_seed(0)
    config = SHAPES[shape]
    channels = tuple(int(c * width) for c in config["block_out_channels"])
    unet = kinds.UNet2DConditionModel(**config | {"block_out_channels": channels}, sample_size=64)
    vae = kinds.AutoencoderTiny(latent_channels=4)
    with as_file(files("intarsia.assets").joinpath("mini")) as mini:
        tokenizers = [text.CLIPTokenizerFast.from_pretrained(mini / "tokenizer") for _ in range(2)]

    def encoder(size: int, projected: bool = False) -> Any:  # noqa: ANN401
        kind = text.CLIPTextModelWithProjection if projected else text.CLIPTextModel
        return kind(text.CLIPTextConfig(
            vocab_size=len(tokenizers[0]), hidden_size=size, intermediate_size=size, num_hidden_layers=3,
            num_attention_heads=8, projection_dim=size, bos_token_id=tokenizers[0].bos_token_id,
            eos_token_id=tokenizers[0].eos_token_id, pad_token_id=tokenizers[0].pad_token_id,
        ))  # fmt: skip

    scheduler = kinds.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    if shape == "sd15":
        made = kinds.StableDiffusionPipeline(
            vae=vae, text_encoder=encoder(768), tokenizer=tokenizers[0], unet=unet, scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    else:
        made = kinds.StableDiffusionXLPipeline(
            vae=vae, text_encoder=encoder(768), text_encoder_2=encoder(1280, True), tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1], unet=unet, scheduler=scheduler, add_watermarker=False,
        )  # fmt: skip
    made.save_pretrained(folder)
    return folder


def adapter(model: Model, seed: int) -> AdapterFile:
    """A random adapter on every linear layer of the attention of the UNet."""
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, LowRank] = {}
    for path, module in model.denoiser.named_modules():
        if isinstance(module, torch.nn.Linear) and (".attn1." in path or ".attn2." in path):
            down = torch.randn(RANK, module.in_features, generator=generator) / module.in_features**0.5
            up = 0.02 * torch.randn(module.out_features, RANK, generator=generator)
            layers[f"unet.{path}"] = LowRank(down, up, float(RANK))
    return AdapterFile(Path(f"{seed}"), model.family, "concept", "", layers, str(seed), {})


def scene(model: Model, count: int, size: int, steps: int) -> Composition:
    """Concepts side by side."""
    concepts = tuple(
        Concept(
            Attachment(word, adapter(model, index)), f"a {word}", word, (index / count, 0.0, (index + 1) / count, 1.0)
        )
        for index, word in enumerate(WORDS[:count])
    )
    prompt = " and ".join(f"a {word}" for word in WORDS[:count])
    return Composition(model, concepts, prompt=prompt, steps=steps, guidance=5.0, size=(size, size), seed=1)


def drawing(composition: Composition, method: CompositionMethod[Any]) -> Callable[[], None]:
    def draw() -> None:
        with prepared(composition, method, method.options()) as made:
            for _ in moments(composition, made):
                pass
        if composition.model.device.type != "cpu":
            torch.accelerator.synchronize()

    return draw


def batch(composition: Composition) -> Callable[[], None]:
    """As many pictures with one adapter in one batch, which is what Composite's predictions cost at least."""
    one = replace(composition, concepts=composition.concepts[:1])

    def draw() -> None:
        with attached(one.model.components, one.attachments) as hung:
            prompt = one.encode(hung, one.prompt, hung.names)
            works = one.begin([prompt] * len(composition.concepts))
            generators = [torch.Generator().manual_seed(index) for index in range(len(works))]
            for _ in denoise(replace(together(works), generator=generators), one.token):
                pass

    return draw


def measured(draw: Callable[[], None]) -> dict[str, float]:
    """Seconds, and floating-point operations counted in a run of their own."""
    seconds = _seconds(draw)
    with FlopCounterMode(display=False) as counter:
        draw()
    return {"seconds": seconds, "operations": float(counter.get_total_flops())}


def able(composition: Composition, method: CompositionMethod[Any]) -> bool:
    """Whether a method composes so many, without gradients: those are measured against the official procedures."""
    uses = tuple(
        ConceptUse(adapter=one.name, prompt=one.prompt, words=one.phrase, box=one.box) for one in composition.concepts
    )
    try:
        fitting(ComposeRequest(prompt=composition.prompt, concepts=uses), method, composition.model.family, {})
    except InputError:
        return False
    return "gradients" not in method.needs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="sd15")
    parser.add_argument("--width", type=float, default=0.5, help="part of the real channels")
    parser.add_argument("--size", type=int, default=128, help="side in pixels")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    name = f"composition_{given.shape}_{given.device}"
    path = RESULTS / "composition" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    settings = {key: value for key, value in vars(given).items() if key != "device"}
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if found.get("settings") != settings:
        found = {"settings": settings, "values": {}}
    with tempfile.TemporaryDirectory() as folder:
        model = load(resolve(str(build(given.shape, given.width, Path(folder)))), given.device)
        merge = methods()["merge"]
        drawing(scene(model, 1, given.size, 2), merge)()  # warm
        for count in (1, *COUNTS):
            composition = scene(model, count, given.size, given.steps)
            for method in methods().values() if count > 1 else (merge,):
                key = f"{method.name} {count}"
                if key in found["values"] or not able(composition, method):
                    continue
                say(key)
                composition = replace(composition, memo={})
                drawing(replace(composition, steps=2), method)()  # what is kept from picture to picture is there then
                found["values"][key] = measured(drawing(composition, method))
                if count == 1:
                    found["values"][key]["seconds"] = min(
                        found["values"][key]["seconds"],
                        *(measured(drawing(composition, merge))["seconds"] for _ in "ab"),
                    )
                found["machine"] = machine() | {"device": _device(given.device), "threads": torch.get_num_threads()}
                _write(path, found)
        if "beside" not in found:
            four = scene(model, 4, given.size, given.steps)
            turns = [
                [_seconds(draw) for draw in (drawing(four, methods()["composite"]), batch(four))] for _ in range(3)
            ]
            found["beside"] = {"composite 4": min(t[0] for t in turns), "batch of 4": min(t[1] for t in turns)}
            _write(path, found)
    path.with_suffix(".svg").write_text(curves(ratios(found)), "utf-8")
    for key, value in ratios(found).items():
        print(key, *(f"{what} {number:.2f}" for what, number in value.items()))


def _write(path: Path, found: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    part.replace(path)


def _seconds(draw: Callable[[], None]) -> float:
    began = time.perf_counter()
    draw()
    return time.perf_counter() - began


def _device(name: str) -> str:
    return torch.cuda.get_device_name() if name.startswith("cuda") else "CPU"


def ratios(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Every value as a multiple of one picture with one adapter."""
    one = found["values"]["merge 1"]
    return {key: {what: number / one[what] for what, number in value.items()} for key, value in found["values"].items()}


INKS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf",
        "#003f5c", "#58508d", "#bc5090", "#ff6361")  # fmt: skip
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 380, 44, 150, 16, 36


def curves(found: dict[str, dict[str, float]]) -> str:
    """Draw seconds over N as an SVG, a line for each method."""
    names = [name for name in dict.fromkeys(key.split()[0] for key in found) if f"{name} {COUNTS[-1]}" in found]
    most = max(value["seconds"] for key, value in found.items() if key.split()[0] in names)
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(count: int, seconds: float) -> tuple[float, float]:
        return LEFT + wide * (count - 1) / (COUNTS[-1] - 1), TOP + high * (1 - seconds / most)

    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
             f'font-size="11"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']  # fmt: skip
    for tick in range(0, int(most) + 1, max(1, int(most) // 8)):
        y = at(1, tick)[1]
        lines.append(f'<path d="M{LEFT} {y:.1f}H{LEFT + wide}" stroke="#ddd"/><text x="{LEFT - 6}" y="{y + 4:.1f}" '
                     f'text-anchor="end">{tick}x</text>')  # fmt: skip
    for count in (1, *COUNTS):
        lines.append(f'<text x="{at(count, 0)[0]:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{count}</text>')
    last: list[tuple[float, str, str]] = []
    for name, ink in zip(names, INKS, strict=False):
        points = [(1, 1.0)] if name != "merge" else [(1, found["merge 1"]["seconds"])]
        points += [(count, found[f"{name} {count}"]["seconds"]) for count in COUNTS if f"{name} {count}" in found]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        lines.append(f'<polyline points="{path}" fill="none" stroke="{ink}" stroke-width="2"/>')
        last.append((at(*points[-1])[1], name, ink))
    below = -100.0
    for y, name, ink in sorted(last):
        below = max(y + 4, below + 13)  # names of lines that end together stand below each other
        lines.append(f'<text x="{LEFT + wide + 8}" y="{below:.1f}" fill="{ink}">{name}</text>')
    lines.append(f'<text x="{LEFT + wide / 2}" y="{HEIGHT - 1}" text-anchor="middle">concepts</text></svg>')
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
