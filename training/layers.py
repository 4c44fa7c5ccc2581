"""The layers that learn: PEFT low-rank layers put into a denoiser and taken out again without a trace."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from ..pipelines.adapter_types import LowRank

FEW = 1024  # tokens whose attention to each other is small enough to be held as a whole
ADAPTER = "learned"  # "training" is an attribute of every module


@dataclass(frozen=True)
class TrainedLayers:
    """The trainable factors.

    Args:
        parameters: `<layer path>.down` and `.up` to parameter, float32.
        scale: alpha / rank, the same for every layer.
    """

    parameters: Mapping[str, nn.Parameter]
    scale: float

    def factors(self, prefix: str) -> dict[str, LowRank]:
        """Copy the factors to the CPU, by layer path with `prefix` in front."""
        paths = [name.removesuffix(".down") for name in self.parameters if name.endswith(".down")]
        found: dict[str, LowRank] = {}
        for path in paths:
            down, up = self.parameters[f"{path}.down"], self.parameters[f"{path}.up"]
            alpha = self.scale * down.shape[0]
            found[prefix + path] = LowRank(down.detach().cpu().clone(), up.detach().cpu().clone(), alpha)
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite the factors; names and shapes must be ours, or it is a bug (KeyError)."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])


def linear_layers(denoiser: nn.Module) -> dict[str, tuple[int, ...]]:
    """List every linear layer, path to weight shape `(out, in)`."""
    return {path: tuple(m.weight.shape) for path, m in denoiser.named_modules() if isinstance(m, nn.Linear)}


def trainable_layers(denoiser: nn.Module) -> dict[str, tuple[int, ...]]:
    """List every layer that can learn, path to the shape of its matrix.

    Returns:
        `(out, in)` of a linear layer, `(out, in x kernel x kernel)` of a convolution: what its rank is limited by.
    """
    found: dict[str, tuple[int, ...]] = {}
    for path, module in denoiser.named_modules():
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            found[path] = (module.weight.shape[0], module.weight[0].numel())
    return found


class SmallPlain:
    """Attention as plain products where there are few tokens: on a CPU the backward of the fused one is far slower."""

    def __init__(self) -> None:
        self._plain, self._fused = AttnProcessor(), AttnProcessor2_0()

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        tokens = hidden_states.shape[1] if hidden_states.ndim == 3 else hidden_states[0, 0].numel()
        made: Any = (self._plain if tokens <= FEW else self._fused)(attn, hidden_states, *args, **kwargs)
        return made


@contextmanager
def plain_attention(denoiser: Any) -> Generator[None]:  # noqa: ANN401 - a diffusers model
    """Let a UNet on a CPU compute its attention as `SmallPlain`, for the time of the context."""
    before: dict[str, Any] = getattr(denoiser, "attn_processors", {})
    fused = before and all(type(processor) is AttnProcessor2_0 for processor in before.values())
    if not fused or denoiser.device.type != "cpu":
        yield
        return
    try:
        denoiser.set_attn_processor(SmallPlain())
        yield
    finally:
        denoiser.set_attn_processor(dict(before))


@contextmanager
def trainable(
    denoiser: nn.Module, ranks: Mapping[str, int], scale: float, seed: int, save_memory: bool = False
) -> Generator[TrainedLayers]:
    """Put low-rank layers into a denoiser for the time of the context.

    Everything but the factors is frozen meanwhile. At the end, whatever happened, the very modules that were there
    before are back in their places, and modes and flags are as they were.

    Args:
        denoiser: The network; changed in place.
        ranks: Layer path to rank.
        scale: alpha / rank.
        seed: The down factors are drawn from it, normal with deviation 1 / rank (up is zero: no change at first).
        save_memory: Recompute activations in the backward pass.
    """
    from peft import LoraConfig, inject_adapter_in_model

    originals = {path: denoiser.get_submodule(path) for path in ranks}
    modes = {module: module.training for module in denoiser.modules()}
    flags = [(parameter, parameter.requires_grad) for parameter in denoiser.parameters()]
    attributes = set(vars(denoiser))
    checkpointing = bool(getattr(denoiser, "is_gradient_checkpointing", False))
    most = max(ranks.values())
    exact = {re.escape(path): rank for path, rank in ranks.items() if rank != most}
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        target_modules="|".join(re.escape(path) for path in ranks),  # a text is matched in full, a list by endings
        rank_pattern=exact,
        alpha_pattern=exact,
        init_lora_weights=False,  # drawn below, from our own generator
    )
    attention = ExitStack()
    try:
        attention.enter_context(plain_attention(denoiser))
        with torch.random.fork_rng(devices=[]):  # PEFT draws initial values we do not use
            inject_adapter_in_model(config, denoiser, ADAPTER)
        denoiser.eval()
        if save_memory and hasattr(denoiser, "enable_gradient_checkpointing"):
            _call(denoiser, "enable_gradient_checkpointing")
        yield TrainedLayers(_prepared(denoiser, ranks, scale, seed), scale)
    finally:
        attention.close()
        for path, module in originals.items():
            parent, _, name = path.rpartition(".")
            setattr(denoiser.get_submodule(parent), name, module)
        for name in set(vars(denoiser)) - attributes:
            delattr(denoiser, name)
        for module, training in modes.items():
            module.training = training
        for parameter, needs in flags:
            parameter.requires_grad_(needs)
            parameter.grad = None
        if save_memory and not checkpointing and hasattr(denoiser, "disable_gradient_checkpointing"):
            _call(denoiser, "disable_gradient_checkpointing")


@contextmanager
def untaught(denoiser: nn.Module, layers: TrainedLayers) -> Generator[None]:
    """Let a denoiser with trainable layers answer as it does without them, for the time of the context."""
    adapted: list[Any] = [
        denoiser.get_submodule(name.removesuffix(".up")) for name in layers.parameters if name[-3:] == ".up"
    ]
    try:
        for layer in adapted:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in adapted:
            layer.enable_adapters(True)


def _call(module: Any, name: str) -> None:  # noqa: ANN401 - a diffusers model
    getattr(module, name)()


def _prepared(denoiser: nn.Module, ranks: Mapping[str, int], scale: float, seed: int) -> dict[str, nn.Parameter]:
    """Initialise the factors in float32 (PEFT then computes their branch in float32) and collect them in order."""
    rng = torch.Generator().manual_seed(seed)
    parameters: dict[str, nn.Parameter] = {}
    for path in sorted(ranks):
        layer: Any = denoiser.get_submodule(path)
        layer.scaling[ADAPTER] = scale
        down, up = layer.lora_A[ADAPTER].float(), layer.lora_B[ADAPTER].float()
        with torch.no_grad():
            down.weight.copy_(torch.randn(down.weight.shape, generator=rng) / ranks[path])
            up.weight.zero_()
        parameters[f"{path}.down"], parameters[f"{path}.up"] = down.weight, up.weight
    for parameter in denoiser.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters
