"""The layout of a picture: who stands where, in which words, and how it is composed. Torch-free.

One schema serves the layout file (YAML or JSON), the page, the command line and the job store.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, cast

from pydantic import Field, field_validator, model_validator

from ..pipelines.boxes import Box
from ..pipelines.errors import InputError
from ..pipelines.options import Options, option
from ..pipelines.requests import MAX_SEED, SCHEDULERS, AdapterUse

VERSION = 1
MOST_CONCEPTS = 10
SUFFIXES = (".yaml", ".yml", ".json")


class ConceptUse(AdapterUse):
    """One concept: an adapter, its words, and its place as a box or as a mask.

    `box` is left, top, right, bottom in fractions of the canvas; `mask` is a picture whose white is the concept's
    place, of the canvas' own shape; with both, the mask counts. Without either the concept has no place of its own.
    """

    name: str = option("", label="Name", help="Empty: the adapter's. Names must differ.", high=80)
    prompt: str = option("", label="Prompt", help="What its place shows, such as 'a cat, noto style'.", high=2000)
    words: str = option(
        "", label="Words", help="Its words in the prompt of the whole. Empty: its own prompt up to the comma.", high=500
    )
    box: Box | None = None
    mask: str = option("", label="Mask", help="A picture; white is the concept's place.", high=1000)
    order: int = option(0, label="Order", help="Higher lies on top; of equal ones the later.", low=-100, high=100)

    @property
    def called(self) -> str:
        """The name, given or taken from the adapter."""
        return self.name or Path(self.adapter).stem

    @property
    def phrase(self) -> str:
        """The words it has in the prompt of the whole."""
        return (self.words or self.prompt.partition(",")[0]).strip()

    @property
    def plain(self) -> AdapterUse:
        """The adapter alone."""
        return AdapterUse(**self.model_dump(include=set(AdapterUse.model_fields)))

    @property
    def placed(self) -> bool:
        return self.box is not None or bool(self.mask)

    @field_validator("box", mode="before")
    @classmethod
    def _four(cls, box: object) -> object:
        if box is None or (isinstance(box, list | tuple) and len(cast(list[object], box)) == 4):
            return box
        raise ValueError("give four fractions: left, top, right, bottom")

    @field_validator("box")
    @classmethod
    def _inside(cls, box: Box | None) -> Box | None:
        if box is None:
            return None
        left, top, right, bottom = box
        if not (left < right and top < bottom):
            raise ValueError("it is empty: left must be less than right, top less than bottom")
        if left < 0 or top < 0 or right > 1 or bottom > 1:
            raise ValueError("it reaches outside the canvas: give fractions from 0 to 1")
        return box


class MethodUse(Options):
    """One way to compose; `options` are those of the method's own class."""

    method: str
    options: dict[str, Any] = Field(default_factory=dict)


class ComposeRequest(Options):
    """Compose one picture per method and seed."""

    kind: Literal["compose"] = "compose"
    version: int = option(VERSION, label="Version", help="Of the layout's schema.", low=1, high=VERSION)
    model: str = option("mini", label="Model", help="Mini, a folder, a .safetensors checkpoint or a hub id.", low=1)
    width: int | None = option(
        None, label="Width", help="Empty: the model's own size.", low=16, high=4096, multiple_of=8, unit="pixels"
    )
    height: int | None = option(
        None, label="Height", help="Empty: the model's own size.", low=16, high=4096, multiple_of=8, unit="pixels"
    )
    prompt: str = option("", label="Prompt", help="The whole picture. Empty: the concepts' own, joined.", high=2000)
    negative: str = option("", label="Negative prompt", help="What the picture must not show.", high=2000)
    styles: tuple[AdapterUse, ...] = ()
    concepts: tuple[ConceptUse, ...] = ()
    methods: tuple[MethodUse, ...] = (MethodUse(method="region"),)
    seeds: tuple[int, ...] = (0,)
    steps: int = option(20, label="Steps", help="Denoising steps.", low=1, high=200, unit="steps")
    guidance: float = option(5.0, label="Guidance", help="How strictly to follow the prompt.", low=0, high=30)
    scheduler: SCHEDULERS = option("default", label="Scheduler", help="Sampler; default is the model's own.")
    together: int | None = option(
        None, label="At once", help="Most predictions in one batch, where memory is short. Empty: all.", low=1, high=64
    )
    score: bool = option(False, label="Score", help="Let the judge look who is present, himself, and mistaken.")

    @property
    def said(self) -> str:
        """The prompt of the whole picture."""
        return self.prompt.strip() or ", ".join(use.prompt for use in self.concepts if use.prompt)

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds:
            raise ValueError("give at least one")
        if any(not 0 <= seed <= MAX_SEED for seed in seeds):
            raise ValueError(f"they go from 0 to {MAX_SEED}")
        if len(set(seeds)) < len(seeds):
            raise ValueError("one is given twice")
        return seeds

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [use.called for use in (*self.concepts, *self.styles_named())]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two concepts or styles are called {twice[0]}; give them names that differ")
        if len(self.concepts) > MOST_CONCEPTS:
            raise ValueError(f"there are {len(self.concepts)} concepts; at most {MOST_CONCEPTS} go into one picture")
        used = [use.method for use in self.methods]
        if not used or len(set(used)) < len(used):
            raise ValueError("name each method once" if used else "name a method")
        return self

    def styles_named(self) -> tuple[ConceptUse, ...]:
        """The styles as if they were concepts without a place."""
        return tuple(ConceptUse(**use.model_dump()) for use in self.styles)


