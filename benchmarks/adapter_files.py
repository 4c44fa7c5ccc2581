"""Adapter files of every spelling, family and kind: our error against the dense change, and what diffusers does.

Every file changes a few layers of a tiny random pipeline with the family's real names. The oracle writes each change
into the weights, by the algorithm's formula alone; the error is the largest over the layers' outputs, as a share of
the largest output. The same file then goes through `load_lora_weights` of plain diffusers.

Run: python -m benchmarks.adapter_files
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from intarsia.pipelines.adapter_file import read_adapter
from intarsia.pipelines.architectures import ModuleIndex, sgm_spelling
from intarsia.pipelines.attach import Attachment, attached
from intarsia.pipelines.transformer_names import spellings
from safetensors.torch import save_file
from torch import Tensor

from .report import RESULTS, machine, say

Tensors = dict[str, Tensor]
Made = tuple[Tensors, Callable[[Tensor], Tensor]]  # a layer's tensors by their part's ending; old weight to new
BOUND = 1e-5
FAMILIES = ("sd15", "sdxl", "sd3", "flux1")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(out: int, inside: int, dotted: bool) -> Made:
    down, up = random(2, inside, seed=1), random(out, 2, seed=2)
    names = ("lora_A.weight", "lora_B.weight") if dotted else ("lora_down.weight", "lora_up.weight")
    tensors: Tensors = dict(zip(names, (down, up), strict=True))
    if dotted:
        return tensors, lambda weight: weight + up @ down
    return tensors | {"alpha": torch.tensor(1.0)}, lambda weight: weight + 0.5 * up @ down


def dora(out: int, inside: int, dotted: bool) -> Made:
    tensors, changed = lora(out, inside, dotted)
    length = random(out, 1, seed=3).abs() + 1
    tensors["lora_magnitude_vector" if dotted else "dora_scale"] = length.flatten() if dotted else length

    def turned(weight: Tensor) -> Tensor:
        new = changed(weight)
        return length * new / new.norm(dim=1, keepdim=True)

    return tensors, turned


def loha(out: int, inside: int, dotted: bool) -> Made:
    a1, b1, a2, b2 = (
        random(out, 2, seed=1),
        random(2, inside, seed=2),
        random(out, 2, seed=3),
        random(2, inside, seed=4),
    )
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    return dict(zip(names, (a1, b1, a2, b2), strict=True)), lambda weight: weight + (a1 @ b1) * (a2 @ b2)


def lokr(out: int, inside: int, dotted: bool) -> Made:
    one, two = random(2, 2, seed=1), random(out // 2, inside // 2, seed=2)
    return {"lokr_w1": one, "lokr_w2": two}, lambda weight: weight + torch.kron(one, two)


def ia3(out: int, inside: int, dotted: bool) -> Made:
    gain = random(out, seed=1)
    return {"weight": gain, "on_input": torch.tensor(0)}, lambda weight: weight * (1 + gain[:, None])


def full(out: int, inside: int, dotted: bool) -> Made:
    change = random(out, inside, seed=1)
    return {"diff": change}, lambda weight: weight + change


KINDS: dict[str, Callable[[int, int, bool], Made]] = {
    "LoRA": lora, "DoRA": dora, "LoHa": loha, "LoKr": lokr, "(IA)³": ia3, "full difference": full,
}  # fmt: skip
DOTTED = ("diffusers", "PEFT", "ComfyUI")


def stems(dialect: str, family: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """Spell some layers as a dialect does: name in the file to the layers it stands for."""
    unet = family in ("sd15", "sdxl")
    component = "unet" if unet else "transformer"
    linear = {path: shape for path, shape in shapes.items() if len(shape) == 2}
    wanted = ".attn1.to_q", ".attn2.to_k", ".ff.net.0.proj", ".attn.to_k", ".attn.to_out.0", ".proj_mlp"
    chosen = [path for path in linear if path.endswith(wanted)][:6]
    if dialect == "diffusers":
        return {f"{component}.{path}": [path] for path in chosen}
    if dialect == "PEFT":
        return {f"base_model.model.{path}": [path] for path in chosen}
    if dialect == "LyCORIS":
        return {f"lycoris_{path.replace('.', '_')}": [path] for path in chosen}
    if unet and dialect == "kohya":
        every = list(shapes)
        spelled = [sgm_spelling(path, 2, every) if family == "sdxl" else None for path in chosen]
        return {f"lora_unet_{(sgm or path).replace('.', '_')}": [path]
                for sgm, path in zip(spelled, chosen, strict=True)}  # fmt: skip
    if unet:
        return {}
    theirs = {
        name: [piece.path.removeprefix("transformer.") for piece in pieces]
        for name, pieces in spellings(family, linear)
        if "processor" not in name and not (pieces[0].rows and len(pieces) == 1)
    }
    kept = {name: paths for name, paths in theirs.items() if name.endswith((".qkv", ".fc1", "linear1", "img_mlp.0"))}
    names = dict(list(kept.items())[:6])
    if dialect == "kohya":
        return {f"lora_unet_{name.replace('.', '_')}": paths for name, paths in names.items()}
    return {f"diffusion_model.{name}": paths for name, paths in names.items()}


def outputs(denoiser: Any, paths: list[str]) -> Tensors:  # noqa: ANN401
    """What each layer gives for one input."""
    with torch.no_grad():
        return {p: (m := denoiser.get_submodule(p))(random(3, m.in_features, seed=7)) for p in paths}


def error(found: Tensors, expected: Tensors) -> float:
    return max(float((found[p] - value).abs().max() / value.abs().max()) for p, value in expected.items())


def written(denoiser: Any, groups: dict[str, list[str]], kind: str, dotted: bool) -> tuple[Tensors, Any]:  # noqa: ANN401
    """The file's tensors, and a copy of the network with each change written into its weights."""
    other, tensors = copy.deepcopy(denoiser), dict[str, Tensor]()
    for stem, paths in groups.items():
        layers = [other.get_submodule(path) for path in paths]
        fused = torch.cat([layer.weight.data for layer in layers])
        out, inside = fused.shape
        parts, changed = KINDS[kind](out, inside, dotted)
        tensors |= {f"{stem}.{end}": part for end, part in parts.items()}
        for layer, new in zip(layers, changed(fused).split([len(layer.weight) for layer in layers]), strict=True):
            layer.weight.data.copy_(new)
    return tensors, other


