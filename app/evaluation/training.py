"""Adapters a bench needs: trained once in this process, kept under the studio's home, found again by what made them."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipelines.errors import InputError
from ...pipelines.events import Artifact, CancelToken, Event, Notice, Progress, Stage
from ...pipelines.requests import TrainingPicture, TrainRequest
from ..settings import Home

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...pipelines.adapter_types import AdapterFile
    from ...pipelines.models import Model
    from .bench import Place

MADE = "made.json"  # written last: an adapter folder that holds it is complete
CODE = ("data", "encode", "layers", "loop", "run", "schedule")  # modules of training that decide what is learned


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a training gave.

    Args:
        adapters: In the order the recipe wrote them.
        seconds: The training took, when it was done; the part before a cut is not in it.
    """

    adapters: tuple[AdapterFile, ...]
    seconds: float


def training(
    place: Place,
    recipe: str,
    name: str,
    pictures: Sequence[tuple[Image, str]],
    options: Mapping[str, Any],
    seed: int,
) -> Generator[Event, None, Trained]:
    """Train adapters with events, or take them from an earlier run that trained exactly these.

    The files lie in `evaluations/adapters/<hash>` of the home; the hash is that of the model's weights, the resolved
    request, the pictures and the training code. A run that is cut goes on from its checkpoint.

    Args:
        place: Of the bench; its model must have nothing attached.
        recipe: Name of a training recipe.
        name: Of the result; recipes may make the trigger from it.
        pictures: Each with its caption.
        options: The recipe's, as far as they are not left to it.
        seed: Of the training.

    Yields:
        Stages, progress, and a notice when a damaged checkpoint was thrown away.

    Raises:
        InputError: Recipe, options or pictures cannot be used.
        Cancelled: A stop was asked for; a checkpoint is kept.
    """
    root = _root(place.home)
    shown = [_kept(root / "pictures", image, caption) for image, caption in pictures]
    request = TrainRequest(
        recipe=recipe, model=place.model.source.name, name=name, pictures=tuple(shown), seed=seed,
        options={"sample_every": 0, **options},
    )  # fmt: skip
    made_of = identity(request, place.model)
    folder = root / hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:24]
    if not (folder / MADE).is_file():
        yield from _train(request, place.model, folder, made_of, place.token)
    return _read(folder, place.model)


def identity(request: TrainRequest, model: Model) -> dict[str, Any]:
    """Say what an adapter is made of: equal identities give equal files."""
    from ...training.run import identify, resolve

    plan = resolve(request, model, request.pictures)
    return {
        "name": request.name,
        "weights": weights_hash(model),
        "dtype": str(model.dtype),
        "device": model.device.type,
        "steps": plan.settings.steps,
        "ranks": dict(plan.settings.ranks),
        "code": code_hash(type(plan.recipe).__module__),
        **identify(plan, model.denoiser),
    }


def weights_hash(model: Model) -> str:
    """Hash every weight file of a model."""
    from ...pipelines.sources import source_files

    digest = hashlib.sha256()
    for path in source_files(model.source):
        status = path.stat()
        digest.update(_file_hash(path, status.st_mtime_ns, status.st_size).encode())
    return digest.hexdigest()


_HASHES: dict[tuple[Path, int, int], str] = {}  # of files, so that each is read once per process


def _file_hash(path: Path, changed: int, size: int) -> str:
    key = (path, changed, size)
    if key not in _HASHES:
        with path.open("rb") as file:
            _HASHES[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _HASHES[key]


def code_hash(recipe: str) -> str:
    """Hash the code of a recipe's module and of the training loop: adapters of an earlier version are not these."""
    import importlib

    digest = hashlib.sha256()
    package = __package__.removesuffix("app.evaluation") + "training" if __package__ else "intarsia.training"
    for name in (recipe, *(f"{package}.{part}" for part in CODE)):
        digest.update(Path(str(importlib.import_module(name).__file__)).read_bytes())
    return digest.hexdigest()


def _root(home: Home) -> Path:
    path = home.evaluations / "adapters"
    path.mkdir(exist_ok=True)
    return path


def _kept(folder: Path, image: Image, caption: str) -> TrainingPicture:
    """Write a picture under the hash of its bytes: training reads files."""
    from ...pipelines.atomic import replacing

    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    folder.mkdir(exist_ok=True)
    path = folder / f"{hashlib.sha256(buffer.getvalue()).hexdigest()[:24]}.png"
    if not path.exists():
        with replacing(path) as temporary:
            temporary.write_bytes(buffer.getvalue())
    return TrainingPicture(path=str(path), caption=caption)


def _train(
    request: TrainRequest, model: Model, folder: Path, made_of: Mapping[str, Any], token: CancelToken
) -> Generator[Event]:
    """Train into a folder of its own beside `folder`, which takes its name when everything is there."""
    from ...training import checkpoint
    from ...training.run import train

    part = folder.with_name(f".{folder.name}.part")
    if checkpoint.resumable(part):
        try:
            checkpoint.load(part)
            request = request.model_copy(update={"resume_from": str(part)})
        except InputError as error:
            yield Notice(text=f"The training of {request.name} starts anew: {error.message}")
            shutil.rmtree(part)
    started, files = time.monotonic(), list[str]()
    for event in train(request, model, part, token):
        if isinstance(event, Artifact) and event.kind == "adapter":
            files.append(Path(event.path).name)
        elif isinstance(event, Stage | Progress):
            yield event
    shutil.rmtree(part / "checkpoint", ignore_errors=True)
    made = {"files": files, "seconds": round(time.monotonic() - started, 2), "made_of": made_of}
    (part / MADE).write_text(json.dumps(made, indent=1))
    shutil.rmtree(folder, ignore_errors=True)  # without its last file it is of no use
    part.replace(folder)


def _read(folder: Path, model: Model) -> Trained:
    from ...pipelines.adapter_file import read_adapter
    from ...pipelines.sources import unet_shapes

    made = json.loads((folder / MADE).read_text())
    shapes = unet_shapes(model.source)
    return Trained(tuple(read_adapter(folder / name, shapes) for name in made["files"]), made["seconds"])
