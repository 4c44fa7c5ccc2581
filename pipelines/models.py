"""Models in memory: one per device, in the precision the device is good at, moved out when another is asked for."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate
import psutil
import torch

from .errors import InputError, MemoryLimitError
from .families import FAMILIES, Family
from .loading import load_components
from .sources import ModelSource, native_size, resolve

if TYPE_CHECKING:
    from .modular import Engine
    from .preview import LatentColours

HEADROOM = 1.35  # memory a picture needs besides the weights, as a factor of them


def devices() -> list[str]:
    """The devices models can run on, best first: accelerators by index, then the CPU."""
    found: list[str] = []
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        found = [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    return [*found, "cpu"]


def choose_device(device: str = "auto") -> str:
    """Turn "auto" into the best device, and refuse one that is not there.

    Raises:
        InputError: There is no such device.
    """
    known = devices()
    if device == "auto":
        return known[0]
    name = device if device == "cpu" or ":" in device else f"{device}:0"
    if name not in known:
        raise InputError(f"There is no device {device}.", f"This machine has: {', '.join(known)}.")
    return name


def dtype_for(device: torch.device) -> torch.dtype:
    """float32 on a CPU; bfloat16 on an accelerator that computes with it, else float16."""
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16 if device.type in ("cuda", "xpu") else torch.float16


@dataclass
class Model:
    """A loaded model.

    Args:
        source: Where it came from.
        components: By the names of `model_index.json`: denoiser, text encoders, tokenizers, vae, scheduler; and
            `settings`, the pipeline's own settings.
        device: Where it computes.
        dtype: Of denoiser and text encoders; the autoencoder is float32.
        notes: What was decided for the person while loading, in sentences.
        offload: Whether parts lie on the CPU until they are used.
    """

    source: ModelSource
    components: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    notes: tuple[str, ...] = ()
    offload: bool = False
    _hooks: list[Any] = field(default_factory=list[Any])

    @property
    def family(self) -> str:
        return self.source.family

    @property
    def spec(self) -> Family:
        return FAMILIES[self.source.family]

    @property
    def denoiser(self) -> Any:  # noqa: ANN401 - UNet2DConditionModel or a transformer
        return self.components[self.spec.denoiser]

    @property
    def text_encoders(self) -> dict[str, Any]:
        return {name: self.components[name] for name in self.spec.text_encoders if name in self.components}

    @cached_property
    def native_size(self) -> tuple[int, int]:
        """(width, height) in pixels the model was trained for."""
        return native_size(self.source)

    @cached_property
    def engine(self) -> Engine:
        """The blocks that encode, prepare and decode for this model."""
        from .modular import Engine

        return Engine(self.spec, self.components, self.device)

    @cached_property
    def colours(self) -> LatentColours:
        """How previews colour this model's latents."""
        from .preview import fit

        return fit(self.components["vae"], self.device)

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """Every component with weights, in the order they are used."""
        return {name: self.components[name] for name in self.spec.modules if name in self.components}

    def place(self) -> None:
        """Put every part where it belongs: on the device, or under hooks that bring it there when it is used."""
        if not self.offload:
            for module in self.modules.values():
                module.to(self.device)
            return
        previous: Any = None
        for module in self.modules.values():
            _, previous = accelerate.cpu_offload_with_hook(module, self.device, previous)
            self._hooks.append(previous)

    def rest(self) -> None:
        """Bring offloaded parts back to the CPU after a picture."""
        for hook in self._hooks:
            hook.offload()

    def free(self) -> None:
        """Leave the device and drop every part; the object is of no use afterwards."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for module in self.modules.values():
            module.to("cpu")  # whoever still holds a part must not keep the device's memory
        self.components.clear()
        self.__dict__.pop("engine", None)
        gc.collect()
        if self.device.type != "cpu":
            torch.accelerator.empty_cache()


class Resident:
    """Keeps one model per device: asking again costs nothing, asking for another frees the first."""

    def __init__(self) -> None:
        self._models: dict[str, tuple[tuple[Any, ...], Model]] = {}

    def get(self, name: str, device: str = "auto", offload: bool | None = False) -> Model:
        """Give the model, loading it if it is not the one that is there.

        Args:
            name: As in a request: "mini", a folder, a file or a hub id.
            device: "auto" or one of `devices()`.
            offload: Keep parts on the CPU until they are used; None decides by the memory that is free. Without
                meaning on the CPU.

        Raises:
            IntarsiaError: No such model or device, damaged weights, or not enough memory.
        """
        where = choose_device(device)
        source = resolve(name)
        key = (source, _stamp(source), offload)
        kept = self._models.get(where)
        if kept is not None and kept[0] == key:
            return kept[1]
        if kept is not None:
            del self._models[where]
            kept[1].free()
        model = load(source, where, offload)
        self._models[where] = (key, model)
        return model

    def free(self) -> None:
        """Free every model."""
        for _, model in self._models.values():
            model.free()
        self._models.clear()


def load(source: ModelSource, device: str = "cpu", offload: bool | None = False) -> Model:
    """Load a model onto a device; see `Resident.get`."""
    where = torch.device(device)
    dtype = dtype_for(where)
    _check_memory(source, dtype)
    components = load_components(source, dtype)
    notes: tuple[str, ...] = ()
    size = sum(_bytes(components[name]) for name in FAMILIES[source.family].modules if name in components)
    if offload is None:
        offload = where.type != "cpu" and size * HEADROOM > _free(where)
        if offload:
            notes = (f"The model needs {size / 1e9:.1f} GB; its parts wait on the CPU until they are used.",)
    model = Model(source, components, where, dtype, notes, bool(offload) and where.type != "cpu")
    try:
        model.place()
    except torch.OutOfMemoryError:
        model.free()
        raise MemoryLimitError(
            f"{source.name} needs {size / 1e9:.1f} GB on {device}; {_free(where) / 1e9:.1f} GB are free.",
            "Turn on CPU offload, or choose a smaller model.",
        ) from None
    return model


def _bytes(module: torch.nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def _free(device: torch.device) -> int:
    """Bytes free on a device."""
    if device.type == "cpu":
        return psutil.virtual_memory().available
    if device.type in ("cuda", "xpu"):
        return torch.accelerator.get_memory_info(device)[0]
    return psutil.virtual_memory().available  # shared with the CPU, as on Apple's chips


def _check_memory(source: ModelSource, dtype: torch.dtype) -> None:
    """Refuse a model that cannot fit into main memory, before the machine begins to swap."""
    size = sum(file.stat().st_size for file in _weights(source))
    free = psutil.virtual_memory().available
    wide = 2 if dtype == torch.float32 and size > 2**31 else 1  # large checkpoints are mostly kept in 16 bits
    if size * wide > free:
        raise MemoryLimitError(
            f"{source.name} needs about {size * wide / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB are free.",
            "Close other programs, or choose a smaller model.",
        )


def _weights(source: ModelSource) -> list[Path]:
    from .sources import source_files

    return [file for file in source_files(source) if file.is_file()]


def _stamp(source: ModelSource) -> tuple[tuple[str, int, int], ...]:
    """Changes when the files do, so that a model that was trained or copied anew is loaded anew."""
    stats = [(str(file), file.stat()) for file in _weights(source)]
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)
