"""The report as one HTML file: tables, contact sheets and how it was measured; nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...pipelines.atomic import replacing
from .bench import Cell, Sheet, Summary, Table

TILES = 6  # figures at the head of the page
LONGEST = 256  # pixels of a picture in the page; the saved ones stay as they are
NUMBER = re.compile(r"[-−+]?[\d.,]+( ?(%|s|[kMG]B))?( ?(±|–|to|of) ?[\d.,]+( ?%)?)?( \([^)]*\))?|–|-|")


def write_page(summary: Summary, path: Path, header: Mapping[str, Any] | None = None) -> None:
    """Write the page of a report.

    Args:
        summary: What was found.
        path: The file.
        header: The conditions, shown at the end of the page.
    """
    style = files("intarsia.app.evaluation").joinpath("page.css").read_text("utf-8")
    title = html.escape(summary.title)
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta name="color-scheme" content="light dark"><title>{title}</title><style>{style}</style></head>',
        f"<body><main><h1>{title}</h1>",
        _tiles(summary.figures),
        *(f"<p>{html.escape(note)}</p>" for note in summary.notes),
        *(_table(table) for table in summary.tables),
        *(_sheet(sheet) for sheet in summary.sheets),
        _conditions(header or {}),
        "</main></body></html>\n",
    ]
    with replacing(path) as temporary:
        temporary.write_text("\n".join(part for part in parts if part), "utf-8")


def _tiles(figures: Mapping[str, Cell]) -> str:
    first = list(figures.items())[:TILES]
    tiles = [
        f"<div><dd>{html.escape(written(value))}</dd><dt>{html.escape(name.replace('_', ' '))}</dt></div>"
        for name, value in first
    ]
    return f'<dl class="tiles">{"".join(tiles)}</dl>' if tiles else ""


def _table(table: Table) -> str:
    columns = [[row[index] for row in table.rows] for index in range(len(table.columns))]
    written_columns = [_column(column) for column in columns]
    marks = [' class="number"' if _numeric(column) else "" for column in columns]
    head = "".join(f"<th{mark}>{html.escape(name)}</th>" for mark, name in zip(marks, table.columns, strict=True))
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{mark}>{html.escape(column[index])}</td>" for mark, column in zip(marks, written_columns, strict=True)
        )
        + "</tr>"
        for index in range(len(table.rows))
    )
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f"<section><h2>{html.escape(table.title)}</h2>"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}</section>'
    )


def _sheet(sheet: Sheet) -> str:
    figures = "".join(
        f'<figure><img alt="{html.escape(caption)}" src="{_picture(path)}">'
        + (f"<figcaption>{html.escape(caption)}</figcaption>" if caption else "")
        + "</figure>"
        for path, caption in zip(sheet.paths, sheet.captions, strict=True)
    )
    note = f'<p class="note">{html.escape(sheet.note)}</p>' if sheet.note else ""
    return (
        f"<section><h2>{html.escape(sheet.title)}</h2>"
        f'<div class="wide fit" style="--across: {sheet.across}"><div class="sheet">{figures}</div></div>'
        f"{note}</section>"
    )


def _conditions(header: Mapping[str, Any]) -> str:
    rows: list[str] = []
    for name, value in header.items():
        text = ", ".join(f"{key} {inner}" for key, inner in value.items()) if isinstance(value, dict) else str(value)
        rows.append(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>")
    if not rows:
        return ""
    return f"<details><summary>How it was measured</summary><table>{''.join(rows)}</table></details>"


def _picture(path: Path) -> str:
    """Give a picture as a data URI, small enough that a page of hundreds can be sent around."""
    from PIL import Image

    with Image.open(path) as picture:
        small = picture.convert("RGBA" if "A" in picture.getbands() else "RGB")
    small.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    kept = io.BytesIO()
    small.save(kept, format="WEBP", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(kept.getvalue()).decode()}"


def _numeric(column: Sequence[Cell]) -> bool:
    return bool(column) and all(not isinstance(cell, str) or NUMBER.fullmatch(cell) for cell in column)


def _column(column: Sequence[Cell]) -> list[str]:
    """Write a column's numbers with the same number of decimals, so that the points stand under each other."""
    numbers = [abs(cell) for cell in column if isinstance(cell, float) and math.isfinite(cell)]
    largest = max(numbers, default=0.0)
    digits = 3 if largest < 10 else 2 if largest < 100 else 1
    return [written(cell, digits) for cell in column]


def written(cell: Cell, digits: int = 3) -> str:
    """Write one value; what could not be computed is a dash."""
    if isinstance(cell, float):
        return f"{cell:,.{digits}f}" if math.isfinite(cell) else "–"
    return f"{cell:,}" if isinstance(cell, int) else cell
