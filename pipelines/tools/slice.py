"""Slice: keep some blocks of an adapter, tensors byte for byte; for SDXL also its content or its style half.

Paper: B-LoRA, arXiv:2403.14572, whose two blocks hold content and style in any SDXL adapter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..errors import InputError
from ..events import Progress
from ..options import option
from ..tool import Inputs, Made, Tool, ToolOptions, Work, provenance


class SliceOptions(ToolOptions):
    """Options of slicing."""

    part: Literal["content", "style", "blocks"] = option(
        "blocks", label="Part", help="A half, of an SDXL adapter; or the blocks named below."
    )
    blocks: str = option(
        "", label="Blocks", help="How the wanted layers begin, such as unet.up_blocks.1, text_encoder.", high=1000
    )


def _work(inputs: Inputs, options: SliceOptions) -> Work:
    from ..architectures import ModuleIndex
    from ..atomic import replacing
    from ..headers import read_header, write_subset
    from ..identify import HALVES
    from ..layers import collect
    from ..measure import measure_layer

    source = inputs.sources[0]
    adapter = source.adapter
    if options.part == "blocks":
        starts = tuple(part.strip().rstrip(".") + "." for part in options.blocks.split(",") if part.strip())
    elif adapter.family == "sdxl":
        starts = (HALVES[options.part],)
    else:
        raise InputError(f"{source.name} is for {adapter.family}.", "Only SDXL adapters have content and style.")
    kept = {path: None for path in adapter.layers if starts and f"{path}.".startswith(starts)}
    if not kept:
        known = sorted({".".join(path.split(".")[:3]) for path in adapter.layers})
        wanted = options.blocks or options.part
        raise InputError(f"{source.name} has no layers in {wanted}.", f"It has: {', '.join(known[:12])}.")
    rows: list[tuple[str, tuple[float, ...]]] = []
    for number, (path, layer) in enumerate(adapter.layers.items(), 1):
        inputs.token.check()
        size = measure_layer(path, layer).norm or 0.0  # of a DoRA without its lengths, which are the model's matter
        rows.append((path, (size, 0.0 if path in kept else size)))
        yield Progress(stage="slice", step=number, total=len(adapter.layers))
    whole = sum(row[0] ** 2 for _, row in rows) ** 0.5
    lost = sum(row[1] ** 2 for _, row in rows) ** 0.5
    share = lost / whole if whole else 0.0
    told = f"{len(kept)} of {len(rows)} layers are kept; what is left out is {share:.3g} of the change."
    role = options.part if options.part != "blocks" else adapter.role

    def save(path: Path) -> None:
        header = read_header(adapter.path)
        found = collect(header, ModuleIndex(inputs.shapes), plain=True).layers
        names = dict.fromkeys(name for path in kept for name in found[path].parts.values())
        texts = {**header.metadata, "intarsia.role": role} | provenance(inputs, options, "slice")
        with replacing(path) as temporary:
            write_subset(header, list(names), texts, temporary)

    return Made(("norm", "error"), tuple(rows), (told,), save)


TOOL = Tool(
    "slice", "Slice", "Some blocks of an adapter, or its content or style half.", "arXiv:2403.14572", SliceOptions,
    1, 1, "adapter", _work,
)  # fmt: skip
