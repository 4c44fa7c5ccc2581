"""Bake adapters into a model's own weights: a copy of its files in which only the changed numbers differ.

Everything else stays byte for byte, and no more than one layer is in memory at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..atomic import replacing, replacing_folder
from ..errors import AdapterError, InputError
from ..events import Progress
from ..options import option
from ..tool import COLUMNS, Inputs, Made, Tool, ToolOptions, Work, in_sum, one_family

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..model_weights import Place
    from ..sources import ModelSource


class BakeOptions(ToolOptions):
    """Options of baking; `model` is baked into."""

    model: str = option("", label="Model", help="A folder or a single file; it stays as it is.", high=1000)


def _work(inputs: Inputs, options: BakeOptions) -> Work:
    from ..model_weights import places
    from ..sources import resolve

    if not options.model:
        raise InputError("There is no model to bake into.", "Name it with --model.")
    source = resolve(options.model)
    family = one_family(inputs.sources)
    if source.family != family:
        raise InputError(f"The adapters are for {family}, {source.name} is {source.family}.", "Choose such a model.")
    weights, biases = places(source), places(source, ".bias")
    rows: list[tuple[str, tuple[float, ...]]] = []
    paths = list(dict.fromkeys(path for given in inputs.sources for path in given.adapter.layers))
    for number, path in enumerate(paths, 1):
        inputs.token.check()
        if path not in weights:
            raise AdapterError(f"{source.name} has no layer {path}; nothing was baked.", "Choose the model it is for.")
        rows.append((path, _figures(inputs, path, weights[path], biases.get(path))))
        yield Progress(stage="bake", step=number, total=len(paths))

    def save(target: Path) -> None:
        _copy(source, target, lambda files: _overwrite(inputs, paths, weights, biases, files))

    return Made(COLUMNS, tuple(rows), (in_sum(rows),), save)


def changed(inputs: Inputs, path: str, weight: Place, bias: Place | None) -> tuple[Tensor, Tensor | None, float]:
    """A layer's weight and bias with all changes added in float32, and the norm of the change."""
    own, own_bias = weight.read(), None if bias is None else bias.read()
    made, made_bias = own.clone(), None if own_bias is None else own_bias.clone()
    for source in inputs.sources:
        layer = source.adapter.layers.get(path)
        if layer is None:
            continue
        try:
            change = layer.change(own, own_bias)
        except RuntimeError:
            raise AdapterError(f"{source.name} does not fit {path}.", "Choose the model it was made for.") from None
        if change.weight is not None:
            made += source.weight * change.weight
        if change.bias is not None:
            if made_bias is None:
                raise AdapterError(f"{source.name} changes the bias of {path}, which has none.", "")
            made_bias += source.weight * change.bias
    size = float((made - own).double().square().sum())
    if made_bias is not None and own_bias is not None:
        size += float((made_bias - own_bias).double().square().sum())
    return made, made_bias, size**0.5


def _figures(inputs: Inputs, path: str, weight: Place, bias: Place | None) -> tuple[float, ...]:
    """What storing the changed layer in its own type loses of the change."""
    made, made_bias, size = changed(inputs, path, weight, bias)
    error = float((made.to(_dtype(weight)).float() - made).double().square().sum())
    if made_bias is not None and bias is not None:
        error += float((made_bias.to(_dtype(bias)).float() - made_bias).double().square().sum())
    ranks = [given.adapter.layers[path].rank for given in inputs.sources if path in given.adapter.layers]
    return size, error**0.5, error**0.5 / size if size else 0.0, float(sum(ranks))


def _dtype(place: Place) -> torch.dtype:
    import torch

    from ..model_weights import TORCH_NAMES

    name = place.header.tensors[place.tensor].dtype
    if name not in TORCH_NAMES:
        raise InputError(f"{place.header.path.name} stores {place.tensor} as {name}.", "Bake into a 16-bit model.")
    return getattr(torch, TORCH_NAMES[name])


def _copy(source: ModelSource, target: Path, change: Callable[[dict[Path, Path]], None]) -> None:
    """Copy a model to a temporary place, change the copy and move it to where it belongs."""
    assert source.path is not None
    if source.kind == "single_file":
        with replacing(target) as temporary:
            shutil.copyfile(source.path, temporary)
            change({source.path: temporary})
        return
    with replacing_folder(target) as temporary:
        shutil.copytree(source.path, temporary, dirs_exist_ok=True)
        change({path: temporary / path.relative_to(source.path) for path in source.path.rglob("*.safetensors")})


def _overwrite(
    inputs: Inputs, paths: list[str], weights: dict[str, Place], biases: dict[str, Place], files: dict[Path, Path]
) -> None:
    for path in paths:
        made, made_bias, _ = changed(inputs, path, weights[path], biases.get(path))
        for place, value in ((weights[path], made), (biases.get(path), made_bias)):
            if place is not None and value is not None:
                _write(files[place.header.path], place, value)


def _write(file: Path, place: Place, value: Tensor) -> None:
    """Write a tensor's numbers where they lie in a file."""
    import torch

    whole = place.header.tensors[place.tensor]
    row = (whole.end - whole.start) // max(1, whole.shape[0])
    at = place.header.data_start + whole.start + (row * place.rows[0] if place.rows else 0)
    raw = value.to(_dtype(place)).contiguous().view(torch.uint8).numpy().tobytes()
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(raw)


TOOL = Tool(
    "bake",
    "Bake",
    "A copy of a model with adapters in its weights.",
    "",
    BakeOptions,
    1,
    64,
    "model",
    _work,
    weighted=True,
)
