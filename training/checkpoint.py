"""The state of a training run on disk: exact, complete or not there at all, and free of pickles.

`checkpoint/state.json` names the folder that holds the tensors; it is replaced in one stroke when all of them are
written, so a run that dies while saving still has its last checkpoint.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..pipelines.errors import InputError, MemoryLimitError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

STATE = "state.json"
VERSION = 1
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Checkpoint:
    """What was read back.

    Args:
        step: Steps done.
        identity: What the run was made of; must equal that of the run that resumes.
        weights: Parameter name to tensor.
        moments: `exp_avg.<name>` and `exp_avg_sq.<name>` to tensor.
    """

    step: int
    identity: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]


def resumable(folder: Path) -> bool:
    """Say whether a run with this folder can be resumed; `folder` is the run's or the checkpoint's own."""
    return _state(folder) is not None


def _state(folder: Path) -> Path | None:
    return next((path for path in (folder / STATE, folder / "checkpoint" / STATE) if path.is_file()), None)


def save(
    folder: Path,
    step: int,
    identity: Mapping[str, Any],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> Path:
    """Write a checkpoint; the one before stays until this one is complete.

    Args:
        folder: The checkpoint's folder; made if missing.
        step: Steps done.
        identity: Checked by `load`; must survive JSON.
        parameters: The trainable ones, by name.
        optimizer: AdamW over exactly those.

    Returns:
        `folder`.

    Raises:
        MemoryLimitError: The disk is full; the last checkpoint is still there.
    """
    from safetensors.torch import save as serialized

    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
    moments = {
        f"{kind}.{name}": optimizer.state[parameter][kind].detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for kind in MOMENTS
        if parameter in optimizer.state
    }
    inner = folder / f"step-{step:07d}"
    fresh = folder / f".{inner.name}-{os.getpid()}"
    try:
        fresh.mkdir(parents=True)
        write(fresh / "weights.safetensors", serialized(weights))
        write(fresh / "moments.safetensors", serialized(moments))
        if inner.exists():  # left by a run that died before it was named, or named and the same
            inner = folder / f"{inner.name}-{os.urandom(3).hex()}"
        fresh.replace(inner)
        state = {"version": VERSION, "step": step, "tensors": inner.name, "identity": dict(identity)}
        write(folder / f".{STATE}", json.dumps(state, indent=1).encode())
        (folder / f".{STATE}").replace(folder / STATE)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if not (folder / STATE).exists():  # an empty folder would look like something to resume from
            shutil.rmtree(folder, ignore_errors=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        needed = sum(tensor.nbytes for tensor in (*weights.values(), *moments.values()))
        free = shutil.disk_usage(folder.parent).free
        raise MemoryLimitError(
            f"The disk is full: a checkpoint needs {needed / 2**20:,.0f} MB, {free / 2**20:,.0f} MB are free.",
            "Free some space and resume; the last checkpoint is kept. A lower rank makes smaller checkpoints.",
        ) from None
    for old in folder.iterdir():
        if old.is_dir() and old != inner:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def write(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk, so that the name in state.json never precedes it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint.

    Args:
        folder: The checkpoint's own, or that of the run.

    Raises:
        InputError: There is none, it is damaged, or another version wrote it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = _state(folder)
    if path is None:
        raise InputError(f"There is no checkpoint in {folder}.", "Start the training anew.")
    try:
        state = json.loads(path.read_text())
        if state["version"] != VERSION:
            raise InputError("Another version of Intarsia wrote this checkpoint.", "Start the training anew.")
        inner = path.parent / Path(state["tensors"]).name
        weights = load_file(inner / "weights.safetensors")
        return Checkpoint(state["step"], state["identity"], weights, load_file(inner / "moments.safetensors"))
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise InputError(f"The checkpoint in {folder} is damaged ({error}).", "Start the training anew.") from None


def restore(
    found: Checkpoint,
    identity: Mapping[str, Any],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> int:
    """Put a checkpoint's state into parameters and optimizer, bit for bit.

    Returns:
        Steps done.

    Raises:
        InputError: The checkpoint is of another run; names what differs.
    """
    import torch

    ours = json.loads(json.dumps(dict(identity)))
    different = [key for key in sorted({*ours, *found.identity}) if ours.get(key) != found.identity.get(key)]
    if different:
        raise InputError(
            f"The checkpoint belongs to another run; these differ: {', '.join(different)}.",
            "Resume with the settings, the pictures and the model of that run, or start anew.",
        )
    if {name: tensor.shape for name, tensor in found.weights.items()} != {n: p.shape for n, p in parameters.items()}:
        raise InputError("The checkpoint holds other layers than this run trains.", "Start the training anew.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(found.weights[name])
            if f"exp_avg.{name}" not in found.moments:
                continue
            state: dict[str, Tensor] = {"step": torch.tensor(float(found.step), device=_step_device(parameter))}
            for kind in MOMENTS:
                state[kind] = found.moments[f"{kind}.{name}"].to(parameter.device).clone()
            optimizer.state[parameter] = state
    return found.step


def _step_device(parameter: nn.Parameter) -> str:
    """Fused AdamW keeps its counter where the parameter is."""
    return str(parameter.device) if parameter.device.type == "cuda" else "cpu"
