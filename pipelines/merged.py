"""Adapters added to a model's weights while it draws, and taken out again bit by bit.

A step then costs what it costs without adapters; the price is a copy of every weight that is touched.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .errors import AdapterError
from .fitted import Attachment, Target, fitted


@contextmanager
def merged(components: Mapping[str, nn.Module], attachments: Sequence[Attachment]) -> Generator[Mapping[str, str]]:
    """Merge adapters into a model for the length of a `with` block.

    The sums are made in float32 and stored in each weight's own type. The weights as they were are kept on the CPU and
    copied back on leaving, also by an exception, so that nothing is left of the merge, not even rounding.

    Args:
        components: The model's parts by name.
        attachments: The adapters; each must act in all steps.

    Yields:
        By adapter name, a line that says how many of its modules matched.

    Raises:
        AdapterError: An adapter does not fit, acts in some steps only, or changes a bias its layer does not have.
    """
    for attachment in attachments:
        if attachment.steps != (0.0, 1.0):
            raise AdapterError(
                f"{attachment.name} acts in a part of the steps and cannot be merged.",
                "Let it act in all, or hang it on.",
            )
    found = fitted(components, attachments)
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for module, uses in found.layers:
                weight, bias = _changed(module, uses)
                for own, made in ((module.weight, weight), (module.bias, bias)):
                    if own is not None and made is not None:
                        kept.append((own, own.detach().to("cpu", copy=True)))
                        own.copy_(made)
        yield found.matched
    finally:
        with torch.no_grad():
            for own, before in kept:
                own.copy_(before)


def _changed(module: Target, uses: Sequence[tuple[Attachment, str]]) -> tuple[Tensor | None, Tensor | None]:
    """The layer's weight and bias with every change, each computed from the layer as it was; None if untouched."""
    weight, bias = None, None
    for attachment, path in uses:
        strength = attachment.weight * attachment.factor(path)
        change = attachment.adapter.layers[path].change(module.weight.detach(), module.bias)
        if change.weight is not None:
            weight = (module.weight.detach().float() if weight is None else weight) + strength * change.weight
        if change.bias is not None:
            if module.bias is None:
                raise AdapterError(f"{attachment.name} adds a bias to {path}, which has none.", "Hang it on instead.")
            own = module.bias.detach().float() if bias is None else bias
            bias = own + strength * change.bias.to(own.device)
    return weight, bias
