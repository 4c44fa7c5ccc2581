"""Which models are at hand, without loading any."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..pipelines.errors import IntarsiaError
from ..pipelines.families import FAMILIES, Family
from ..pipelines.requests import ToolRequest
from ..pipelines.sources import ModelSource, resolve
from .jobs import JobStore


@dataclass(frozen=True)
class ModelInfo:
    """A model a person can choose.

    Args:
        name: What to write as `model` in a request.
        title: For a list.
        kind: "folder", "single_file" or "hub".
        family: Key of FAMILIES.
        path: Where it lies; "" for a hub model.
        size: Bytes on disk, 0 if unknown.
        width: Of the pictures the model was made for, in pixels; so is `height`.
    """

    name: str
    title: str
    kind: str
    family: str
    path: str
    size: int
    width: int
    height: int


def describe_model(name: str) -> ModelInfo:
    """Say what is known of a model.

    Raises:
        WeightsError: It cannot be found or is of no known family.
    """
    source = resolve(name)
    family = FAMILIES[source.family]
    path = source.path
    title = f"{source.name} ({family.title})"
    size = 0 if path is None else _size(path)
    return ModelInfo(name, title, source.kind, source.family, str(path or ""), size, *_native(source, family))


def list_models(store: JobStore) -> list[ModelInfo]:
    """List Mini, what lies in the home's `models` folder, and what jobs used before; unusable ones are left out."""
    folder = store.home.root / "models"
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    names = ["mini", *(str(path) for path in found if path.is_dir() or path.suffix == ".safetensors")]
    names += [job.request.model for job in store.jobs(limit=200) if not isinstance(job.request, ToolRequest)]
    models: list[ModelInfo] = []
    for name in dict.fromkeys(names):
        try:
            models.append(describe_model(name))
        except IntarsiaError:
            continue  # moved or deleted since, or not a model: this is a list of what can be used
    return models


def _native(source: ModelSource, family: Family) -> tuple[int, int]:
    """Read the native size from the model's own settings, as diffusers does; the family's where they are silent."""
    settings = None if source.path is None else source.path / family.denoiser / "config.json"
    if settings is None or not settings.is_file():
        return family.default_size
    vae = source.path / "vae" / "config.json" if source.path is not None else None
    latent = json.loads(settings.read_text(encoding="utf-8")).get("sample_size")
    if not isinstance(latent, int) or vae is None or not vae.is_file():
        return family.default_size
    blocks = json.loads(vae.read_text(encoding="utf-8")).get("block_out_channels", ())
    side = latent * 2 ** max(0, len(blocks) - 1)
    return side, side


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
