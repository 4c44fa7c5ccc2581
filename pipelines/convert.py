"""Write an adapter file anew in another trainer's spelling: the same tensors, byte for byte, under other names.

Only where a spelling has no word for something is a value touched: diffusers knows no Tucker core, which is multiplied
into the first factor (rounding alone is lost, and told).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .adapter_file import PEFT_KEY, peft_configuration, write_tensors
from .adapter_types import LowRank
from .architectures import sgm_spelling
from .errors import AdapterError
from .headers import read_header
from .identify import inspect, yardstick
from .layers import LayerNames, alphas, collect
from .verdict import first

if TYPE_CHECKING:
    from torch import Tensor

Dialect = Literal["kohya", "diffusers"]
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
    if report.family not in TEXT:
        raise AdapterError(
            f"{path.name} is for {report.family}: its layers are written in the spelling they have.",
            "Adapters for SD 1.5 and SDXL can be converted.",
        )
    header = read_header(path)
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
    texts = {key: text for key, text in header.metadata.items() if key not in (*PRIVATE, PEFT_KEY)}
    if to == "diffusers":
        texts |= _configuration(tensors, values)
    if words := found.words:
        lost.append(f"its learned words {', '.join(words)} stay behind")
    write_tensors(out, tensors, texts)
    return Converted(out, to, len(found.layers), tuple(dict.fromkeys(lost)))


@contextmanager
def _opened(path: Path) -> Generator[Any]:
    """The file in the hands of the official reader, which keeps every type as it is."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise AdapterError(f"{path.name} cannot be read: {error}.", "Download it again.") from None


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


def _configuration(tensors: Mapping[str, Tensor], values: Mapping[str, float]) -> dict[str, str]:
    """The header by which diffusers applies the right scale."""
    import json

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
    return {PEFT_KEY: json.dumps(told, sort_keys=True)}
