"""Charts as SVG made on the server: bars, columns, lines; their colours come from the page's style.

Every chart has a caption, labels with units, and its values as words for those who do not see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from .pieces import esc

WIDTH = 480  # of a chart in its own units
ROW = 24
LABELS, VALUES = 128, 56  # room for the words left of the bars, and for the numbers right of them
FLOOR, ROOF = 152, 14  # y of a column chart's ground line, and of its highest column
LEFT = 52  # room for a line chart's y labels
COLUMNS = 24  # most columns of a histogram
SPOKEN = 40  # most values read out


@dataclass(frozen=True)
class Bar:
    """One bar: its label, its value (None: not known), and whether it is a part of the one above."""

    label: str
    value: float | None
    inside: bool = False


@dataclass(frozen=True)
class Line:
    """One line of a line chart; `style` is its class in the style sheet."""

    label: str
    style: str
    values: Sequence[float]


def number(value: float) -> str:
    """Write a value with three figures."""
    return f"{value:.3g}"


def bars(title: str, unit: str, rows: Sequence[Bar]) -> str:
    """Draw horizontal bars from zero.

    Args:
        title: What is shown.
        unit: Of the values; stands under the axis.
        rows: From top to bottom.
    """
    high = max((row.value or 0.0 for row in rows), default=0.0)
    ticks = nice_ticks(high)
    scale = (WIDTH - LABELS - VALUES) / (ticks[-1] or 1.0)
    height = len(rows) * ROW
    parts = [_vertical(LABELS + tick * scale, height, number(tick)) for tick in ticks]
    for index, row in enumerate(rows):
        middle = index * ROW + ROW / 2
        shift = 12 if row.inside else 0
        parts.append(f'<text x="{shift}" y="{middle + 4:.1f}" class="name">{esc(row.label)}</text>')
        if row.value is None:
            parts.append(f'<text x="{LABELS + 6}" y="{middle + 4:.1f}">not known</text>')
            continue
        length = max(row.value * scale, 0.5)
        style = "mark inside" if row.inside else "mark"
        parts.append(
            f'<rect class="{style}" x="{LABELS}" y="{middle - 7:.1f}" width="{length:.1f}" height="14" rx="2"/>'
            f'<text x="{LABELS + length + 6:.1f}" y="{middle + 4:.1f}" class="value">{number(row.value)}</text>'
        )
    parts.append(f'<text x="{LABELS}" y="{height + 32}">{esc(unit)}</text>')
    spoken = [f"{row.label} {'not known' if row.value is None else number(row.value)}" for row in rows]
    return _figure("bars", title, "", height + 40, "".join(parts), spoken)


def columns(title: str, x_label: str, y_label: str, values: Sequence[tuple[str, int]]) -> str:
    """Draw columns that count something.

    Args:
        title: What is shown.
        x_label: What the columns stand for.
        y_label: What is counted.
        values: Name and count of each column, from left to right.
    """
    high = max((count for _, count in values), default=0)
    ticks = nice_ticks(float(high), whole=True)
    top = ticks[-1] or 1.0
    scale = (FLOOR - ROOF) / top
    parts = [_horizontal(FLOOR - tick * scale, number(tick)) for tick in ticks]
    step = (WIDTH - LEFT) / max(len(values), 1)
    thick = min(step * 0.7, 44)
    for index, (name, count) in enumerate(values):
        x = LEFT + (index + 0.5) * step
        tall = count * scale
        parts.append(
            f'<rect class="mark" x="{x - thick / 2:.1f}" y="{FLOOR - tall:.1f}" width="{thick:.1f}" height="{tall:.1f}"'
            f' rx="2"/><text x="{x:.1f}" y="{FLOOR - tall - 4:.1f}" class="value middle">{count}</text>'
            f'<text x="{x:.1f}" y="{FLOOR + 16}" class="middle">{esc(name)}</text>'
        )
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{FLOOR + 34}" class="middle">{esc(x_label)}</text>')
    spoken = [f"{name}: {count}" for name, count in values]
    return _figure("columns", title, y_label, FLOOR + 42, "".join(parts), spoken)


def lines(
    title: str, y_label: str, x_label: str, x: Sequence[float], series: Sequence[Line], right: float = 1.0
) -> str:
    """Draw lines over a linear x and a logarithmic y.

    Args:
        title: What is shown.
        y_label: What goes up.
        x_label: What goes right.
        x: Places of the values, rising from 0 or more.
        series: The lines, each with one value, 0 or more, per place; zeros lie on the ground.
        right: Where the x axis ends.
    """
    seen = [value for line in series for value in line.values if value > 0]
    low, high = (floor(log10(min(seen))), ceil(log10(max(seen)))) if seen else (0, 1)
    low, high = max(low, high - 8), max(high, low + 1)
    every = -(-(high - low) // 5)

    def place(at: float, value: float) -> str:
        share = (log10(value) - low) / (high - low) if value > 0 else 0.0
        y = FLOOR - max(share, 0.0) * (FLOOR - ROOF)
        return f"{LEFT + at / right * (WIDTH - LEFT - 12):.1f},{y:.1f}"

    parts: list[str] = []
    for power in range(low, high + 1, every):
        y = FLOOR - (power - low) / (high - low) * (FLOOR - ROOF)
        parts.append(_horizontal(y, f"10<tspan dy='-4' font-size='9'>{power}</tspan>"))
    for tick in (0.0, right / 2, right):
        at = float(place(tick, 0).split(",")[0])
        parts.append(f'<text x="{at:.1f}" y="{FLOOR + 16}" class="middle">{number(tick)}</text>')
    for line in series:
        points = [place(at, value) for at, value in zip(x, line.values, strict=True)]
        parts.append(f'<polyline class="{line.style}" points="{" ".join(points)}"/>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{FLOOR + 34}" class="middle">{esc(x_label)}</text>')
    spoken = [f"{line.label}: " + ", ".join(number(value) for value in line.values) for line in series]
    key = "".join(f'<span class="key {line.style}"><i></i>{esc(line.label)}</span>' for line in series)
    return _figure("lines", title, y_label, FLOOR + 42, "".join(parts), spoken, key)


def histogram(counts: Sequence[tuple[int, int]]) -> list[tuple[str, int]]:
    """Name the columns of a histogram of whole numbers; many different ones share columns.

    Args:
        counts: Number and how often it occurs, rising.
    """
    if len(counts) <= COLUMNS:
        return [(str(value), times) for value, times in counts]
    first, last = counts[0][0], counts[-1][0]
    size = -(-(last - first + 1) // COLUMNS)
    found: list[tuple[str, int]] = []
    for start in range(first, last + 1, size):
        end = min(start + size - 1, last)
        found.append((f"{start}+" if end > start else f"{start}", sum(t for v, t in counts if start <= v <= end)))
    return found


def nice_ticks(high: float, whole: bool = False) -> list[float]:
    """Give three to six round places from 0 to at least `high`."""
    if high <= 0:
        return [0.0, 1.0]
    raw = high / 4
    power = 10.0 ** floor(log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    return [index * step for index in range(ceil(high / step * (1 - 1e-9)) + 1)]


def _vertical(x: float, height: float, label: str) -> str:
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}"/>'
        f'<text x="{x:.1f}" y="{height + 15}" class="middle">{label}</text>'
    )


def _horizontal(y: float, label: str) -> str:
    return (
        f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 8}" y="{y + 4:.1f}" class="end">{label}</text>'
    )


def _figure(kind: str, title: str, unit: str, height: float, body: str, spoken: Sequence[str], key: str = "") -> str:
    said = "; ".join(spoken[:SPOKEN]) + ("; ..." if len(spoken) > SPOKEN else "")
    under = f" <span>{esc(unit)}</span>" if unit else ""
    said = esc(f"{title}. {said}")
    return (
        f'<figure class="chart {kind}"><figcaption><b>{esc(title)}</b>{under}{key}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{said}">{body}</svg></figure>'
    )