def read_layout(path: Path) -> ComposeRequest:
    """Read a layout file; paths of masks and adapter files in it are relative to its folder.

    Besides the schema's own keys it may hold `method` and `options` for a single method, and `canvas: {width, height}`.

    Raises:
        InputError: It is missing, no YAML or JSON, or not by the schema; says what is wrong.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path.name} is no layout file.", "Layouts end in .yaml or .json.")
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise InputError(f"There is no layout {path}.", "Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path.name} cannot be read: {error}.", "Save it as UTF-8 text.") from None
    return parse_layout(_table(text, path), path.absolute().parent)


def parse_layout(values: Mapping[str, Any], folder: Path | None = None) -> ComposeRequest:
    """Validate what a layout file holds.

    Args:
        values: By name.
        folder: Relative paths of files start here, if these exist there.

    Raises:
        InputError: As `ComposeRequest.parse`.
    """
    table = dict(values)
    canvas = table.pop("canvas", None)
    if isinstance(canvas, Mapping):
        table = dict(cast(Mapping[str, Any], canvas)) | table
    if "method" in table:
        if "methods" in table:
            raise InputError("The layout names both method and methods.", "Keep one of them.")
        table["methods"] = [{"method": table.pop("method"), "options": table.pop("options", {})}]
    request = ComposeRequest.parse(table)
    if folder is None:
        return request
    concepts = tuple(
        use.model_copy(update={"adapter": _beside(folder, use.adapter), "mask": _beside(folder, use.mask)})
        for use in request.concepts
    )
    styles = tuple(use.model_copy(update={"adapter": _beside(folder, use.adapter)}) for use in request.styles)
    return request.model_copy(update={"concepts": concepts, "styles": styles})


def write_layout(request: ComposeRequest, as_json: bool = False) -> str:
    """Give the text of a layout file that reads as this request, with nothing in it that is as usual."""
    table = request.model_dump(mode="json", exclude_defaults=True, exclude={"kind"})
    table = {"version": request.version, **table}
    if as_json:
        return json.dumps(table, indent=1)
    import yaml

    return yaml.safe_dump(table, sort_keys=False, allow_unicode=True)


def _table(text: str, path: Path) -> dict[str, Any]:
    import yaml

    try:  # JSON is YAML too
        found: object = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark: Any = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        raise InputError(f"{path.name} is no YAML that can be read{where}.", "Check its indents and quotes.") from None
    if not isinstance(found, dict):
        raise InputError(f"{path.name} holds no layout.", "It wants keys such as prompt, concepts and method.")
    return cast(dict[str, Any], found)


def _beside(folder: Path, name: str) -> str:
    """Make a relative path that exists beside the layout absolute; leave library names as they are."""
    if not name:
        return name
    candidate = folder / Path(name).expanduser()
    return str(candidate) if candidate.is_file() else name
