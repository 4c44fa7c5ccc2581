"""Compositions of tiny random models and adapters, and what must be the same before and after a method."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from intarsia.composition.composition import Composition, Concept
from intarsia.composition.draw import moments, prepared
from intarsia.composition.method import methods
from intarsia.pipelines.adapter_types import AdapterFile, LowRank
from intarsia.pipelines.attach import Attachment
from intarsia.pipelines.models import Model, load
from intarsia.pipelines.sources import resolve
from torch import Tensor, nn

NAMES = ("apple", "cat", "dog", "style")
BOXES = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.25, 0.25, 0.75, 0.75), (0.0, 0.5, 1.0, 1.0))
PROMPT = "a apple and a cat and a dog, style"
UNET_PARTS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v",
              "attn2.to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1")  # fmt: skip
DIT_PARTS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
             "ff.net.0.proj", "ff_context.net.0.proj", "proj_mlp", "proj_out")  # fmt: skip

QUICK: dict[str, dict[str, Any]] = {"ziplora": {"steps": 2}}  # options of methods that work long before they draw


@cache
def _load(folder: Path) -> Model:
    model = load(resolve(str(folder)), "cpu")
    model.engine.encode("a", "", 3.0)  # transformers hangs hooks of its own on encoders at their first use
    return model


def tiny_model(tiny: Callable[..., Path], family: str, variant: str = "") -> Model:
    """The tiny random model of a family, loaded once per run."""
    return _load(tiny(family, variant=variant))


def random_adapter(model: Model, seed: int, rank: int = 4, text: bool = True, size: float = 0.3) -> AdapterFile:
    """An adapter with random factors on attention, feed-forward, projections, a convolution per block, and the text."""
    generator = torch.Generator().manual_seed(seed)
    parts = UNET_PARTS if model.spec.denoiser == "unet" else DIT_PARTS
    found: dict[str, LowRank] = {}
    sources: dict[str, tuple[Any, tuple[str, ...]]] = {model.spec.denoiser: (model.denoiser, parts)}
    if text:
        sources["text_encoder"] = (model.components["text_encoder"], ("q_proj", "v_proj"))
    for component, (root, ends) in sources.items():
        for path, module in root.named_modules():
            if not path.endswith(ends) or not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            shape = tuple(module.weight.shape)
            down = torch.randn(rank, *shape[1:], generator=generator) * size / down_norm(shape)
            up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator) * size
            found[f"{component}.{path}"] = LowRank(down, up, float(rank))
    return AdapterFile(Path(f"{seed}.safetensors"), model.family, "concept", "", found, str(seed), {})


def down_norm(shape: tuple[int, ...]) -> float:
    return float(torch.tensor(shape[1:]).prod()) ** 0.5


def composition(model: Model, count: int = 2, **changes: Any) -> Composition:  # noqa: ANN401
    """A small picture of `count` concepts: an adapter, a phrase of the prompt and a box for each."""
    side = 64 if model.spec.denoiser == "unet" else 128
    concepts = tuple(
        Concept(
            Attachment(NAMES[index], random_adapter(model, index + 1)), f"a {NAMES[index]}", NAMES[index], BOXES[index]
        )
        for index in range(count)
    )
    made = Composition(model, concepts, prompt=PROMPT, steps=4, guidance=3.0, size=(side, side), seed=7)
    return replace(made, **changes)


def with_seeds(made: Composition, *seeds: int) -> Composition:
    """The same with the adapters of these seeds in place of its own."""
    concepts = tuple(
        replace(concept, attachment=replace(concept.attachment, adapter=random_adapter(made.model, seed)))
        for concept, seed in zip(made.concepts, seeds, strict=True)
    )
    return replace(made, concepts=concepts)


def latents(made: Composition, method: str, **options: Any) -> Tensor:  # noqa: ANN401
    """Draw with a method; the final latents, which no decoder rounds."""
    found = methods()[method]
    result = torch.empty(0)
    with prepared(made, found, found.options.parse(options)) as drawing:
        for moment in moments(made, drawing):
            result = moment.stepped.latents
    return result


def plain(made: Composition, *names: str) -> Tensor:
    """Draw with some of the adapters hung on in the ordinary way, or with none: the oracle of limit cases."""
    concepts = [concept for concept in made.concepts if concept.name in names]
    if concepts:
        return latents(replace(made, concepts=tuple(concepts)), "merge")
    from intarsia.pipelines.attach import attached

    with attached(made.model.components, ()) as hung:
        (work,) = made.begin([made.encode(hung, made.prompt, ())])
        result = work.latents
        from intarsia.pipelines.denoise import denoise

        for stepped in denoise(work, made.token):
            result = stepped.latents
    return result


def state(model: Model) -> dict[str, str]:
    """Everything a method might leave changed: tensors, flags, hooks, processors, forwards, modes, tokenizers."""
    found: dict[str, str] = {}
    for name, root in model.modules.items():
        for path, tensor in root.state_dict(keep_vars=True).items():
            digest = hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            found[f"{name}.{path}"] = f"{digest} {tensor.requires_grad} {tensor.grad is None} {tensor.dtype}"
        for path, module in root.named_modules():
            hooks = [len(vars(module)[f"_{kind}_hooks"]) for kind in ("forward", "forward_pre", "backward")]
            own = "forward" in vars(module)
            found[f"{name}.{path}:"] = (
                f"{hooks} {own} {id(getattr(module, 'processor', None))} {module.training} {type(module).__name__} "
                f"{getattr(module, 'gradient_checkpointing', None)} {sorted(vars(module))}"
            )
    for name in model.spec.tokenizers:
        found[name] = f"{id(model.components[name])} {len(model.components[name])}"
    found["grad"] = str(torch.is_grad_enabled())
    found["random"] = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
    return found