def plain_diffusers(pipeline: Any, file: Path, paths: list[str], base: Tensors, expected: Tensors) -> str:  # noqa: ANN401
    """What `load_lora_weights` does with the file, in words."""
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    try:
        pipeline.load_lora_weights(file.parent, weight_name=file.name, use_safetensors=True)
    except Exception as problem:  # noqa: BLE001 - whatever it raises is the answer
        return type(problem).__name__
    found = outputs(denoiser, paths)
    pipeline.unload_lora_weights()
    if error(found, base) == 0:
        return "no error, **no effect**"
    off = error(found, expected)
    return "the same" if off < 1e-4 else f"no error, **another picture** ({off:.0%} off)"


def measure(folder: Path) -> list[dict[str, Any]]:
    """One row for each spelling, family and kind that a trainer writes."""
    import diffusers

    library: Any = diffusers  # its lazy names are invisible to type checkers
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from fakes import tiny_pipeline  # pyright: ignore[reportMissingImports]

    rows: list[dict[str, Any]] = []
    for family in FAMILIES:
        where = tiny_pipeline(family, folder / family)
        pipeline: Any = library.DiffusionPipeline.from_pretrained(where)
        component = "unet" if hasattr(pipeline, "unet") else "transformer"
        denoiser = getattr(pipeline, component)
        inner = {
            n.removesuffix(".weight"): tuple(p.shape) for n, p in denoiser.named_parameters() if n.endswith(".weight")
        }
        shapes = {f"{component}.{path}": shape for path, shape in inner.items()}
        assert ModuleIndex(shapes).family == family
        for dialect in ("diffusers", "PEFT", "kohya", "LyCORIS", "ComfyUI"):
            groups = stems(dialect, family, inner)
            for kind in KINDS if dialect in ("kohya", "LyCORIS") else ("LoRA", "DoRA"):
                if not groups:
                    continue
                tensors, changed = written(denoiser, groups, kind, dialect in DOTTED)
                file, paths = folder / "a.safetensors", [path for group in groups.values() for path in group]
                save_file({name: value.contiguous() for name, value in tensors.items()}, file)
                base, expected = outputs(denoiser, paths), outputs(changed, paths)
                with attached({component: denoiser}, [Attachment("a", read_adapter(file, shapes))]):
                    ours = error(outputs(denoiser, paths), expected)
                theirs = plain_diffusers(pipeline, file, paths, base, expected)
                say(f"{family} {dialect} {kind}: {ours:.1e}; diffusers: {theirs}")
                rows.append({"family": family, "dialect": dialect, "kind": kind, "error": ours, "diffusers": theirs})
    return rows


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder))
    worst = max(row["error"] for row in rows)
    part = RESULTS / "adapters" / "files.json"
    part.parent.mkdir(exist_ok=True)
    part.write_text(json.dumps({"rows": rows, "machine": machine()}, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(f"{len(rows)} files, largest error {worst:.1e} ({'below' if worst < BOUND else 'NOT below'} {BOUND:g})")
    if worst >= BOUND:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
