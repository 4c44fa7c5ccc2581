"""Write an adapter file anew in another trainer's spelling: the same tensors, byte for byte, under other names.

Only where a spelling has no word for something is a value touched: diffusers and PEFT know no Tucker core, which is
multiplied into the first factor (rounding alone is lost, and told).
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .adapter_file import PEFT_KEY, peft_configuration, read_adapter, write_tensors
from .adapter_types import LowRank
from .architectures import sgm_spelling
from .atomic import replacing_folder
from .errors import AdapterError
from .headers import Header, read_header
from .identify import inspect, yardstick
from .layers import LayerNames, alphas, collect
from .model_weights import TORCH_NAMES
from .verdict import first

if TYPE_CHECKING:
    from torch import Tensor

Dialect = Literal["kohya", "diffusers", "peft"]
KOHYA_PARTS = {
    "down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight", "bias": "lora_up.bias",
    "magnitude": "dora_scale", "ia3": "weight",
}  # fmt: skip
DIFFUSERS_PARTS = {
    "down": "lora_A.weight", "up": "lora_B.weight", "bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector", "dora_scale": "lora_magnitude_vector",
}  # fmt: skip
TEXT = {
    "sd15": {"text_encoder": "lora_te_"},
    "sdxl": {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
}
PRIVATE = ("ss_datasets", "ss_dataset_dirs", "ss_reg_dataset_dirs", "ss_bucket_info", "ss_session_id")


@dataclass(frozen=True)
class Converted:
    """What was written.

    Args:
        layers: How many.
        lost: What the new spelling cannot hold, in sentences; empty if it holds the same.
    """

    path: Path
    dialect: Dialect
    layers: int
    lost: tuple[str, ...]


def convert(path: Path, to: Dialect, out: Path) -> Converted:
    """Write `path` as `out` in another spelling.

    Raises:
        AdapterError: The file cannot be used, is for a family this spelling has no names for, or holds what it has none
            for.
    """
    report = inspect(path)
    report.require_usable()
    header = read_header(path)
    if report.family not in TEXT:
        return _transformer(path, report.family, header, to, out)
    found = collect(header, yardstick(report.yardstick))
    if found.unmatched:
        raise AdapterError(
            f"{path.name} holds {len(found.unmatched)} layers that are not known: {first(found.unmatched)}.",
            "Only files whose every layer is known are written anew.",
        )
    values, _ = alphas(header, found)
    tensors: dict[str, Tensor] = {}
    lost: list[str] = []
    with _opened(path) as file:
        for layer, names in found.layers.items():
            stem = kohya_name(layer, report.family) if to == "kohya" else layer
            parts = {part: file.get_tensor(name) for part, name in names.parts.items()}
            spelled = _spelled(layer, names, parts, values, to, lost)
            tensors |= {f"{stem}.{name}": part for name, part in spelled.items()}
    if words := found.words:
        lost.append(f"its learned words {', '.join(words)} stay behind")
    _write(out, to, tensors, values, header)
    return Converted(out, to, len(found.layers), tuple(dict.fromkeys(lost)))


def _transformer(path: Path, family: str, header: Header, to: Dialect, out: Path) -> Converted:
    """Write an adapter of a transformer under the names diffusers gives its layers; fused ones are taken apart."""
    import torch

    if to == "kohya":
        raise AdapterError(
            f"{path.name} is for {family}, whose layers are not written in kohya's spelling here.",
            "Write it with --to diffusers or --to peft.",
        )
    tensors: dict[str, Tensor] = {}
    values: dict[str, float] = {}
    dtypes = {info.dtype for info in header.tensors.values()} & TORCH_NAMES.keys()
    dtype = getattr(torch, TORCH_NAMES[dtypes.pop()]) if len(dtypes) == 1 else torch.float32
    for name, layer in read_adapter(path).layers.items():
        if not isinstance(layer, LowRank):
            raise AdapterError(f"{name} is no plain LoRA, which diffusers does not read.", "Keep the file as it is.")
        values[name] = layer.alpha
        parts = (("lora_A.weight", layer.down), ("lora_B.weight", layer.up), ("lora_B.bias", layer.bias))
        tensors |= {f"{name}.{part}": value.to(dtype) for part, value in parts if value is not None}
    _write(out, to, tensors, values, header)
    return Converted(out, to, len(values), ())


def _write(out: Path, to: Dialect, tensors: dict[str, Tensor], values: Mapping[str, float], header: Header) -> None:
    texts = {key: text for key, text in header.metadata.items() if key not in (*PRIVATE, PEFT_KEY)}
    if to == "kohya":
        write_tensors(out, tensors, texts)
        return
    told = _configuration(tensors, values)
    if to == "diffusers":
        write_tensors(out, tensors, texts | {PEFT_KEY: json.dumps(told, sort_keys=True)})
        return
    with replacing_folder(out) as temporary:  # PEFT keeps one folder for each part of a model
        for component in dict.fromkeys(path.split(".")[0] for path in values):
            mine = {name.partition(".")[2]: part for name, part in tensors.items() if name.startswith(f"{component}.")}
            front = "text_model." if component == "text_encoder" else ""  # which transformers 5 has there no more
            named = {f"base_model.model.{name.removeprefix(front)}": part for name, part in mine.items()}
            (temporary / component).mkdir()
            write_tensors(temporary / component / "adapter_model.safetensors", named, texts)
            own = {key.partition(".")[2]: value for key, value in told.items() if key.startswith(f"{component}.")}
            text = json.dumps({"peft_type": "LORA", "bias": "none", "inference_mode": True} | own, indent=1)
            (temporary / component / "adapter_config.json").write_text(text + "\n", "utf-8")


@contextmanager
def _opened(path: Path) -> Generator[Any]:
    """The file in the hands of the official reader, which keeps every type as it is."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        text = f"{path.name} cannot be read: {str(error).rstrip('.')}."
        raise AdapterError(text, "Download it again, or give it a plain name.") from None


