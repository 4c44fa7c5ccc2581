"""What a bench is. A bench is one file in `benches/` that defines `BENCH`; no heavy imports at its top."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ...pipelines.atomic import replacing
from ...pipelines.events import CancelToken, Event
from ...pipelines.plugins import discover
from ..settings import Home
from .options import EvaluationOptions
from .records import Records

if TYPE_CHECKING:
    from PIL import Image

    from ...pipelines.judge import Judge
    from ...pipelines.models import Model
    from ...training.pictures import Pictures

Cell = str | float | int
Figure = float | int | str


@dataclass(frozen=True)
class Table:
    """Rows under named columns.

    Args:
        rows: Cells; numbers are aligned, text is written as it is ("0.81 ± 0.02" counts as a number).
        note: One or two sentences under the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        wrong = [row for row in self.rows if len(row) != len(self.columns)]
        assert not wrong, f"{self.title}: {wrong[0]} has not the {len(self.columns)} cells of {self.columns}"


@dataclass(frozen=True)
class Sheet:
    """Pictures in rows.

    Args:
        paths: Picture files, row by row.
        captions: One per picture; "" for none.
        across: Pictures in a row.
    """

    title: str
    paths: tuple[Path, ...]
    captions: tuple[str, ...]
    across: int
    note: str = ""

    def __post_init__(self) -> None:
        assert len(self.paths) == len(self.captions), f"{self.title}: one caption per picture"
        assert self.across > 0, f"{self.title}: a row holds at least one picture"


@dataclass(frozen=True)
class Summary:
    """What a bench found.

    Args:
        notes: Sentences that say how to read it: sample sizes, what falls short.
        figures: Everything measured by name, for `summary.json`; the first six head the page.
    """

    title: str
    tables: tuple[Table, ...]
    sheets: tuple[Sheet, ...] = ()
    notes: tuple[str, ...] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict[str, Figure])


@dataclass
class Place:
    """Where a bench works and what it works with.

    Args:
        out: Folder of this evaluation; pictures go to its `pictures`.
        home: The studio's home; what several evaluations share (trained adapters) is cached under it.
        pictures: The real pictures.
        model: Loaded.
        judge: Loaded.
        records: What was measured so far; a resumed run finds its rows here.
        token: To be checked at least once per picture.
    """

    out: Path
    home: Home
    pictures: Pictures
    model: Model
    judge: Judge
    records: Records
    token: CancelToken

    def path(self, name: str) -> Path:
        """Where the picture called `name` (slashes make folders) lies or will lie."""
        return self.out / "pictures" / f"{name}.png"

    def keep(self, name: str, picture: Image.Image) -> Path:
        """Save a picture as PNG; gives its path."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            picture.save(temporary, format="PNG")
        return path


O_contra = TypeVar("O_contra", bound=EvaluationOptions, contravariant=True)


class Bench(Protocol[O_contra]):
    """A way to measure a model.

    `options` is the frozen `EvaluationOptions` class of the bench; everything it declares becomes a flag.
    """

    name: str
    title: str
    options: type[Any]

    def run(self, options: O_contra, place: Place) -> Iterator[Event]:
        """Measure; every row goes to `place.records` at once, and what has a row is not measured again.

        The last event is not this generator's: who drives it adds `Done` or `Stopped`.
        """
        ...

    def summarise(self, options: O_contra, place: Place) -> Summary:
        """Build the report from the records (and the pictures kept) alone."""
        ...


@cache
def benches() -> dict[str, Bench[Any]]:
    """Every bench by name."""
    from . import benches as folder

    return discover(folder, "BENCH")
