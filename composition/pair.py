"""Content and style: which two adapters of a picture a method for exactly one of each works on. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..pipelines.errors import InputError

if TYPE_CHECKING:
    from ..pipelines.attach import Attachment
    from ..pipelines.options import Options
    from .composition import Composition
    from .layout import ComposeRequest


def check_pair(request: ComposeRequest, options: Options) -> None:
    """Refuse anything but two concepts, or one concept and one style.

    Raises:
        InputError: There are more or fewer adapters.
    """
    concepts, styles = len(request.concepts), len(request.styles)
    if concepts + styles != 2:
        raise InputError(
            f"One content and one style are put together here; there are {concepts + styles} adapters.",
            "Keep two concepts, of which the second is the style, or one concept and one style.",
        )


def pair(composition: Composition) -> tuple[Attachment, Attachment]:
    """The content and the style: the two concepts in their order, or the concept and the style."""
    content, style = composition.attachments
    return content, style
