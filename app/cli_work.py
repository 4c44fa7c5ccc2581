"""The commands that do work: `intarsia generate` and `intarsia train RECIPE`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

from ..pipelines.atomic import replacing
from ..pipelines.errors import InputError
from ..pipelines.events import Artifact, CancelToken, Event, Failed, Stopped
from ..pipelines.options import describe
from ..pipelines.requests import AdapterUse, GenerateRequest, TrainingPicture, TrainRequest
from . import present
from .cli_console import Console, complain, guarded, stopping
from .cli_flags import command, flag, flags, given_values
from .studio import AnyRequest, Job, Studio

MACHINE = flag("machine", bool, "Write events and the result as lines of JSON.", "--json")
ADAPTER = (
    "Library name or file, with :WEIGHT if not 1; may be repeated. Parts of it may have factors of their own, and it "
    "may act in a part of the denoising alone: NAME:0.8@unet.up_blocks.0=0.5,text_encoder=0@0-0.6"
)
GENERATE = tuple(info for info in describe(GenerateRequest) if info.name not in ("kind", "adapters"))
TRAIN = tuple(info for info in describe(TrainRequest) if info.name in ("model", "name", "seed", "licence"))


def add_generate(app: typer.Typer) -> None:
    """Register `generate`."""
    parameters = [
        *flags(GENERATE),
        flag("adapter", list[str], ADAPTER, shown="NAME"),
        flag("out", Path, "Where to write the picture; several are numbered.", shown="FILE"),
        MACHINE,
    ]

    @command(app, "generate", "Make pictures from a prompt.", parameters)
    def generate(given: dict[str, Any]) -> None:
        console = Console(bool(given["machine"]))
        with guarded(console):
            values = given_values(GENERATE, given)
            values["adapters"] = [AdapterUse.read(text) for text in given["adapter"] or ()]
            request = GenerateRequest.parse(values)
            out = _writable_target(given["out"])
            with Studio() as studio:
                job, final, made = work(studio, request, console)
                pictures = _copy_out(made.get("picture", []), out)
                report = {"seed": _request_of(studio, job).seed, "pictures": pictures}
                end(console, job, final, report, "\n".join(pictures))


def add_train(app: typer.Typer) -> None:
    """Register `train`, with one sub-command per recipe that is found."""
    group = typer.Typer(help="Train adapters.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name="train")
    for recipe in Studio.recipes().values():
        _add_recipe(group, recipe.name, recipe.title, recipe.options)


def _add_recipe(group: typer.Typer, name: str, title: str, options: type[Any]) -> None:
    own = describe(options)
    parameters = [
        *flags(TRAIN),
        flag("image", list[Path], "A picture to learn from; may be repeated.", shown="FILE"),
        flag("images", Path, "A folder or a zip of pictures, with captions in .txt files.", shown="PATH"),
        flag("caption", list[str], "What the picture shows: one for all, or one per --image.", shown="TEXT"),
        *flags(own),
        flag(
            "resume",
            str,
            "Go on from a stopped or interrupted job: its id, or the folder of its checkpoint.",
            shown="JOB",
        ),
        MACHINE,
    ]

    @command(group, name, title, parameters)
    def train(given: dict[str, Any]) -> None:
        console = Console(bool(given["machine"]))
        with guarded(console), Studio() as studio:
            values = given_values(TRAIN, given) | {"recipe": name, "options": given_values(own, given)}
            request, parent = _training_request(studio, values, given)
            job, final, made = work(studio, request, console, parent)
            adapters = [{"name": item.label, "path": item.path} for item in made.get("adapter", [])]
            names = ", ".join(item["name"] for item in adapters)
            end(console, job, final, {"adapters": adapters}, f"In the library: {names}")


def _training_request(studio: Studio, values: dict[str, Any], given: Mapping[str, Any]) -> tuple[TrainRequest, str]:
    if given["resume"]:
        job_id = _job_meant(studio, given["resume"])
        if job_id:
            old = studio.resumed(job_id).model_dump()
            return TrainRequest.parse(old | values | {"options": old["options"] | values["options"]}), job_id
        values["resume_from"] = str(Path(given["resume"]).absolute())
    from ..pipelines.picture import open_picture

    for path in given["image"] or ():
        if not path.is_dir() and path.suffix.lower() != ".zip":
            open_picture(path)  # a broken one is named before the model is loaded
    pictures = [TrainingPicture(path=str(path.absolute())) for path in given["image"] or ()]
    if given["images"] is not None:
        pictures += studio.pictures(given["images"])
    captions: list[str] = given["caption"] or []
    if len(captions) == 1:
        captions = captions * len(pictures)
    if captions and len(captions) != len(pictures):
        raise InputError(
            f"There are {len(captions)} captions for {len(pictures)} pictures.", "Give one for all, or one per picture."
        )
    for index, caption in enumerate(captions):
        pictures[index] = TrainingPicture.parse({"path": pictures[index].path, "caption": caption})
    if not pictures:
        raise InputError("There is no picture to learn from.", "Give one with --image, or a folder with --images.")
    return TrainRequest.parse(values | {"pictures": pictures}), ""


def _job_meant(studio: Studio, text: str) -> str:
    """Find the job meant by an id or by the folder of a job; "" for a checkpoint of elsewhere."""
    path = Path(text).absolute()
    known = {job.id for job in studio.jobs(limit=100_000, kind="train")}
    for name in (text, path.name, path.parent.name):
        if name in known:
            return name
    if not path.is_dir():
        raise InputError(f"{text} is neither a job nor a folder with a checkpoint.", "Give a job's id.")
    return ""


def work(
    studio: Studio,
    request: AnyRequest,
    console: Console,
    parent: str = "",
    seen: Callable[[Event], None] = lambda event: None,
) -> tuple[Job, Event, dict[str, list[Artifact]]]:
    """Do a job in this process and show it; gives the job, its last event and its results by kind.

    Args:
        seen: Called with each event once it is shown.
    """
    token = CancelToken()
    made: dict[str, list[Artifact]] = {}
    job = studio.begin(request, parent)
    final: Event | None = None
    with stopping(token, console):
        for event in studio.carry_out(job, token):
            if isinstance(event, Artifact):
                made.setdefault(event.kind, []).append(event)
            if console.machine or not isinstance(event, Failed):  # a failure is told once, at the end
                console.show(event)
            seen(event)
            final = event
    assert final is not None
    return studio.job(job.id), final, made


def end(console: Console, job: Job, final: Event, report: dict[str, Any], text: str) -> None:
    """Write the outcome of a job and leave with its exit code."""
    value: dict[str, Any] = {"job": job.id, "state": job.state, **report}
    if isinstance(final, Failed):
        shown = present.show_failure(final)
        value |= {"code": shown.code, "message": shown.message, "hint": shown.hint}
        complain(shown)
        text = ""
    if isinstance(final, Stopped) and final.resumable:
        value["resumable"] = True
        text = f"Resume it with --resume {job.id}"
    if text or console.machine:
        console.result(value, text)
    code = present.exit_code(final)
    if code:
        raise typer.Exit(code)


def _request_of(studio: Studio, job: Job) -> GenerateRequest:
    request = studio.job(job.id).request
    assert isinstance(request, GenerateRequest)
    return request


def _writable_target(out: Path | None) -> Path | None:
    """Refuse a target before the work rather than after."""
    if out is None:
        return None
    if out.suffix.lower() != ".png":
        raise InputError(f"--out cannot be {out}: pictures are written as PNG.", "Let the name end in .png.")
    if not out.absolute().parent.is_dir():
        raise InputError(f"There is no folder {out.absolute().parent} for --out.", "Make it first.")
    return out


def _copy_out(made: list[Artifact], out: Path | None) -> list[str]:
    if out is None:
        return [item.path for item in made]
    targets = [out] if len(made) == 1 else [out.with_stem(f"{out.stem}-{n}") for n in range(1, len(made) + 1)]
    for item, target in zip(made, targets, strict=True):
        with replacing(target) as temporary:
            shutil.copyfile(item.path, temporary)
    return [str(target) for target in targets]