def kohya_name(path: str, family: str) -> str:
    """Spell a canonical path as kohya does: SDXL's UNet in Stability's block names, SD 1.5's in diffusers'."""
    component, _, inner = path.partition(".")
    if component != "unet":
        return TEXT[family][component] + inner.replace(".", "_")
    spelled = None
    if family == "sdxl":
        spelled = sgm_spelling(inner, 2, _paths())
    return "lora_unet_" + (spelled or inner.replace(".", "_"))


@cache
def _paths() -> tuple[str, ...]:
    return tuple(path.removeprefix("unet.") for path in yardstick("sdxl").shapes if path.startswith("unet."))


def _spelled(
    layer: str, names: LayerNames, parts: dict[str, Tensor], values: Mapping[str, float], to: Dialect, lost: list[str]
) -> dict[str, Tensor]:
    """A layer's tensors under the names of a spelling."""
    import torch

    if to == "kohya":
        if names.kind.rank({part: tuple(value.shape) for part, value in parts.items()}):
            parts.setdefault("alpha", torch.tensor(values[layer]))
        if "magnitude" in parts:
            out = parts["magnitude"].numel()
            parts["magnitude"] = parts["magnitude"].reshape(out, *[1] * (_dims(names) - 1))
        return {KOHYA_PARTS.get(part, part): value for part, value in parts.items()}
    if names.kind.name != "lora":
        raise AdapterError(
            f"{layer} holds {names.kind.title}, which diffusers does not read.", "Write it with --to kohya instead."
        )
    parts.pop("alpha", None)  # it stands in the header
    if "mid" in parts:
        core = parts.pop("mid").float()
        folded = torch.einsum("rihw,io->rohw", core, parts["down"].float().flatten(1))
        parts["down"] = folded.to(parts["up"].dtype)
        lost.append("Tucker cores were multiplied into the first factors; rounding alone is lost")
    if "dora_scale" in parts:
        if parts["dora_scale"].shape[0] == 1:
            raise AdapterError(
                f"{layer} has DoRA magnitudes per input, which diffusers does not read.", "Keep it as is."
            )
        flat = parts["dora_scale"].flatten()
        parts["dora_scale"] = flat if _dims(names) == 2 else flat[None, :, None, None]  # as PEFT has it
    return {DIFFUSERS_PARTS[part]: value for part, value in parts.items()}


def _dims(names: LayerNames) -> int:
    return 4 if len(names.piece.whole) == 4 else 2


def _configuration(tensors: Mapping[str, Tensor], values: Mapping[str, float]) -> dict[str, Any]:
    """The settings by which diffusers and PEFT apply the right scale, component in front."""
    layers = {
        path: LowRank(
            tensors[f"{path}.lora_A.weight"],
            tensors[f"{path}.lora_B.weight"],
            alpha,
            tensors.get(f"{path}.lora_B.bias"),
        )
        for path, alpha in values.items()
    }
    told = peft_configuration(layers)
    if any(name.endswith("lora_magnitude_vector") for name in tensors):
        told |= {f"{component}.use_dora": True for component in {path.split(".")[0] for path in layers}}
    return told
