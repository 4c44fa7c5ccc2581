"""A training run from request to adapter files: check, encode, train, save; a generator of events."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..pipelines.adapter_types import Role
from ..pipelines.errors import InputError, MemoryLimitError
from ..pipelines.events import Artifact, Cancelled, CancelToken, Event, Notice, Stage
from ..pipelines.requests import TrainingPicture, TrainRequest
from . import checkpoint, data
from .encode import Cache, encode
from .layers import TrainedLayers, trainable, trainable_layers
from .loop import Task, Trainer, run
from .recipe import Drawing, ModelFacts, Settings, TrainingOptions, TrainingRecipe, recipes
from .samples import Sampler, set_aside
from .schedule import NoiseSchedule

if TYPE_CHECKING:
    from ..pipelines.models import Model

# Options that may differ between a run and its resumption: they do not change what a step does.
FREE = frozenset({"steps", "sample_every", "sample_prompt", "checkpoint_every", "save_memory"})


@dataclass(frozen=True)
class Plan:
    """A request with everything resolved.

    Args:
        request: As asked.
        recipe: By its name.
        options: Parsed.
        settings: With nothing left open.
        pictures: Single files with their captions.
        prompts: What each picture is trained with.
    """

    request: TrainRequest
    recipe: TrainingRecipe[Any]
    options: TrainingOptions
    settings: Settings
    pictures: tuple[TrainingPicture, ...]
    prompts: tuple[str, ...]


def train(request: TrainRequest, model: Model, folder: Path, token: CancelToken) -> Iterator[Event]:
    """Train adapters.

    Args:
        request: What to learn, from which pictures, with which recipe.
        model: On its device; as it was when the generator ends, whatever happened.
        folder: The job's: sample pictures, `checkpoint/` and the adapter files.
        token: A stop keeps a checkpoint first.

    Yields:
        Stage, Progress, Metric and Notice; Artifact of kind "sample", "checkpoint" and "adapter", the latter with the
        name for the library as its label.

    Raises:
        InputError: Pictures, options or checkpoint cannot be used, or the run diverged.
        MemoryLimitError: Memory or disk do not suffice.
        Cancelled: The token was cancelled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    yield Stage(name="prepare", detail="Looking at the pictures")
    collected = data.collect(request.pictures, folder / "pictures")
    plan = resolve(request, model, collected.pictures)
    for text in (*collected.notes, *plan.settings.notices):
        yield Notice(text=text)
    with memory_explained(plan, model.device), closing_down(model):
        yield Stage(name="encode", detail="Encoding pictures and captions")
        cache = yield from encode(model, plan.pictures, plan.prompts, plan.settings, request.seed, token)
        for text in remarks(plan, cache):
            yield Notice(text=text)
        layers = yield from _learn(plan, model, cache, folder, token)
    yield Stage(name="save")
    yield from _write(plan, model, layers, folder)


def resolve(request: TrainRequest, model: Model, pictures: tuple[TrainingPicture, ...]) -> Plan:
    """Check a request against the model and fill in what was left open.

    Raises:
        InputError: Unknown recipe or option, unusable pictures or model.
    """
    recipe = recipes().get(request.recipe)
    if recipe is None:
        raise InputError(f"There is no recipe {request.recipe!r}.", f"Recipes: {', '.join(recipes())}.")
    if not request.name.strip():
        raise InputError("The result needs a name.", "Give one; it becomes the entry in the library.")
    options: TrainingOptions = recipe.options.parse(request.options)
    recipe.check(pictures, options)
    denoiser = model.denoiser
    recipe.targets(model.source.family, trainable_layers(denoiser), options)  # refuses a family before facts are read
    facts = ModelFacts(
        family=model.source.family,
        layers=trainable_layers(denoiser),
        width=max(denoiser.config["block_out_channels"]),
        size=min(model.native_size),
        pictures=len(pictures),
    )
    settings = recipe.settings(facts, options)
    return Plan(request, recipe, options, settings, pictures, recipe.prompts(request.name, pictures, options))


