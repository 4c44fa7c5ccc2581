"""Turns a layout into a composition: its adapters read, its masks opened, its size settled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..composition.composition import Composition, Concept
from ..composition.layout import ComposeRequest
from ..pipelines.errors import InputError
from ..pipelines.image import picture_size
from ..pipelines.picture import open_picture
from .hang import read

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
    uses, attachments = read(request.concepts, model, shelf)
    concepts: list[Concept] = []
    for use, hung in zip(uses, attachments, strict=True):
        mask = open_mask(Path(use.mask), size, use.called) if use.mask else None
        named = replace(hung, name=use.called)
        concepts.append(Concept(named, use.prompt.strip(), use.phrase, use.box, mask, use.order))
    styles, over = read(request.styles, model, shelf)
    called = tuple(replace(hung, name=use.called) for use, hung in zip(request.styles_named(), over, strict=True))
    made = Composition(
        model, tuple(concepts), called, request.said, request.negative,
        steps=request.steps, guidance=request.guidance, size=size, scheduler=request.scheduler,
        together=request.together, token=token,
    )  # fmt: skip
    return request.model_copy(update={"concepts": uses, "styles": styles}), made


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
