"""Turns a layout into a composition: its adapters read, its masks opened, its size settled."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..composition.composition import Composition, Concept
from ..composition.layout import ComposeRequest, ConceptUse
from ..pipelines.adapter_file import read_adapter
from ..pipelines.attach import Attachment
from ..pipelines.errors import AdapterError, InputError
from ..pipelines.image import picture_size
from ..pipelines.picture import open_picture
from ..pipelines.sources import unet_shapes

if TYPE_CHECKING:
    from ..pipelines.events import CancelToken
    from ..pipelines.models import Model
    from .shelf import Shelf

ALMOST = 0.02  # by which the shape of a mask may differ from the canvas'


def resolved(
    request: ComposeRequest, model: Model, shelf: Shelf, token: CancelToken
) -> tuple[ComposeRequest, Composition]:
    """Read what a layout names; gives the request with the hashes of its adapters too.

    Raises:
        IntarsiaError: An adapter is of another family or cannot be read, a mask does not fit, the size cannot be.
    """
    size = picture_size(request, model)
    shapes = unet_shapes(model.source)

    def attachment(use: ConceptUse) -> tuple[str, Attachment]:
        adapter = read_adapter(shelf.find(use.adapter).path, shapes)
        if adapter.family != model.family:
            raise AdapterError(
                f"{use.called} is an adapter for {adapter.family}, and {model.source.name} is {model.family}.",
                "Choose an adapter of the model's family, or another model.",
            )
        return adapter.sha256, Attachment(use.called, adapter, use.weight, use.blocks, (use.first, use.last))

    concepts: list[Concept] = []
    uses: list[ConceptUse] = []
    for use in request.concepts:
        digest, hung = attachment(use)
        uses.append(use.model_copy(update={"sha256": digest}))
        mask = open_mask(Path(use.mask), size, use.called) if use.mask else None
        concepts.append(Concept(hung, use.prompt.strip(), use.phrase, use.box, mask, use.order))
    named = [attachment(use) for use in request.styles_named()]
    styles = tuple(
        use.model_copy(update={"sha256": digest}) for use, (digest, _) in zip(request.styles, named, strict=True)
    )
    made = Composition(
        model, tuple(concepts), tuple(hung for _, hung in named), request.said, request.negative,
        steps=request.steps, guidance=request.guidance, size=size, scheduler=request.scheduler,
        together=request.together, token=token,
    )  # fmt: skip
    return request.model_copy(update={"concepts": tuple(uses), "styles": styles}), made


def open_mask(path: Path, size: tuple[int, int], name: str) -> Tensor:
    """Read a mask: `(height, width)` from 0 to 1, at the size of the canvas.

    Raises:
        InputError: It is no picture, of another shape than the canvas, or black.
    """
    picture = open_picture(path)
    if abs(picture.width / picture.height - size[0] / size[1]) > ALMOST * size[0] / size[1]:
        raise InputError(
            f"The mask of {name} has {picture.width} x {picture.height} pixels, and the canvas {size[0]} x {size[1]}.",
            "Give it the canvas' own shape; its size does not matter.",
        )
    grey = picture.convert("L").resize(size, Image.Resampling.BOX)
    mask = torch.from_numpy(np.asarray(grey, dtype=np.float32) / 255)
    if float(mask.max()) < 0.5:
        raise InputError(f"The mask of {name} is black: the concept would be nowhere.", "Paint its place white.")
    return mask