def _learn(
    plan: Plan, model: Model, cache: Cache, folder: Path, token: CancelToken
) -> Generator[Event, None, TrainedLayers]:
    """Attach the layers, train them, take them off again; returns copies of the factors."""
    request, settings, denoiser = plan.request, plan.settings, model.denoiser
    identity = identify(plan, denoiser)
    task = Task(
        plan.recipe, plan.options, settings, cache,
        NoiseSchedule.of(model.components["scheduler"], model.device), request.seed,
    )  # fmt: skip
    prompt = plan.options.sample_prompt or plan.prompts[0]
    sampler = Sampler(prompt, request.seed, plan.options.sample_every, settings.steps, folder, settings.drawing)
    with (
        set_aside(model),
        trainable(denoiser, settings.ranks, settings.scale, request.seed, plan.options.save_memory) as layers,
    ):
        denoiser.to(model.device)  # with CPU offload it may rest on the CPU, its new layers too
        trainer = Trainer(denoiser, layers, task)
        start = 0
        if request.resume_from:
            found = checkpoint.load(Path(request.resume_from))
            start = checkpoint.restore(found, identity, layers.parameters, trainer.adamw)
            yield Notice(text=f"Going on after step {start} of {settings.steps}.")
        keeper = _Keeper(folder / "checkpoint", plan, identity, trainer, start)
        yield from _steps(keeper, sampler, model, token)
        return TrainedLayers(
            {name: nn.Parameter(p.detach().clone()) for name, p in layers.parameters.items()}, layers.scale
        )


def remarks(plan: Plan, cache: Cache) -> Iterator[str]:
    """Say what is odd about the pictures of a run."""
    silent = sum(not prompt for prompt in plan.prompts)
    if silent:
        yield (
            f"{silent} of {len(plan.prompts)} pictures have no caption and there is no trigger: "
            "they change what the model draws when nothing is asked for."
        )
    batch = plan.settings.batch
    sizes = Counter(example.size for example in cache.examples)
    small = sum(count < batch for count in sizes.values())
    if small:
        yield f"{small} of {len(sizes)} sizes have fewer pictures than the batch of {batch}: their batches are smaller."


@dataclass
class _Keeper:
    """Saves the run's state; `done` is the number of steps taken, `kept` that of the last checkpoint."""

    folder: Path
    plan: Plan
    identity: Mapping[str, Any]
    trainer: Trainer
    done: int
    kept: int = -1

    def save(self) -> Iterator[Event]:
        if self.kept == self.done:
            return
        path = checkpoint.save(
            self.folder, self.done, self.identity, self.trainer.layers.parameters, self.trainer.adamw
        )  # fmt: skip
        self.kept = self.done
        yield Artifact(kind="checkpoint", path=str(path), label=f"step {self.done}", step=self.done)


def _steps(keeper: _Keeper, sampler: Sampler, model: Model, token: CancelToken) -> Iterator[Event]:
    """Drive the loop; samples and checkpoints when they are due, and a checkpoint when stopped."""
    every, start = keeper.plan.options.checkpoint_every, keeper.done

    def after(done: int) -> Iterator[Event]:
        keeper.done = done
        if every and done % every == 0:
            yield from keeper.save()
        if sampler.due(done):
            yield from sampler.draw(model, done, token)
            if done < keeper.plan.settings.steps:
                yield Stage(name="train")

    try:
        if start == 0 and sampler.every:
            yield from sampler.draw(model, 0, token)
        yield Stage(name="train", detail=f"{keeper.plan.settings.steps} steps")
        yield from run(keeper.trainer, start, token, after)
    except Cancelled:
        if keeper.done > start:
            yield from keeper.save()
        raise


def identify(plan: Plan, denoiser: nn.Module) -> dict[str, Any]:
    """Say what a run is made of; a checkpoint fits another run only if all of this is equal."""
    settings = {
        field.name: getattr(plan.settings, field.name)
        for field in dataclasses.fields(plan.settings)
        if field.name not in ("steps", "notices", "ranks", "drawing")
    }
    return {
        "recipe": plan.recipe.name,
        "options": {k: v for k, v in plan.options.model_dump(mode="json").items() if k not in FREE},
        "settings": settings,
        "seed": plan.request.seed,
        "pictures": [hashlib.sha256(Path(picture.path).read_bytes()).hexdigest() for picture in plan.pictures],
        "captions": list(plan.prompts),
        "model": fingerprint(denoiser, plan.settings.ranks),
    }


