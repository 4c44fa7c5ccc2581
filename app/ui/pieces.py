"""Small pieces of HTML. Every text that came from a file or a person passes through `esc`."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from urllib.parse import quote

from PIL import Image

THUMB_SIDE = 160  # pixels
CHART = (600, 200)  # width and height of the loss plot in its own units
CHART_POINTS = 400


def esc(text: object) -> str:
    """Escape for HTML text and attributes. Backslashes and `$` are safe: pieces are values, never templates."""
    return escape(str(text), quote=True)


def file_url(path: str | Path, version: int = 0) -> str:
    """Address of a file in the outputs or jobs folder; `version` makes a browser see that it was overwritten."""
    address = f"gradio_api/file={quote(str(path))}"
    return f"{address}?v={version}" if version else address


def image(path: str | Path, alt: str, version: int = 0, classes: str = "") -> str:
    return f'<img src="{file_url(path, version)}" alt="{esc(alt)}" class="{classes}" draggable="false">'


def chip(text: object, classes: str = "", title: str = "") -> str:
    """A small word in a box; `title` is its tooltip."""
    said = f' title="{esc(title)}"' if title else ""
    return f'<span class="chip {classes}"{said}>{esc(text)}</span>'


def button(label: str, act: str, classes: str = "", **data: object) -> str:
    """A button whose click arrives in Python as the event `act` with its data."""
    attributes = "".join(f' data-{key}="{esc(value)}"' for key, value in data.items())
    return f'<button type="button" class="btn {classes}" data-act="{esc(act)}"{attributes}>{esc(label)}</button>'


def empty(title: str, body: str, extra: str = "") -> str:
    """What a place says while there is nothing to show."""
    return f'<div class="empty">{MOTIF}<h3>{esc(title)}</h3><p>{esc(body)}</p>{extra}</div>'


def progress(fraction: float, busy: bool = False) -> str:
    """A bar; `busy` when something happens but nobody can say how far it is."""
    mode = " busy" if busy else ""
    return (
        f'<div class="bar{mode}" role="progressbar" aria-valuemin="0" aria-valuemax="100"'
        f' aria-valuenow="{round(100 * fraction)}"><i style="width:{100 * fraction:.1f}%"></i></div>'
    )


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """A list of names and values, empty ones left out."""
    rows = "".join(f"<dt>{esc(name)}</dt><dd>{esc(value)}</dd>" for name, value in pairs if value not in ("", None))
    return f'<dl class="facts">{rows}</dl>'


def clock(moment: float) -> str:
    """Write a time of day, with the day when it is not today."""
    then, now = time.localtime(moment), time.localtime()
    return time.strftime("%H:%M" if then[:3] == now[:3] else "%d %b %H:%M", then)


@lru_cache(maxsize=512)
def thumbnail(path: str) -> str:
    """Give a small copy of a picture as a data address; pictures outside the served folders are shown this way."""
    with Image.open(path) as picture:
        picture.draft("RGB", (THUMB_SIDE, THUMB_SIDE))
        small = picture.convert("RGB")
    small.thumbnail((THUMB_SIDE, THUMB_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def smoothed(losses: Sequence[tuple[int, float]], weight: float = 0.9) -> list[tuple[int, float]]:
    """Exponential mean with the start corrected, as optimisers do: no slow climb from zero."""
    found: list[tuple[int, float]] = []
    mean, mass = 0.0, 0.0
    for step, loss in losses:
        mean = weight * mean + (1 - weight) * loss
        mass = weight * mass + (1 - weight)
        found.append((step, mean / mass))
    return found


def loss_plot(losses: Sequence[tuple[int, float]], total: int = 0) -> str:
    """Draw the loss over the steps: every value faint, the smoothed line strong."""
    if not losses:
        return '<div class="plot hollow"><span>The loss appears here after the first steps.</span></div>'
    width, height = CHART
    reached = max(losses[-1][0], 1)
    last = max(reached, min(total, 10 * reached))  # a run at its beginning shows more than a dash at the edge
    high = max(loss for _, loss in losses) * 1.05 or 1.0
    stride = max(1, len(losses) // CHART_POINTS)

    def line(points: Sequence[tuple[int, float]]) -> str:
        kept = [*points[::stride], points[-1]]
        return " ".join(f"{step / last * width:.1f},{height - loss / high * height:.1f}" for step, loss in kept)

    smooth = smoothed(losses)
    grid = "".join(f'<line x1="0" x2="{width}" y1="{y}" y2="{y}"/>' for y in (0, height / 2, height))
    return (
        f'<figure class="plot" data-points="{len(losses)}">'
        f"<figcaption><b>Loss</b> <span>{smooth[-1][1]:.4f} smoothed, step {losses[-1][0]}</span></figcaption>"
        f'<div class="axes"><span class="y top">{high:.3g}</span><span class="y bottom">0</span>'
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" aria-label="Loss over steps">'
        f'<g class="grid">{grid}</g><polyline class="raw" points="{line(losses)}"/>'
        f'<polyline class="smooth" points="{line(smooth)}"/></svg>'
        f'<span class="x first">0</span><span class="x last">{last} steps</span></div></figure>'
    )


def _motif() -> str:
    """The mark: four pieces of an inlay."""
    pieces = (
        ("a", "M32 4 L60 32 L32 32 Z"),
        ("b", "M60 32 L32 60 L32 32 Z"),
        ("c", "M32 60 L4 32 L32 32 Z"),
        ("d", "M4 32 L32 4 L32 32 Z"),
    )
    paths = "".join(f'<path class="{name}" d="{shape}"/>' for name, shape in pieces)
    return f'<svg class="motif" viewBox="0 0 64 64" aria-hidden="true">{paths}</svg>'


MOTIF = _motif()
