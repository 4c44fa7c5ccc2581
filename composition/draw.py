"""Draws compositions: the method stands around the studio's one denoising loop, and is gone when the picture is."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..pipelines.denoise import Stepped, denoise
from ..pipelines.errors import InputError
from ..pipelines.learned_words import taught
from .composition import Composition
from .method import CompositionMethod, Drawing, O

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Moment:
    """One step of a composed picture was done.

    Args:
        stepped: What the loop did.
        drawing: The method's: masks and figures of this step.
    """

    stepped: Stepped
    drawing: Drawing


@contextmanager
def prepared(composition: Composition, method: CompositionMethod[O], options: O) -> Generator[Drawing]:
    """Prepare the model for one picture; on leaving, also by an exception or a stop, it is exactly as before.

    Raises:
        IntarsiaError: An adapter does not fit, or the method cannot draw this.
        Cancelled: A stop was asked for.
    """
    quantizer: Any = getattr(composition.model.denoiser, "hf_quantizer", None)
    if "gradients" in method.needs and quantizer is not None and not quantizer.is_trainable:
        raise InputError(
            f"{method.title} needs gradients, and this model's packed weights give none.",
            "Load the model unpacked, or choose a method without gradients, such as Region.",
        )
    with taught(composition.model.components, composition.attachments):
        try:
            with method.attach(composition, options) as drawing:
                yield drawing
        finally:
            composition.model.rest()


def moments(composition: Composition, drawing: Drawing) -> Iterator[Moment]:
    """Run the loop of a prepared picture.

    Raises:
        Cancelled: A stop was asked for.
    """
    for stepped in denoise(drawing.work, composition.token, drawing.hooks):
        yield Moment(stepped, drawing)


def render(composition: Composition, method: CompositionMethod[O], options: O) -> Image.Image:
    """Draw one picture without files or events.

    Raises:
        IntarsiaError: An adapter does not fit, or the method cannot draw this.
        Cancelled: A stop was asked for.
    """
    with prepared(composition, method, options) as drawing:
        latents = drawing.work.latents
        for moment in moments(composition, drawing):
            latents = moment.stepped.latents
    with torch.no_grad():
        image = composition.model.engine.decode(latents, composition.size)[0]
    composition.model.rest()
    return image
