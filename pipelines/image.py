"""Pictures from prompts: encode, prepare, the one denoising loop, decode, save; a generator of events."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image

from . import preview, schedule
from .denoise import Stepped, Work, denoise
from .errors import InputError
from .events import Artifact, CancelToken, Event, Metric, Notice, Preview, Progress, Stage
from .hooks import StepHook
from .models import Model
from .picture import write_png
from .requests import MAX_SEED, GenerateRequest
from .text import words_left_out

if TYPE_CHECKING:
    from .attach import Attachment


def generate(
    request: GenerateRequest,
    model: Model,
    attachments: Sequence[Attachment],
    out: Path,
    scratch: Path,
    token: CancelToken,
    hooks: Sequence[StepHook] = (),
) -> Iterator[Event]:
    """Make the pictures of a request.

    Args:
        request: With a seed; picture i uses seed + i and is the picture that seed gives alone.
        model: Loaded.
        attachments: The request's adapters, read.
        out: Folder the pictures go to, numbered.
        scratch: Folder for previews.
        token: Checked before every step and between the stages.
        hooks: Hang on every step of every picture.

    Yields:
        Stages, progress over all steps of all pictures, a preview and the rate at every step, and the pictures.

    Raises:
        InputError: The size or the scheduler does not fit the model.
        Cancelled: A stop was asked for; pictures that were finished stay.
    """
    size = picture_size(request, model)
    sampler = schedule.make(request.scheduler, model.components["scheduler"], model.spec)
    schedule.check_steps(sampler, request.steps)  # refuse before any work
    for text in (*model.notes, *notices(request, model)):
        yield Notice(text=text)
    with ExitStack() as stack:
        stack.callback(model.rest)
        if attachments:
            yield Stage(name="attach", detail=", ".join(attachment.name for attachment in attachments))
            from .learned_words import taught

            stack.enter_context(taught(model.components, attachments))
            matched, more = _put_on(stack, request, model, attachments)
            hooks = (*more, *hooks)
            for text in matched.values():
                yield Notice(text=f"{text}.")
        token.check()
        yield Stage(name="encode", detail=request.prompt[:80])
        prompt = model.engine.encode(request.prompt, request.negative, request.guidance)
        colours = model.colours
        for number in range(request.count):
            token.check()
            single = request.model_copy(
                update={
                    "seed": (request.seed + number) % (MAX_SEED + 1), "count": 1, "width": size[0], "height": size[1]
                }
            )  # fmt: skip
            generator = torch.Generator().manual_seed(single.seed)
            sampler = schedule.make(request.scheduler, model.components["scheduler"], model.spec)
            work = model.engine.begin(prompt, size, request.steps, sampler, generator)
            label = f"picture {number + 1} of {request.count}" if request.count > 1 else ""
            watch = Watch(model, work, size, scratch, number, request.count, label)
            yield Stage(name="denoise", detail=f"picture {number + 1} of {request.count}, seed {single.seed}")
            latents = work.latents
            for stepped in denoise(work, token, hooks):
                latents = stepped.latents
                yield from watch.events(stepped, colours)
            token.check()
            yield Stage(name="decode")
            image = model.engine.decode(latents, size)[0]
            path = save(image, out, single)
            yield Artifact(kind="picture", path=str(path), label=f"seed {single.seed}", step=number)
    yield Metric(name="memory", value=float(peak_memory(model.device)), step=request.count)


def _put_on(
    stack: ExitStack, request: GenerateRequest, model: Model, attachments: Sequence[Attachment]
) -> tuple[Mapping[str, str], tuple[StepHook, ...]]:
    """Merge the adapters or hang them on, until the stack is left; gives what matched, and the hooks they need."""
    if request.merge:
        from .merged import merged

        return stack.enter_context(merged(model.components, attachments)), ()
    from .attach import attached
    from .step_ranges import StepRanges

    branches = stack.enter_context(attached(model.components, attachments))
    return branches.matched, (StepRanges(branches, attachments),)


def render(
    model: Model,
    prompt: str,
    negative: str = "",
    seed: int = 0,
    steps: int = 20,
    guidance: float = 5.0,
    size: tuple[int, int] | None = None,
    hooks: Sequence[StepHook] = (),
) -> list[Image.Image]:
    """Make one picture without files or events, with whatever is attached to the model right now.

    Args:
        model: Loaded.
        prompt: What it shows.
        negative: What it must not show.
        seed: Everything random follows from it.
        steps: Denoising steps.
        guidance: Guidance scale.
        size: (width, height) in pixels; the model's own if None.
        hooks: Hang on every step; one that raises Cancelled stops the picture.

    Returns:
        The picture, alone in a list.
    """
    engine = model.engine
    size = size or model.native_size
    sampler = schedule.make("default", model.components["scheduler"], model.spec)
    encoded = engine.encode(prompt, negative, guidance)
    work = engine.begin(encoded, size, steps, sampler, torch.Generator().manual_seed(seed))
    latents = work.latents
    for stepped in denoise(work, CancelToken(), hooks):
        latents = stepped.latents
    images = engine.decode(latents, size)
    model.rest()
    return images


class Sized(Protocol):
    """A request for pictures of a size."""

    @property
    def width(self) -> int | None: ...
    @property
    def height(self) -> int | None: ...


def picture_size(request: Sized, model: Model) -> tuple[int, int]:
    """Give (width, height) in pixels: as asked for, else the model's own.

    Raises:
        InputError: A side is not a multiple of what the family needs.
    """
    native = model.native_size
    size = (request.width or native[0], request.height or native[1])
    step = model.spec.pixel_step
    for field, side in zip(("width", "height"), size, strict=True):
        if side % step:
            near = max(step, round(side / step) * step)
            raise InputError(
                f"{field.capitalize()} cannot be {side}: {model.spec.title} needs multiples of {step} pixels.",
                f"Try {near}.",
            )
    return size


def notices(request: GenerateRequest, model: Model) -> Iterator[str]:
    """Say what of a request this model cannot use."""
    for what, text in (("prompt", request.prompt), ("negative prompt", request.negative)):
        left = words_left_out(model.spec, model.components, text)
        if left:
            yield f"The {what} is longer than the model reads: its last {left} words were left out."
    if request.negative and not model.spec.negative:
        yield f"{model.spec.title} takes no negative prompt; it was not used."
    elif request.negative and request.guidance <= 1:
        yield "The negative prompt was not used: it needs a guidance above 1."
    if not model.spec.negative and not model.denoiser.config.get("guidance_embeds"):
        yield "This model was distilled without guidance; the guidance was not used."


class Watch:
    """Turns the steps of one picture into events.

    Args:
        model: That draws.
        work: The picture's.
        size: (width, height) in pixels.
        scratch: Folder of previews.
        number: Of the picture, from 0, among `count`.
        label: Of its previews.
    """

    def __init__(
        self, model: Model, work: Work, size: tuple[int, int], scratch: Path, number: int, count: int, label: str = ""
    ) -> None:
        self._engine = model.engine
        self._scheduler = work.scheduler
        self._size = size
        self._scratch = scratch
        self._number = number
        self._count = count
        self._label = label
        self._last = time.perf_counter()

    def events(self, stepped: Stepped, colours: preview.LatentColours) -> Iterator[Event]:
        now = time.perf_counter()
        done, total = stepped.index + 1, stepped.total
        overall = self._number * total + done
        yield Progress(stage="denoise", step=overall, total=self._count * total)
        yield Metric(name="rate", value=1 / max(now - self._last, 1e-9), step=overall)
        clean = schedule.denoised(self._scheduler, stepped.prediction, stepped.before, stepped.sigma)
        image = colours.picture(self._engine.spatial(clean, self._size))
        path = preview.save(image, self._scratch, overall)
        yield Preview(path=str(path), step=overall, label=self._label)
        self._last = time.perf_counter()


def save(image: Image.Image, out: Path, request: GenerateRequest, extra: Mapping[str, Any] | None = None) -> Path:
    """Write a picture with its settings, and more that is to be kept with them, under the next free number."""
    taken = [int(path.name[:5]) for path in out.glob("[0-9][0-9][0-9][0-9][0-9]-*.png")]
    number = max(taken, default=0) + 1
    while True:
        path = out / f"{number:05d}-{request.seed}.png"
        try:
            path.open("xb").close()  # reserved: another process may be saving into the same folder
            break
        except FileExistsError:
            number += 1
    try:
        return write_png(image, path, request, extra)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: on an accelerator by tensors, on the CPU by the process."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss
