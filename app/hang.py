"""Reads adapters by the names a request uses, ready to be hung on a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from ..pipelines.requests import AdapterUse

if TYPE_CHECKING:
    from ..pipelines.attach import Attachment
    from ..pipelines.models import Model
    from .shelf import Shelf

U = TypeVar("U", bound=AdapterUse)


def read(uses: Sequence[U], model: Model, shelf: Shelf) -> tuple[tuple[U, ...], tuple[Attachment, ...]]:
    """Read adapters; gives the uses with the files' hashes, and what to hang on, under the library's names.

    Raises:
        IntarsiaError: One is not there or cannot be read.
    """
    from ..pipelines.adapter_file import read_adapter
    from ..pipelines.attach import Attachment
    from ..pipelines.sources import unet_shapes

    shapes = unet_shapes(model.source) if uses else None
    named: list[U] = []
    hung: list[Attachment] = []
    for use in uses:
        entry = shelf.find(use.adapter)
        adapter = read_adapter(entry.path, shapes)
        named.append(use.model_copy(update={"sha256": adapter.sha256}))
        hung.append(Attachment(entry.name, adapter, use.weight, use.blocks, (use.first, use.last)))
    return tuple(named), tuple(hung)
