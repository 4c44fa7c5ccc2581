"""Read safetensors headers with guards first, and tensor values with numpy only: no torch, no surprises.

A safetensors file is 8 bytes (little-endian length N), N bytes of JSON, then one buffer without holes. The official
parser accepts duplicate names and a million empty tensors (39 s, 3.3 GB); these guards run before anything is parsed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import struct
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard, cast

import numpy as np
from numpy.typing import NDArray

from .atomic import FULL
from .errors import AdapterError
from .header_table import HeaderTable, shorten

MAX_HEADER = 16 * 2**20  # bytes
MAX_FILE = 64 * 2**30  # bytes; the largest checkpoints people keep are below this
MAX_DIMS = 5
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64,
}  # fmt: skip
READABLE = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8", "I32": "<i4", "I64": "<i8"}
# How each kind of number is read as bits, and the exponent that stands for infinity and NaN.
EXPONENTS = {
    "F16": ("<u2", np.uint16(0x7C00)), "BF16": ("<u2", np.uint16(0x7F80)), "F32": ("<u4", np.uint32(0x7F800000)),
    "F64": ("<u8", np.uint64(0x7FF0000000000000)),
}  # fmt: skip
CHUNK = 2**20  # values, and bytes when hashing
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
STORE = "Save the file as F16, BF16 or F32."
BLANK = b" \t\r\n\xef\xbb\xbf"
# How files of another kind begin (small letters), what they are, and what to do.
STARTS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the file itself",
        "Fetch the real file with git lfs pull, or download it from the page it came from.",
    ),
    *(
        (mark, "a web page, not the file itself", "The site wants a login or a click first: download it in a browser.")
        for mark in (b"<!doctype", b"<html", b"<head", b"<?xml")
    ),
    (b'{"error', "an error message of the site, not the file itself", "Log in there, then download it again."),
    (b"gguf", "a GGUF file of a whole model", "Use an adapter in a .safetensors file."),
    (b"7z\xbc\xaf", "a packed archive", "Unpack it first."),
    (b"rar!", "a packed archive", "Unpack it first."),
    (b"\x1f\x8b", "a packed archive", "Unpack it first."),
    (b"\x89png", "a picture", "Choose the .safetensors file beside it."),
    (b"\xff\xd8\xff", "a picture", "Choose the .safetensors file beside it."),
)
CONVERT = "Ask its author for a .safetensors file, or make one: intarsia adapters convert FILE --out NEW.safetensors"


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
                f"{shorten(name)} is stored as {info.dtype}, which is not read here.",
                STORE,
            )
        with reading(self.path) as file:
            for raw in self.raw(file, info):
                yield _decode(raw, info.dtype)

    def numbers(self, names: Iterable[str]) -> dict[str, float]:
        """Read the first value of each of some tensors, all in one opening."""
        found: dict[str, float] = {}
        with reading(self.path) as file:
            for name in names:
                info = self.tensors[name]
                if info.dtype not in READABLE:
                    raise AdapterError(f"{shorten(name)} is stored as {info.dtype}, which is not read here.", STORE)
                found[name] = float(_decode(next(self.raw(file, info))[:1], info.dtype)[0])
        return found

    def raw(self, file: BinaryIO, info: TensorInfo) -> Iterator[NDArray[Any]]:
        """Read one tensor from the opened file piece by piece, as it is stored (bfloat16 as whole numbers)."""
        kind = np.dtype(READABLE[info.dtype])
        file.seek(self.data_start + info.start)
        left = prod(info.shape)
        while left:
            take = min(left, CHUNK)
            read = file.read(take * kind.itemsize)
            if len(read) < take * kind.itemsize:
                raise AdapterError(f"{self.path.name} became shorter while it was read.", "Copy it again.")
            yield np.frombuffer(read, kind)
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
    _check_there(path)
    with reading(path) as file:
        size, start = os.fstat(file.fileno()).st_size, file.read(64)
        _check_start(path, size, start)
        (length,) = struct.unpack("<Q", start[:8])
        if length > MAX_HEADER:
            raise AdapterError(
                f"{path.name} declares a header of {length:,} bytes; at most {MAX_HEADER:,} are read.",
                "It is damaged or made to do harm: get it from another source.",
            )
        if size < 8 + length:
            raise AdapterError(f"{path.name} ends inside its header: it was cut off.", "Download it again.")
        file.seek(8)
        raw = file.read(length)
    try:
        table = HeaderTable(path.name, raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise AdapterError(f"{path.name} has a header that cannot be read.", "Download it again.") from None
    tensors = {name: _tensor(path, name, fields) for name, fields in table.tensors.items()}
    _check_buffer(path, tensors, size - 8 - length)
    return Header(path, tensors, table.metadata, 8 + length, size)


@contextmanager
def reading(path: Path) -> Generator[BinaryIO]:
    """Open a file, and say in words what the system says in numbers.

    Raises:
        AdapterError: It cannot be opened or read.
    """
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        if error.errno in FULL:  # of a file that is written meanwhile
            raise
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> AdapterError:
    """Explain why a file cannot be read."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return AdapterError(f"There is no file {path}.", "Check the path.")
    if isinstance(error, PermissionError):
        return AdapterError(f"{path.name} may not be read.", "Allow it in the file's permissions, or make a copy.")
    if error.errno == errno.ELOOP:
        return AdapterError(f"{path.name} is a link that leads back to itself.", "Give the file it was meant for.")
    if error.errno == errno.ENAMETOOLONG:
        return AdapterError(f"The name {shorten(path.name)} is too long for a file.", "Check the path.")
    return AdapterError(f"{path.name} cannot be read: {error.strerror or error}.", "Copy it again, or check the disk.")


