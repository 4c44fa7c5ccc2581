"""Orthogonal bases that adapters share without knowing each other, and the header text that names their columns.

Orthogonal Adaptation (arXiv:2312.02432) freezes A to columns of one orthogonal matrix per input width and
trains B alone; where the columns of two adapters differ, their sum keeps them apart. The paper draws columns by chance;
here `free_columns` hands out blocks that nobody has.

The header key `intarsia.basis` holds JSON: `seed` of the matrices, `columns` [first, past the last], the same for every
width, and `hash`, which tells whether two programs draw the same matrices from a seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from .errors import InputError
from .requests import MAX_SEED

if TYPE_CHECKING:
    from torch import Tensor

KEY = "intarsia.basis"
PROBE = (64, 8)  # width and columns of the matrix that the hash is taken of


@dataclass(frozen=True)
class Basis:
    """What an adapter's header says of its basis.

    Args:
        seed: Of the matrices.
        columns: First, and past the last.
        hash: From `fingerprint` where it was trained.
    """

    seed: int
    columns: tuple[int, int]
    hash: str

    def text(self) -> str:
        """Its header text, to stand under KEY."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> Basis | None:
        """Read a header; None if it holds no basis, or one that makes no sense."""
        try:
            found: object = json.loads(metadata.get(KEY, "null"))
        except (ValueError, RecursionError):
            return None
        values = cast(dict[str, Any], found) if isinstance(found, dict) else {}
        seed, columns, digest = values.get("seed"), values.get("columns"), values.get("hash")
        if type(seed) is not int or not 0 <= seed <= MAX_SEED or not isinstance(digest, str):
            return None
        if not isinstance(columns, list) or [type(at) for at in cast(list[object], columns)] != [int, int]:
            return None
        first, last = cast(list[int], columns)
        return cls(seed, (first, last), digest) if 0 <= first < last else None

    def same_matrices(self, other: Basis) -> bool:
        return (self.seed, self.hash) == (other.seed, other.hash)

    def shared_with(self, other: Basis) -> int:
        """How many columns of the same matrices both have."""
        least = min(self.columns[1], other.columns[1]) - max(self.columns[0], other.columns[0])
        return max(0, least) if self.same_matrices(other) else 0


def columns_of(width: int, seed: int, columns: tuple[int, int]) -> Tensor:
    """Give columns of the orthogonal matrix of a width.

    Gaussian columns, one after the other, made orthonormal by QR with a positive diagonal of R: so the first columns do
    not depend on how many are made, and wide matrices cost only what is asked of them.

    Args:
        width: Inputs of the layer; of a convolution times the cells of its kernel.
        seed: Of the matrix.
        columns: First, and past the last; at most `width`.

    Returns:
        `(width, columns)`, float64, on the CPU; A of the adapter is its transpose.

    Raises:
        InputError: The matrix has fewer columns.
    """
    import torch

    first, last = columns
    if last > width:
        raise InputError(
            f"A layer with {width} inputs has no column {last - 1}.", "Choose a lower rank, or another basis seed."
        )
    mixed = hashlib.sha256(f"basis {seed} {width}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(mixed[:8], "big") >> 1)
    drawn = [torch.randn(width, generator=generator, dtype=torch.float64) for _ in range(last)]
    q, r = torch.linalg.qr(torch.stack(drawn, 1))
    return (q * r.diagonal().sign())[:, first:]


@cache
def fingerprint(seed: int) -> str:
    """Tell matrices of a seed from those that another generator would draw; rounded, so that no BLAS changes it."""
    import torch

    values = (columns_of(PROBE[0], seed, (0, PROBE[1])) * 1e4).round().to(torch.int32)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]


def free_columns(taken: Iterable[Basis], seed: int, rank: int, width: int) -> Basis:
    """Hand out the first block of columns that no adapter has.

    Args:
        taken: Of every adapter in the library and in training; those of other matrices do not count.
        seed: Of the matrices.
        rank: Columns wanted.
        width: The narrowest input of the layers to be trained: it bounds how many adapters keep apart.

    Raises:
        InputError: No block of this rank is left.
    """
    mine = Basis(seed, (0, rank), fingerprint(seed))
    first = 0
    for start, end in sorted(basis.columns for basis in taken if basis.same_matrices(mine)):
        if first + rank <= start:
            break
        first = max(first, end)
    if first + rank > width:
        raise InputError(
            f"No {rank} columns of basis {seed} are left in layers with {width} inputs.",
            "Choose a lower rank, another basis seed, or remove an adapter that is not needed.",
        )
    return Basis(seed, (first, first + rank), mine.hash)