def fingerprint(denoiser: nn.Module, paths: Mapping[str, int]) -> str:
    """Hash the first values of every layer to be trained, as bfloat16: cheap, and the same on every device."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        weight = denoiser.get_parameter(f"{path}.weight")
        values = weight.detach().flatten()[:512].to(torch.bfloat16).view(torch.uint8).cpu()
        digest.update(f"{path}{tuple(weight.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def closing_down(model: Model) -> Generator[None]:
    """Let a model with CPU offload go back to the CPU, whatever happened."""
    try:
        yield
    finally:
        model.rest()


@contextmanager
def memory_explained(plan: Plan, device: torch.device) -> Generator[None]:
    """Turn a failed allocation into a sentence that says what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _memory_error(plan, device, error) from error
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # what torch says on the CPU
            raise
        raise _memory_error(plan, device, error) from error


def _memory_error(plan: Plan, device: torch.device, error: BaseException) -> MemoryLimitError:
    settings = plan.settings
    amount = re.search(r"[\d.]+ [GM]iB|\d+ bytes", str(error))
    ways = [f"the resolution ({settings.resolution})", f"the rank ({max(settings.ranks.values())})"]
    if settings.batch > 1:
        ways.insert(0, f"the batch ({settings.batch})")
    lacking = f" ({amount[0]} more were needed)" if amount else ""
    more = "" if plan.options.save_memory else ", or choose to save memory"
    return MemoryLimitError(
        f"The memory of {device} does not suffice for this training{lacking}.",
        f"Lower {' or '.join(ways)}{more}.",
    )


def _write(plan: Plan, model: Model, layers: TrainedLayers, folder: Path) -> Iterator[Event]:
    """Write one file per part of the recipe."""
    from ..pipelines.adapter_file import write_adapter

    name = plan.request.name.strip()
    safe = re.sub(r"[^\w.-]+", "_", name).strip(".") or "adapter"
    for role, part in plan.recipe.parts(layers.factors("unet.")).items():
        suffix = "" if role == "concept" else f"-{role}"
        path = folder / f"{safe}{suffix}.safetensors"
        write_adapter(path, part, metadata(plan, model, role, name + suffix) | _face(folder))
        yield Artifact(kind="adapter", path=str(path), label=name + suffix, step=plan.settings.steps)


def metadata(plan: Plan, model: Model, role: Role, title: str) -> dict[str, str]:
    """Header texts of a result: what it is, how to call it, and how it was made; no paths of the person's disk."""
    from ..pipelines.adapter_file import card
    from ..pipelines.tool import bare_name

    texts = card(
        model.source.family,
        role=role,
        base=bare_name(model.source.name),
        trigger=plan.recipe.trigger(plan.request.name, plan.options),
        title=title,
        licence=plan.request.licence.strip(),
    )
    if plan.settings.drawing != Drawing():
        texts["intarsia.drawing"] = json.dumps(dataclasses.asdict(plan.settings.drawing))
    return texts | {
        "intarsia.group": plan.request.name.strip(),
        "intarsia.base_layers": fingerprint(model.denoiser, plan.settings.ranks),
        "intarsia.recipe": plan.recipe.name,
        "intarsia.paper": plan.recipe.paper,
        "intarsia.steps": str(plan.settings.steps),
        "intarsia.seed": str(plan.request.seed),
        "intarsia.learning_rate": f"{plan.settings.learning_rate:g}",
        "intarsia.resolution": str(plan.settings.resolution),
        "intarsia.options": plan.options.model_dump_json(),
        "modelspec.resolution": f"{plan.settings.resolution}x{plan.settings.resolution}",
    }


def _face(folder: Path) -> dict[str, str]:
    """The last sample picture as the header's thumbnail, if one was drawn."""
    from ..pipelines.picture import data_url

    samples = sorted(folder.glob("sample-*.png"))
    return {"modelspec.thumbnail": data_url(samples[-1])} if samples else {}
