"""A gate for every layer that decides, token by token, how much of each adapter's contribution gets through (AutoLoRA).

gate_i = sigmoid(LN_l(o_i) w_l + LN_b(b) LN_l(o_i) w_x + beta), y = b + sum_i w_o gate_i o_i, where b is the layer's own
output and o_i what adapter i adds; all products are per channel. A file holds one tensor `(8, width)` per layer.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..pipelines.adapter_file import write_tensors
from ..pipelines.attach import Attachment
from ..pipelines.errors import AdapterError
from ..pipelines.fitted import fitted
from ..pipelines.headers import read_header

ROWS = ("own", "cross", "shift", "out", "norm", "norm shift", "base norm", "base norm shift")  # of each tensor
OUT = 0.512  # where w_o begins
EPSILON = 1e-5
KEY = "intarsia.gate"
DENOISERS = ("unet.", "transformer.")


@dataclass(frozen=True)
class Gate:
    """The gates of a model's layers.

    Args:
        layers: By canonical path of the layer, `(8, width)` with the rows of ROWS.
        trained: Whether they learned anything.
    """

    layers: Mapping[str, Tensor]
    trained: bool

    def on(self, device: torch.device) -> Gate:
        """The same gates on a device."""
        return Gate({path: tensor.to(device) for path, tensor in self.layers.items()}, self.trained)

    def fuse(self, path: str, output: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Add what the adapters contribute to a layer; as `Branches.combine` wants it.

        Args:
            path: Canonical.
            output: The layer's own, `(batch, tokens, width)` or `(batch, width, height, width)`.
            parts: What each adapter would add, of the same shape.
        """
        own, cross, shift, out, norm, norm_shift, base_norm, base_shift = self.layers[path]
        picture = output.ndim == 4  # channels come second there
        base = output.float().movedim(1, -1) if picture else output.float()
        width = base.shape[-1:]
        b = F.layer_norm(base, width, base_norm, base_shift, EPSILON)
        result = base
        for part in parts.values():
            o = part.float().movedim(1, -1) if picture else part.float()
            normed = F.layer_norm(o, width, norm, norm_shift, EPSILON)
            result = result + out * torch.sigmoid(normed * own + b * normed * cross + shift) * o
        return (result.movedim(-1, 1) if picture else result).to(output.dtype)


def widths(components: Mapping[str, nn.Module], attachments: tuple[Attachment, ...]) -> dict[str, int]:
    """Outputs of every layer of the denoiser that adapters change, by canonical path."""
    return {
        uses[0][1]: module.weight.shape[0]
        for module, uses in fitted(components, attachments).layers
        if uses[0][1].startswith(DENOISERS)
    }


def initial(sizes: Mapping[str, int], seed: int) -> Gate:
    """Give untrained gates: w_l, w_x and beta from N(0, 1), w_o 0.512, norms plain."""
    layers: dict[str, Tensor] = {}
    for path, width in sizes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {path}".encode()))
        drawn = torch.randn(3, width, generator=generator)
        one, zero = torch.ones(1, width), torch.zeros(1, width)
        layers[path] = torch.cat([drawn, OUT * one, one, zero, one, zero])
    return Gate(layers, trained=False)


def fingerprint(denoiser: nn.Module) -> str:
    """Tell one base model from another: a hash of the first values of every weight, the same in every precision."""
    digest = hashlib.sha256()
    for name, weight in denoiser.named_parameters():
        values = weight.detach().flatten()[:64].to(torch.bfloat16).view(torch.uint8).cpu()
        digest.update(f"{name}{tuple(weight.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def write_gate(path: Path, gate: Gate, denoiser: nn.Module, made: Mapping[str, int | float | str]) -> None:
    """Write gates as safetensors, atomically, under the base model's fingerprint; `made` says how."""
    text = json.dumps({"base": fingerprint(denoiser), "rows": ROWS, **made}, sort_keys=True)
    write_tensors(path, {name: tensor.detach().float().cpu() for name, tensor in gate.layers.items()}, {KEY: text})


def read_gate(path: Path, denoiser: nn.Module, sizes: Mapping[str, int]) -> Gate:
    """Read gates that were trained on this model.

    Args:
        path: A .safetensors file.
        denoiser: Of the model.
        sizes: The layers that need a gate, from `widths`.

    Raises:
        AdapterError: It is no gate file, of another model, or lacks a gate for a layer.
    """
    header = read_header(path)
    try:
        found: object = json.loads(header.metadata.get(KEY, "null"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise AdapterError(f"{path.name} holds no gates.", 'Choose a file of gates, or "initial".')
    if found.get("base") != fingerprint(denoiser):  # pyright: ignore[reportUnknownMemberType]
        raise AdapterError(
            f"The gates of {path.name} were trained on another model.", 'Train gates on this one, or choose "initial".'
        )
    shapes = {name: entry.shape for name, entry in header.tensors.items()}
    lost = [name for name, width in sizes.items() if tuple(shapes.get(name, ())) != (len(ROWS), width)]
    if lost:
        raise AdapterError(
            f"{path.name} has no gate for {len(lost)} of {len(sizes)} layers that the adapters change: "
            f"{', '.join(lost[:3])}.",
            "Train gates with adapters of these layers.",
        )
    layers = {name: torch.from_numpy(header.values(name)).float() for name in sizes}
    if not all(bool(tensor.isfinite().all()) for tensor in layers.values()):
        raise AdapterError(f"{path.name} holds NaN or infinity.", "Train the gates again.")
    return Gate(layers, trained=True)
