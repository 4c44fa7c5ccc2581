"""The one service layer: page, command line and tests all work through `Studio`. Imports nothing heavy."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..pipelines.errors import InputError
from ..pipelines.events import FINAL, CancelToken, Event
from ..pipelines.requests import (
    TrainingPicture,
    TrainRequest,
)
from ..training.recipe import TrainingRecipe, recipes
from .jobs import Job, JobKind, JobState, JobStore, checkpoint_of
from .library_entry import Change, Query
from .processes import this_process
from .requests import AnyRequest
from .settings import Home

if TYPE_CHECKING:
    from ..composition.method import CompositionMethod
    from ..composition.retrieval import Found
    from ..pipelines.block_groups import BlockGroup
    from ..pipelines.convert import Converted
    from ..pipelines.identify import Report
    from ..pipelines.measure import FileMeasure
    from ..pipelines.pickles import Unpickled
    from ..pipelines.picture import Restored
    from ..pipelines.tool import Tool
    from .doctor import Check
    from .evaluation.bench import Bench
    from .library_entry import Outcome
    from .library_watch import FolderWatch
    from .model_list import ModelInfo
    from .shelf import Entry, Shelf
    from .watchdog import Watchdog

__all__ = ["AnyRequest", "Change", "Job", "JobKind", "JobState", "Query", "Studio"]

POLL = 0.1  # seconds between two looks at a job's events
REAP_EVERY = 0.5


class Studio:
    """Everything a person can do, without a page.

    Args:
        home: Where everything is kept; the default home if None.
        linger: Seconds an idle worker stays after the last page is gone.
    """

    def __init__(self, home: Home | None = None, linger: float = 10.0) -> None:
        self.home = home or Home.default()
        self.store = JobStore(self.home)
        self._linger = linger
        self._watchdog: Watchdog | None = None
        self._folders: FolderWatch | None = None
        self._reaped = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> Self:
        """Start or adopt the worker, watch over it and over the library's folders until `close`."""
        from .library_watch import FolderWatch
        from .watchdog import Watchdog

        if self._watchdog is None:
            self._watchdog = Watchdog(self.store, self._linger)
            self._watchdog.start()
            self._folders = FolderWatch(self.shelf)
            self._folders.start()
        return self

    def close(self) -> None:
        """Stop watching; a worker ends its job and then leaves on its own."""
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None
        if self._folders is not None:
            self._folders.stop()
            self._folders = None
        self.store.close()

    # Jobs

    def check(self, request: AnyRequest) -> AnyRequest:
        """Refuse what cannot be done, without doing anything; gives the request completed.

        Raises:
            IntarsiaError: As `submit`.
        """
        return self._checked(request)

    def submit(self, request: AnyRequest) -> Job:
        """Check a request cheaply, complete it (seed) and queue it.

        Raises:
            IntarsiaError: The model, the recipe, its options, a picture or an adapter cannot be used.
        """
        return self.store.submit(self._checked(request))

    def begin(self, request: AnyRequest, parent: str = "") -> Job:
        """Check a request and record it as a job that this process does itself, with `carry_out`."""
        return self.store.submit(self._checked(request), owner=this_process(), parent=parent)

    def carry_out(self, job: Job, token: CancelToken | None = None) -> Iterator[Event]:
        """Do a job begun in this process; ends with its final event."""
        from .runner import run_here

        return run_here(self.store, self.shelf, job, token or CancelToken())

    def run(self, request: AnyRequest, token: CancelToken | None = None) -> Iterator[Event]:
        """Do a job in this process, recorded in the store like any other; ends with its final event.

        Raises:
            IntarsiaError: As `submit`, before the first event.
        """
        return self.carry_out(self.begin(request), token)

    def cancel(self, job_id: str) -> None:
        """Ask a job to stop."""
        self.store.cancel(job_id)

    def resume(self, job_id: str) -> Job:
        """Queue a new job that goes on from the checkpoint of an old one.

        Raises:
            InputError: The job is not over, or it kept no checkpoint.
        """
        return self.store.submit(self._checked(self.resumed(job_id)), parent=job_id)

    def resumed(self, job_id: str) -> TrainRequest:
        """Give the request that goes on where a job stopped."""
        job = self.job(job_id)
        checkpoint = checkpoint_of(job)
        if not job.finished_already:
            raise InputError(f"Job {job_id} is still {job.state}.", "Stop it first, or wait for its end.")
        if checkpoint is None or not isinstance(job.request, TrainRequest):
            raise InputError(f"Job {job_id} kept no checkpoint to resume from.", "Start it again from the beginning.")
        return job.request.model_copy(update={"resume_from": str(checkpoint)})

    def job(self, job_id: str) -> Job:
        self._reap()
        return self.store.job(job_id)

    def jobs(self, limit: int = 50, kind: JobKind | None = None, state: JobState | None = None) -> list[Job]:
        """List jobs, newest first."""
        self._reap()
        return self.store.jobs(limit, kind, state)

    def events(self, job_id: str, after: int = 0) -> list[tuple[int, Event]]:
        """Give the numbered events above `after` that are there now."""
        return self.store.events(job_id, after)

    def follow(self, job_id: str, after: int = 0) -> Iterator[tuple[int, Event]]:
        """Give a job's events from the first above `after`, waiting for more, until its final one."""
        while True:
            over = self.job(job_id).finished_already  # read before the events: none can come after
            for number, event in self.events(job_id, after):
                after = number
                yield number, event
                if isinstance(event, FINAL):
                    return
            if over:
                return
            time.sleep(POLL)

    def comparison(self, job_id: str) -> dict[str, Any] | None:
        """Read the report of a composition, rewritten after each of its pictures; None while there is none."""
        try:
            return json.loads((self.job(job_id).folder / "comparison.json").read_text("utf-8"))
        except FileNotFoundError:
            return None

    def evaluate(
        self, name: str, options: Mapping[str, Any], out: Path | None = None, token: CancelToken | None = None
    ) -> Iterator[Event]:
        """Run a bench in this process, or go on with one that was stopped; ends with its final event.

        Args:
            name: Of the bench.
            options: The bench's options; those left out have their defaults.
            out: Folder for records, pictures and report; one under the home if None.
            token: Stops it.

        Raises:
            IntarsiaError: No such bench, or an option, the model or the pictures cannot be used.
        """
        from .evaluation.run import default_out, evaluate

        bench = self.benches().get(name)
        if bench is None:
            raise InputError(f"There is no bench {name!r}.", f"Benches: {', '.join(self.benches())}.")
        chosen = bench.options.parse(options)
        where = default_out(self.home, name, chosen) if out is None else out.absolute()
        return evaluate(bench, chosen, where, self.home, token or CancelToken())

    # What there is

    @cached_property
    def shelf(self) -> Shelf:
        """The library of adapters."""
        from .shelf import Shelf

        return Shelf(self.home)

    def convert_adapter(self, file: str, to: str, out: Path) -> Converted | Unpickled:
        """Write an adapter (a library name or a file) in another trainer's spelling, or a pickle as safetensors.

        Raises:
            IntarsiaError: It cannot be used or converted, or there is no such spelling.
        """
        from ..pipelines.convert import convert
        from ..pipelines.pickles import is_pickle, unpickle

        if is_pickle(path := Path(file).expanduser()):
            if to not in ("", "safetensors"):
                text = f"{path.name} is a pickle, whose names are kept as they are."
                raise InputError(text, "Leave --to out, then convert the result.")
            return unpickle(path, out.absolute())
        if to not in ("kohya", "diffusers", "peft"):
            raise InputError(f"There is no spelling {to!r}.", "Write --to kohya, --to diffusers or --to peft.")
        return convert(self.shelf.find(file).path, to, out.absolute())

    def import_adapter(self, path: Path, name: str | None = None, replace: bool = False) -> Entry:
        """Check an adapter file and copy it into the library; a whole B-LoRA brings its two halves along.

        A name that was chosen must be free (or `replace`d); a file's own name, often the same in every folder, gets a
        number where it is taken.
        """
        entry = self.shelf.add(path, name=name, replace=replace, numbered=name is None)
        self._split(entry)
        return entry

    @staticmethod
    def adapter_files(paths: Iterable[Path]) -> list[Path]:
        """Give the files among some paths as they are, and for each folder the adapter files in it and below."""
        from .library_checks import adapter_files

        return list(adapter_files(paths))

    def import_adapters(self, paths: Iterable[Path], family: str = "") -> Iterator[Outcome]:
        """Import many files and what folders hold; a refused one keeps no other out, and tells why.

        Args:
            paths: Files and folders.
            family: What a person says they are for, "" for what the files tell.
        """
        for outcome in self.shelf.add_all(paths, family):
            if outcome.entry is not None:
                self._split(outcome.entry)
            yield outcome

    def _split(self, entry: Entry) -> None:
        if len(entry.halves) == 2 and not self.shelf.group(entry.name):
            self.shelf.split(entry.name)

    def measure(self, name: str) -> FileMeasure:
        """Measure every layer of an entry of the library, or of a file.

        Raises:
            AdapterError: There is no such adapter, or it cannot be read without its model.
        """
        from ..pipelines.measure import measure_file

        return measure_file(self.shelf.find(name).path)

    def block_groups(self, name: str) -> tuple[BlockGroup, ...]:
        """Say which parts of a model an entry of the library, or a file, changes.

        Raises:
            AdapterError: There is no such adapter, or it cannot be read.
        """
        from ..pipelines.block_groups import groups_of_file

        return groups_of_file(self.shelf.find(name).path)

    def suggest(self, prompt: str, model: str = "mini", count: int = 5) -> tuple[Found, ...]:
        """Rank the adapters of the library by how near their words are to a prompt's.

        Raises:
            IntarsiaError: The model cannot be loaded, or the prompt is empty.
        """
        from .suggest import suggest

        return suggest(self.shelf, prompt, model, count)

    def models(self) -> list[ModelInfo]:
        """List the models that are at hand: Mini, those in the home's `models` folder, those used before."""
        from .model_list import list_models

        return list_models(self.store)

    def model(self, name: str) -> ModelInfo:
        """Say what is known of one model."""
        from .model_list import describe_model

        return describe_model(name)

    @staticmethod
    def recipes() -> dict[str, TrainingRecipe[Any]]:
        """Every way to train, by name."""
        return recipes()

    @staticmethod
    def tools() -> dict[str, Tool[Any]]:
        """Everything that can be done with adapter files, by name."""
        from ..pipelines.tool import tools

        return tools()

    @staticmethod
    def methods() -> dict[str, CompositionMethod[Any]]:
        """Every way to compose, by name."""
        from ..composition.method import methods

        return methods()

    @staticmethod
    def benches() -> dict[str, Bench[Any]]:
        """Every way to measure a model, by name."""
        from .evaluation.bench import benches

        return benches()

    def inspect(self, name_or_path: str | Path, model: str = "", family: str = "") -> Report:
        """Say everything about a library entry or an adapter file that is not in the library.

        Args:
            name_or_path: Which.
            model: Whose modules to match it with; "" for the family's usual ones.
            family: Hold it against this one, whatever the file seems to be.
        """
        from ..pipelines.identify import inspect
        from ..pipelines.sources import resolve, unet_shapes

        if not model:
            return self.shelf.inspect(name_or_path, family)
        path = Path(name_or_path).expanduser()
        return inspect(path if path.is_file() else self.shelf.find(name_or_path).path, unet_shapes(resolve(model)))

    def store_upload(self, path: Path) -> Path:
        """Check a picture or unpack a zip of pictures, and keep a copy under the home; gives the file or folder."""
        from .uploads import store_upload

        return store_upload(self.home, path)

    def pictures(self, path: Path) -> tuple[TrainingPicture, ...]:
        """Collect the training pictures of a picture file, a folder or a zip, with captions from .txt files."""
        from .uploads import pictures_of

        return pictures_of(self.home, path)

    def restore(self, path: Path) -> Restored:
        """Read the settings a picture was made with."""
        from ..pipelines.picture import read_settings

        return read_settings(path)

    def doctor(self) -> list[Check]:
        """Look at everything the studio needs, and say what to do where something is missing."""
        from .doctor import examine

        return examine(self.home)

    # Inside

    def _checked(self, request: AnyRequest) -> AnyRequest:
        from .checked import checked

        return checked(request, self.shelf)

    def _reap(self) -> None:
        if self._watchdog is None and time.monotonic() - self._reaped > REAP_EVERY:
            self._reaped = time.monotonic()
            self.store.reap()
