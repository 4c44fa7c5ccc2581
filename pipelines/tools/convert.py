"""Convert: write an adapter in another trainer's spelling, and hold what was written against what was read."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

from ..events import Progress
from ..options import option
from ..tool import COLUMNS, Inputs, Made, Source, Tool, ToolOptions, Work, figures, in_sum


class ConvertOptions(ToolOptions):
    """Options of converting."""

    to: Literal["kohya", "diffusers"] = option("kohya", label="Spelling", help="How the layers are to be named.")


def _work(inputs: Inputs, options: ConvertOptions) -> Work:
    from ..adapter_file import read_adapter
    from ..convert import convert

    source = inputs.sources[0]
    with tempfile.TemporaryDirectory() as folder:
        written = convert(source.adapter.path, options.to, Path(folder) / "made.safetensors")
        again = Source(source.name, read_adapter(written.path))
    rows: list[tuple[str, tuple[float, ...]]] = []
    for number, path in enumerate(source.adapter.layers, 1):
        inputs.token.check()
        if len(inputs.shape(source, path)) > 1:
            rows.append((path, figures(inputs.factors(source, path), inputs.factors(again, path))))
        yield Progress(stage="convert", step=number, total=len(source.adapter.layers))
    told = (in_sum(rows), *(f"Not the same: {text}." for text in written.lost))

    def save(target: Path) -> None:
        convert(source.adapter.path, options.to, target)

    return Made(COLUMNS, tuple(rows), told, save)


TOOL = Tool(
    "convert", "Convert", "The same adapter under the names of another trainer.", "", ConvertOptions, 1, 1, "adapter",
    _work,
)  # fmt: skip
