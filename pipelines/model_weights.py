"""Single weights of a model, read from its files by canonical path; the model itself is never loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .architectures import TEXT_ENCODERS, canonical, reference
from .errors import AdapterError, WeightsError
from .families import FAMILIES
from .headers import Header, read_header
from .kind import Shape
from .sources import ModelSource, source_files, weight_files

if TYPE_CHECKING:
    from torch import Tensor

TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Where single files keep each component: the front of its tensors' names.
FRONTS = {
    "model.diffusion_model.": "unet",
    "cond_stage_model.transformer.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
}
OPEN_CLIP = "conditioner.embedders.1.model.transformer.resblocks."
OPEN_CLIP_LAYERS = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a weight lies.

    Args:
        header: Of the file.
        tensor: Its name there.
        rows: First and one past the last row of that tensor; None for all.
    """

    header: Header
    tensor: str
    rows: tuple[int, int] | None = None

    @property
    def shape(self) -> Shape:
        whole = self.header.tensors[self.tensor].shape
        return whole if self.rows is None else (self.rows[1] - self.rows[0], *whole[1:])

    def read(self) -> Tensor:
        """The weight as float32."""
        import torch

        whole = torch.from_numpy(self.header.values(self.tensor)).float()
        return whole if self.rows is None else whole[slice(*self.rows)]


def places(source: ModelSource, end: str = ".weight") -> dict[str, Place]:
    """Find every weight (or, by another ending, every bias) of a model: canonical path to place.

    Raises:
        WeightsError: The model is not on this machine, or a file of it is damaged.
    """
    if source.path is None:
        raise WeightsError(f"{source.name} was not downloaded yet.", "Make a picture with it first.")
    found: dict[str, Place] = {}
    for part, file in _files(source):
        try:
            header = read_header(file)
        except AdapterError as error:
            raise WeightsError(f"The model {source.name} is damaged: {error.message}", error.hint) from None
        for name in header.tensors:
            for path, rows in _paths(source, part, name, end, header):
                found[path] = Place(header, name, rows)
    return found


def _files(source: ModelSource) -> Iterator[tuple[str, Path]]:
    """Each file with the component it holds, "" if it holds all."""
    assert source.path is not None
    if source.kind == "single_file":
        for file in source_files(source):
            yield "", file
        return
    for part in FAMILIES[source.family].modules:
        for file in weight_files(source.path / part):
            yield part, file


def _paths(
    source: ModelSource, part: str, name: str, end: str, header: Header
) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """The layers one tensor holds; several where projections are kept in one."""
    if part:
        if name.endswith(end):
            yield canonical(f"{part}.{name.removesuffix(end)}"), None
        return
    if name.startswith(OPEN_CLIP):
        number, _, inner = name.removeprefix(OPEN_CLIP).partition(".")
        stem = f"text_encoder_2.text_model.encoder.layers.{number}."
        if inner == f"attn.in_proj_{end[1:]}":
            side = header.tensors[name].shape[0] // 3
            for index, layer in enumerate("qkv"):
                yield f"{stem}self_attn.{layer}_proj", (index * side, (index + 1) * side)
        elif inner.endswith(end) and inner.removesuffix(end) in OPEN_CLIP_LAYERS:
            yield stem + OPEN_CLIP_LAYERS[inner.removesuffix(end)], None
        return
    front = next((front for front in FRONTS if name.startswith(front)), None)
    if front is None or not name.endswith(end):
        return
    component, inner = FRONTS[front], name.removeprefix(front).removesuffix(end)
    path = reference(source.family).find(component, inner)
    if path is None and component in TEXT_ENCODERS:
        path = canonical(f"{component}.{inner}")
    if path is not None:
        yield path, None
