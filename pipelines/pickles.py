"""Turn a PyTorch pickle, which could run code when opened, into a safetensors file that cannot. Torch-free itself.

The pickle is read in another process (`pickle_child.py`), which gets no more than time, memory and the bytes; what it
writes is checked like any stranger's file before it takes its place.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from .atomic import replacing
from .errors import AdapterError, InputError, IntarsiaError, MemoryLimitError
from .headers import MAX_FILE, pickled, read_header, reading, write_subset
from .identify import inspect
from .layers import PEFT_KEY
from .report import Report

SECONDS = 120  # of work in the child
PATIENCE = 60  # seconds more by the clock: to import torch, and on a machine that does other things
MAX_TEXT = 2**20  # bytes of a report or a configuration
CONFIGURATION = "adapter_config.json"
TAKEN = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
# What the child sees of the environment: where programs and libraries are, no names, tokens or keys.
KEPT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "TEMP", "TMP")
OTHER = "Ask its author for a .safetensors file, or use another adapter."


@dataclass(frozen=True)
class Unpickled:
    """What was written.

    Args:
        dialect: How the names are spelled, which they keep.
        layers: How many.
        lost: What did not go over, in sentences.
    """

    path: Path
    dialect: str
    layers: int
    lost: tuple[str, ...]


def is_pickle(path: Path) -> bool:
    """Whether a file is there and would be refused as a pickle."""
    if not path.is_file():
        return False
    with reading(path) as file:
        return pickled(path, file.read(9))


def unpickle(path: Path, out: Path, seconds: int = SECONDS) -> Unpickled:
    """Write the tensors of a pickle as a safetensors file, every value as it is; they must make up a usable adapter.

    Args:
        path: Ends in .bin, .pt, .pth or .ckpt, mostly.
        out: Where to write; the folder must exist.
        seconds: Of work the reading may take.

    Raises:
        AdapterError: It could run code, is damaged, costs too much, or holds no adapter.
        InputError: `out` does not end in .safetensors.
        MemoryLimitError: The disk is full.
    """
    if out.suffix.lower() != ".safetensors":
        raise InputError(f"{out.name} does not end in .safetensors.", "Choose such a name with --out.")
    with reading(path) as file:
        size = os.fstat(file.fileno()).st_size
    if not 0 < size <= MAX_FILE:
        raise AdapterError(f"{path.name} has {size:,} bytes; 1 to {MAX_FILE:,} are read.", OTHER)
    with TemporaryDirectory(prefix=".unpickle-", dir=out.parent) as folder:
        made = Path(folder) / out.name
        dropped = _run(path, made, seconds)
        report = inspect(made)
        report.require_usable()
        lost = [f"{len(dropped)} entries that are no tensors were left out: {_listed(dropped)}"] if dropped else []
        texts, notes = _configuration(path.with_name(CONFIGURATION), report)
        header = read_header(made)
        with replacing(out) as temporary:
            write_subset(header, list(header.tensors), {**header.metadata, **texts}, temporary)
    return Unpickled(out, report.dialect, report.modules, (*lost, *notes))


def _run(path: Path, made: Path, seconds: int) -> list[str]:
    """Let the child do the work; gives the names of what it left out."""
    told = made.with_name("report.json")
    command = [sys.executable, "-I", "-m", f"{__package__}.pickle_child", path.absolute(), made, told, str(seconds)]
    silent = subprocess.DEVNULL
    child = subprocess.Popen(
        command,
        stdin=silent,
        stdout=silent,
        stderr=silent,
        cwd=made.parent,
        env=environment(),
        start_new_session=True,
    )
    try:
        code = child.wait(seconds + PATIENCE)
    except subprocess.TimeoutExpired:
        raise _endless(path, seconds) from None
    finally:
        _end(child)
    if code < 0:  # by a signal, such as the limit's own
        raise _endless(path, seconds) if code == -getattr(signal, "SIGXCPU", 0) else _greedy(path)
    report = _table(told)
    if "code" in report:
        raise _refusal(path, str(report["code"]), str(report.get("detail", ""))[:200])
    if not made.is_file():
        raise AdapterError(f"{path.name} could not be read: the process that read it broke off.", OTHER)
    return [str(name) for name in cast(list[object], report.get("dropped", []))]


def environment() -> dict[str, str]:
    """What a process that reads a stranger's pickle may know of this one."""
    return {name: os.environ[name] for name in KEPT if name in os.environ} | {"OMP_NUM_THREADS": "1"}


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child and whatever it may have started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    else:
        child.kill()
    child.wait()


def _refusal(path: Path, code: str, detail: str) -> IntarsiaError:
    name = path.name
    match code:
        case "objects":
            text = f"{name} holds more than tensors ({detail}), which could run code; it was not read."
        case "bomb":
            text = f"{name} claims to hold {detail} bytes, far more than it has; it was not read."
        case "memory":
            return _greedy(path)
        case "crowd":
            text = f"{name} holds more than {detail} entries, which no adapter has; it was not read."
        case "empty":
            text = f"{name} holds no tensors."
        case "disk" if detail in (str(errno.ENOSPC), str(getattr(errno, "EDQUOT", errno.ENOSPC))):
            return MemoryLimitError(f"The disk is full: {name} could not be written anew.", "Free some space.")
        case "disk" if detail == str(errno.EFBIG):
            text = f"{name} claims to hold far more than it has; it was not read."
        case _:
            text = f"{name} is no PyTorch file that can be read."
    return AdapterError(text, OTHER)


def _endless(path: Path, seconds: int) -> AdapterError:
    return AdapterError(f"{path.name} was not read within {seconds} seconds and was given up.", OTHER)


def _greedy(path: Path) -> AdapterError:
    return AdapterError(f"{path.name} asks for far more memory than its size; it was not read.", OTHER)


def _configuration(path: Path, report: Report) -> tuple[dict[str, str], list[str]]:
    """Give the header text of PEFT's settings that stand beside its file, and what could not be used.

    Only numbers are taken over; `layers.peft_scales` checks them when the file is read.
    """
    if not path.is_file():
        return {}, []
    own = _table(path)
    values = {key: own[key] for key in TAKEN if key in own}
    if own.get("peft_type") != "LORA" or not values:
        return {}, [f"{path.name} beside it is none of a LoRA and was not used"]
    if len(report.components) != 1:
        return {}, [f"{path.name} beside it was not used, as the layers are of several parts of a model"]
    component = next(iter(report.components))
    return {PEFT_KEY: json.dumps({f"{component}.{key}": value for key, value in values.items()}, sort_keys=True)}, []


def _table(path: Path) -> Mapping[str, Any]:
    """Read a JSON object; anything else is an empty one."""
    try:
        found: object = json.loads(path.read_bytes()) if path.stat().st_size <= MAX_TEXT else None
    except (OSError, ValueError, RecursionError):
        return {}
    return cast(dict[str, Any], found) if isinstance(found, dict) else {}


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
