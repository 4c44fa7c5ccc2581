"""Read safetensors headers with guards first, and tensor values with numpy only: no torch, no surprises.

A safetensors file is 8 bytes (little-endian length N), N bytes of JSON, then one buffer without holes. The official
parser accepts duplicate names and a million empty tensors (39 s, 3.3 GB); these guards run before anything is parsed.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard, cast

import numpy as np
from numpy.typing import NDArray

from .errors import AdapterError

MAX_HEADER = 16 * 2**20  # bytes
MAX_FILE = 64 * 2**30  # bytes; the largest checkpoints people keep are below this
MAX_TENSORS = 20_000
MAX_NAME = 512  # characters
MAX_DIMS = 5
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64,
}  # fmt: skip
READABLE = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8", "I32": "<i4", "I64": "<i8"}
CHUNK = 2**20  # values, and bytes when hashing
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
CONVERT = "Ask its author for a .safetensors version, or convert it yourself on a computer you can afford to lose."


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `start` and `end` are bytes from the start of the buffer."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header: every tensor lies inside the file, without holes or overlaps."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    size: int

    def values(self, name: str) -> NDArray[Any]:
        """Read one tensor as float32 (float64 stays; whole numbers become float64).

        Raises:
            AdapterError: The tensor is stored in a type that is not read (float8, bytes).
        """
        info = self.tensors[name]
        parts = list(self.chunks(name))
        if not parts:
            return np.zeros(info.shape, np.float32)
        return np.concatenate(parts).reshape(info.shape)

    def chunks(self, name: str) -> Iterator[NDArray[Any]]:
        """Read one tensor piece by piece, so that a large file never lies in memory as a whole."""
        info = self.tensors[name]
        if info.dtype not in READABLE:
            raise AdapterError(
                f"{name} is stored as {info.dtype}, which is not read here.",
                "Save the file as F16, BF16 or F32.",
            )
        kind = np.dtype(READABLE[info.dtype])
        with self.path.open("rb") as file:
            file.seek(self.data_start + info.start)
            left = prod(info.shape)
            while left:
                take = min(left, CHUNK)
                raw = file.read(take * kind.itemsize)
                if len(raw) < take * kind.itemsize:
                    raise AdapterError(f"{self.path.name} became shorter while it was read.", "Copy it again.")
                yield _decode(np.frombuffer(raw, kind), info.dtype)
                left -= take


def _decode(raw: NDArray[Any], dtype: str) -> NDArray[Any]:
    if dtype == "BF16":  # bfloat16 is the upper half of a float32
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32 if dtype in ("F16", "F32") else np.float64)


def read_header(path: Path) -> Header:
    """Read and check a safetensors header.

    Raises:
        AdapterError: The file is missing, empty, a pickle, a pointer, truncated, or its header breaks a limit or rule.
    """
    size, start = _open_checked(path)
    (length,) = struct.unpack("<Q", start[:8])
    if length > MAX_HEADER:
        raise AdapterError(
            f"{path.name} declares a header of {length:,} bytes; at most {MAX_HEADER:,} are read.",
            "It is damaged or made to do harm: get it from another source.",
        )
    if size < 8 + length:
        raise AdapterError(f"{path.name} ends inside its header: it was cut off.", "Download it again.")
    with path.open("rb") as file:
        file.seek(8)
        raw = file.read(length)
    parsed = _parse(path, raw)
    metadata = _metadata(path, parsed.pop("__metadata__", None))
    if len(parsed) > MAX_TENSORS:
        raise AdapterError(f"{path.name} lists {len(parsed):,} tensors; at most {MAX_TENSORS:,} are read.")
    tensors = {name: _tensor(path, name, entry) for name, entry in parsed.items()}
    _check_buffer(path, tensors, size - 8 - length)
    return Header(path, tensors, metadata, 8 + length, size)


def _open_checked(path: Path) -> tuple[int, bytes]:
    """Refuse what is no safetensors file by its first bytes or its ending; give its size and first bytes."""
    if not path.is_file():
        raise AdapterError(f"There is no file {path}.", "Check the path.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
    if size == 0:
        raise AdapterError(f"{path.name} is empty.", "Download it again.")
    # A header whose length ends in 0x80 starts like a pickle too, but has its "{" in the ninth place.
    pickle = start[:1] == b"\x80" and start[8:9] != b"{"
    if start.startswith(b"PK\x03\x04") or pickle or path.suffix.lower() in PICKLES:
        kind = "a zip or PyTorch pickle" if start.startswith(b"PK") else "a pickle"
        raise AdapterError(f"{path.name} is {kind} and could run code when opened; it is not read.", CONVERT)
    if start.startswith(b"version https://git-lfs"):
        raise AdapterError(
            f"{path.name} is a Git LFS pointer, not the file itself.",
            "Fetch the real file with git lfs pull, or download it from the page it came from.",
        )
    if size > MAX_FILE:
        raise AdapterError(f"{path.name} has {size:,} bytes; at most {MAX_FILE:,} are read.")
    if size < 10:
        raise AdapterError(f"{path.name} is too short for a safetensors file: it was cut off.", "Download it again.")
    if start[8:9] != b"{":
        raise AdapterError(f"{path.name} is not a safetensors file.", "Choose a file that ends in .safetensors.")
    return size, start


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise AdapterError(f"{path.name} names the same tensor twice in its header.", "Get it from another source.")
        return found

    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise AdapterError(f"{path.name} has a header that cannot be read.", "Download it again.") from None
    if not isinstance(parsed, dict):
        raise AdapterError(f"{path.name} has a header that is not a table.", "Download it again.")
    return cast(dict[str, Any], parsed)


def _metadata(path: Path, found: object) -> dict[str, str]:
    if found is None:
        return {}
    if isinstance(found, dict):
        pairs = cast(dict[str, object], found)
        if all(isinstance(value, str) for value in pairs.values()):
            return cast(dict[str, str], pairs)
    raise AdapterError(f"{path.name} has metadata that is not plain text.", "Get it from another source.")


def _tensor(path: Path, name: str, entry: object) -> TensorInfo:
    if not name or len(name) > MAX_NAME:
        raise AdapterError(f"{path.name} holds a tensor name of {len(name):,} characters; 1 to {MAX_NAME} are read.")
    fields = cast(dict[str, Any], entry) if isinstance(entry, dict) else {}
    dtype, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not _naturals(shape) or not _naturals(span) or len(span) != 2:
        raise AdapterError(f"{path.name} describes the tensor {name} wrongly.", "Download it again.")
    if dtype not in BITS:
        raise AdapterError(f"{path.name} stores {name} as {dtype[:20]}, which is not known.")
    if len(shape) > MAX_DIMS:
        raise AdapterError(f"{path.name} holds a tensor with {len(shape)} dimensions ({name}); at most 5 are read.")
    if prod(shape) * BITS[dtype] // 8 != span[1] - span[0]:
        raise AdapterError(f"{path.name} gives {name} a size that does not fit its shape.", "Download it again.")
    return TensorInfo(dtype, tuple(shape), span[0], span[1])


def _naturals(value: object) -> TypeGuard[list[int]]:
    if not isinstance(value, list):
        return False
    return all(type(number) is int and 0 <= number < 2**62 for number in cast(list[object], value))


def _check_buffer(path: Path, tensors: Mapping[str, TensorInfo], length: int) -> None:
    """Every byte of the buffer belongs to exactly one tensor."""
    at = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != at:
            what = "overlap" if info.start < at else "leave a hole"
            raise AdapterError(f"{path.name} holds tensors that {what} before {name}.", "Download it again.")
        at = info.end
    if at > length:
        raise AdapterError(
            f"{path.name} is cut off: {at:,} bytes of tensors are announced, {length:,} are there.",
            "Download it again.",
        )
    if at < length:
        raise AdapterError(f"{path.name} has {length - at:,} bytes after its last tensor.", "Download it again.")


@dataclass(frozen=True)
class Scan:
    """What the values of a file are like: the first tensor with NaN or infinity, and the tensors that are all zero."""

    not_finite: str | None
    zeros: frozenset[str]


def scan(header: Header) -> Scan:
    """Look at every value once, in file order, a piece at a time."""
    zeros: set[str] = set()
    for name, info in sorted(header.tensors.items(), key=lambda item: item[1].start):
        if info.dtype not in READABLE:
            continue
        zero = True
        for chunk in header.chunks(name):
            if not np.isfinite(chunk).all():
                return Scan(name, frozenset())
            zero = zero and not chunk.any()
        if zero:
            zeros.add(name)
    return Scan(None, frozenset(zeros))


def hashes(header: Header) -> tuple[str, str]:
    """Give the SHA-256 of the whole file, and of the tensor buffer alone (other tools' `modelspec.hash_sha256`)."""
    whole, buffer = hashlib.sha256(), hashlib.sha256()
    with header.path.open("rb") as file:
        whole.update(file.read(header.data_start))
        while chunk := file.read(CHUNK):
            whole.update(chunk)
            buffer.update(chunk)
    return whole.hexdigest(), buffer.hexdigest()


def write_subset(header: Header, names: list[str], metadata: Mapping[str, str], target: Path) -> None:
    """Write some tensors of a file, byte for byte, as a file of their own (not atomic: give a temporary path)."""
    at = 0
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name in names:
        info = header.tensors[name]
        length = info.end - info.start
        table[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [at, at + length]}
        at += length
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with header.path.open("rb") as source, target.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name in names:
            info = header.tensors[name]
            source.seek(header.data_start + info.start)
            file.write(source.read(info.end - info.start))
