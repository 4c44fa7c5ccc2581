"""Files on their way into the library: checked, identified, and described as an entry."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..pipelines.architectures import reference
from ..pipelines.errors import AdapterError, InputError
from ..pipelines.identify import YARDSTICKS, Report, inspect
from . import library_pictures as pictures
from .library_entry import MAX_LINE, MAX_NOTES, Entry
from .library_index import Index
from .library_sidecars import Sidecar, beside, text
from .settings import Home

FAMILIES = tuple(dict.fromkeys(family for family, _ in YARDSTICKS.values()))
ENDING = ".safetensors"


@dataclass(frozen=True)
class Checked:
    """A file that can be used: what it is, what stands beside it, its picture in the library."""

    path: Path
    report: Report
    side: Sidecar
    thumbnail: Path | None


def examine(index: Index, path: Path) -> Report:
    """Inspect a file; where a person once said its family, that counts.

    Raises:
        AdapterError: It is no sound safetensors file, or cannot be read.
    """
    try:
        report = inspect(path)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror or error}.", "Check its permissions.") from None
    with index.reading() as db:
        asked = "SELECT family FROM library_decisions WHERE tensor_sha256 = ?"
        row = db.execute(asked, (report.tensor_sha256,)).fetchone()
    return inspect_as(report, row["family"]) if row else report


def inspect_as(report: Report, family: str) -> Report:
    """Hold a file against the family a person says it is for; one that contradicts its shapes makes it unusable.

    Args:
        report: What inspection alone said.
        family: One of `FAMILIES`.

    Raises:
        InputError: There is no such family.
    """
    if family not in FAMILIES:
        raise InputError(f"There is no family {family!r}.", f"Families: {', '.join(FAMILIES)}.")
    if report.refusal or (report.family == family and report.confidence == "certain"):
        return report
    if report.family == family:
        return replace(report, confidence="certain", reason="a person said so", warnings=_sure(report))
    known = [name for name, (of, _) in YARDSTICKS.items() if of == family and name != "mini"]
    against = max((inspect(report.path, reference(name).shapes) for name in known), key=lambda one: one.matched)
    if not against.refusal:
        return replace(against, reason="a person said so", warnings=_sure(against))
    titles = {of: title for _, (of, title) in reversed(YARDSTICKS.items())}
    fits = f"{against.matched} of {against.modules} layers fit"
    first = next(iter((*against.misfits, *(f"no module {name}" for name in against.unmatched))), "no layer is known")
    sentence = f"{report.path.name} cannot be for {titles[family]}: {fits}, first {first}."
    return replace(report, refusal=sentence, hint=f"By its shapes it is for {titles.get(report.family, 'no family')}.")


def _sure(report: Report) -> tuple[str, ...]:
    return tuple(warning for warning in report.warnings if not warning.startswith("It may be for "))


def remember(index: Index, report: Report, family: str) -> None:
    """Keep which family a person says a file is for.

    Raises:
        AdapterError: It cannot be, or the file cannot be used at all.
    """
    report.require_usable()
    with index.writing() as db:
        db.execute("INSERT OR REPLACE INTO library_decisions VALUES (?, ?)", (report.tensor_sha256, family))


def check(index: Index, path: Path, thumbnail: Path | None = None, family: str = "") -> Checked:
    """Check that a file can be used, and collect what comes with it.

    Args:
        index: Of the library.
        path: The file.
        thumbnail: A picture to show; without it what came with the file.
        family: What a person says it is for, which is remembered; "" for what the file tells.

    Raises:
        AdapterError: It cannot.
        InputError: The thumbnail cannot be read, or there is no such family.
    """
    report = examine(index, path)
    if family:
        report = inspect_as(report, family)
        remember(index, report, family)
    report.require_usable()
    side = beside(path)
    inside = report.metadata.get("modelspec.thumbnail")
    return Checked(path, report, side, pictures.store(index.home, report.sha256, thumbnail, side.picture, inside))


def describe(checked: Checked, name: str, source: str, group: str = "") -> Entry:
    """Make an entry of what a file and its company say; what a person wrote beside it comes first."""
    report, side = checked.report, checked.side
    said = report.metadata
    return Entry(
        name=name,
        path=checked.path,
        family=report.family,
        algorithm=report.algorithm,
        rank=report.rank,
        role=report.role,
        trigger=side.trigger or report.trigger,
        sha256=report.sha256,
        base=report.base or side.base,
        modules=report.modules,
        matched=report.matched,
        size=report.size,
        created=time.time(),
        group=group,
        halves=report.halves,
        triggers=tuple(dict.fromkeys((*side.triggers, *report.triggers))),
        warnings=report.warnings,
        thumbnail=checked.thumbnail,
        tags=side.tags,
        notes=side.notes,
        licence=side.licence or text(said.get("modelspec.license"), MAX_LINE),
        title=side.title or text(said.get("modelspec.title"), MAX_LINE),
        author=text(said.get("modelspec.author"), MAX_LINE),
        description=side.description or text(said.get("modelspec.description"), MAX_NOTES),
        source=source,
        alpha=report.alpha,
        dtypes=report.dtypes,
        ranks=tuple(report.ranks.items()),
        weight=side.weight,
        confidence=report.confidence,
    )


def renewed(old: Entry, new: Entry) -> Entry:
    """Bring a card up to date with its file: what it says stays, what it does not say is filled in."""
    kept = ("trigger", "notes", "licence", "title", "author", "description", "source", "weight", "group")
    stay = {name: getattr(old, name) or getattr(new, name) for name in kept}
    return replace(
        new,
        **stay,
        name=old.name,
        created=old.created,
        favourite=old.favourite,
        thumbnail=new.thumbnail or old.thumbnail,
    )


def source_of(home: Home, path: Path) -> str:
    """Say in words where a file came from."""
    jobs = home.root / "jobs"
    if path.is_relative_to(jobs):
        return f"made by job {path.relative_to(jobs).parts[0]}"
    uploaded = path.is_relative_to(home.root)  # its folder is ours and says nothing
    return text(f"imported from {path.name if uploaded else path.absolute()}", MAX_NOTES)


def adapter_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Give the files among some paths as they are, and for each folder the adapter files in it and below."""
    for path in paths:
        if path.is_dir():
            yield from sorted(found for found in path.rglob(f"*{ENDING}") if not found.name.startswith("."))
        else:
            yield path