def _check_there(path: Path) -> None:
    """Only files are opened: a named pipe would be waited for."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise unreadable(path, error) from None
    except ValueError:  # a zero byte in the path
        raise AdapterError(f"There is no file {path}.", "Check the path.") from None
    if stat.S_ISDIR(mode):
        raise AdapterError(f"{path} is a folder, not a file.", "Give the .safetensors file that is in it.")
    if not stat.S_ISREG(mode):
        raise AdapterError(f"{path} is a device or a pipe, not a file.", "Give a .safetensors file.")


def pickled(path: Path, start: bytes) -> bool:
    """Whether a file is a pickle, or a zip of one, by its ending or its first nine bytes."""
    framed = start[8:9] == b"{"  # the length before it may begin like anything: 0x80 like a pickle, 0x8b1f like gzip
    mark = start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and not framed)
    return mark or path.suffix.lower() in PICKLES


def _check_start(path: Path, size: int, start: bytes) -> None:
    """Refuse what is no safetensors file by its first bytes or its ending."""
    if size == 0:
        raise AdapterError(f"{path.name} is empty.", "Download it again.")
    framed = start[8:9] == b"{"
    if pickled(path, start):
        kind = "a zip or PyTorch pickle" if start.startswith(b"PK") else "a pickle"
        raise AdapterError(f"{path.name} is {kind} and could run code when opened; it is not read.", CONVERT)
    for mark, what, hint in STARTS:
        if not framed and start.lstrip(BLANK).lower().startswith(mark):
            raise AdapterError(f"{path.name} is {what}.", hint)
    if size > MAX_FILE:
        raise AdapterError(
            f"{path.name} has {size:,} bytes; at most {MAX_FILE:,} are read.", "No adapter is that large: check it."
        )
    if size < 10:
        raise AdapterError(f"{path.name} is too short for a safetensors file: it was cut off.", "Download it again.")
    if not framed:
        raise AdapterError(f"{path.name} is not a safetensors file.", "Choose a file that ends in .safetensors.")


def _tensor(path: Path, name: str, fields: Mapping[str, Any]) -> TensorInfo:
    called = shorten(name)
    dtype, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not _naturals(shape) or not _naturals(span) or len(span) != 2:
        raise AdapterError(f"{path.name} describes the tensor {called} wrongly.", "Download it again.")
    if dtype not in BITS:
        raise AdapterError(f"{path.name} stores {called} as {dtype[:20]}, which is not known.", STORE)
    if len(shape) > MAX_DIMS:
        raise AdapterError(
            f"{path.name} holds a tensor with {len(shape)} dimensions ({called}); at most {MAX_DIMS} are read.",
            "It is damaged or made to do harm: get it from another source.",
        )
    if prod(shape) * BITS[dtype] // 8 != span[1] - span[0]:
        raise AdapterError(f"{path.name} gives {called} a size that does not fit its shape.", "Download it again.")
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
            raise AdapterError(f"{path.name} holds tensors that {what} before {shorten(name)}.", "Download it again.")
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
    """Look at every value once, in file order, a piece at a time; by its bits, which is faster than by its number."""
    zeros: set[str] = set()
    with reading(header.path) as file:
        for name, info in sorted(header.tensors.items(), key=lambda item: item[1].start):
            if info.dtype not in READABLE:
                continue
            bits, exponent = EXPONENTS.get(info.dtype, ("", 0))
            zero = True
            for raw in header.raw(file, info):
                if exponent and ((raw.view(bits) & exponent) == exponent).any():
                    return Scan(name, frozenset())
                zero = zero and not (raw.view(bits) << 1 if exponent else raw).any()  # without the sign: -0 is zero
            if zero:
                zeros.add(name)
    return Scan(None, frozenset(zeros))


def hashes(header: Header) -> tuple[str, str]:
    """Give the SHA-256 of the whole file, and of the tensor buffer alone (other tools' `modelspec.hash_sha256`).

    Raises:
        AdapterError: The file became longer or shorter since its header was read.
    """
    whole, buffer, size = hashlib.sha256(), hashlib.sha256(), header.data_start
    with reading(header.path) as file:
        whole.update(file.read(header.data_start))
        while chunk := file.read(CHUNK):
            whole.update(chunk)
            buffer.update(chunk)
            size += len(chunk)
    if size != header.size:
        raise AdapterError(f"{header.path.name} changed while it was read.", "Wait for its download, then try again.")
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
