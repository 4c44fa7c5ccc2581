"""What lies behind a composed picture: where each concept acted, the spectra of the adapters, losses over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from . import plots
from .compose_sheet import Sheet, Shot, Spectrum
from .pieces import esc, file_url

MOST_POINTS = 200  # of a line of facts


def panels_html(sheet: Sheet, index: int) -> str:
    """The panels of one picture of a sheet; "" if its method tells nothing."""
    shot = sheet.shots[index]
    parts = [
        masks_html(shot, sheet.concepts),
        spectrum_html(sheet.spectrum) if sheet.spectrum and shot.method == "cmlora" else "",
        facts_html(shot.facts),
    ]
    body = "".join(parts)
    return f'<div class="behind">{body}</div>' if body else ""


def masks_html(shot: Shot, concepts: Sequence[str]) -> str:
    """The picture once per concept, coloured where the concept acted at the last step."""
    masks = [(name, path) for name, path in shot.masks if Path(path).is_file()]
    if not masks:
        return ""
    figures = "".join(_tinted(shot, name, path, concepts) for name, path in masks)
    return (
        '<figure class="panel-card"><figcaption><b>Attention masks</b> <span>where each concept acted at the last step'
        f'</span></figcaption><div class="acted">{figures}</div></figure>'
    )


def _tinted(shot: Shot, name: str, path: str, concepts: Sequence[str]) -> str:
    colour = concepts.index(name) if name in concepts else 0
    url = file_url(path)
    return (
        f'<figure class="c{colour}"><div class="tinted"><img src="{file_url(shot.picture)}" alt="">'
        f'<i style="-webkit-mask-image:url(&quot;{esc(url)}&quot;);mask-image:url(&quot;{esc(url)}&quot;)" role="img"'
        f' aria-label="Where {esc(name)} acted"></i></div><figcaption><i></i>{esc(name)}</figcaption></figure>'
    )


def spectrum_html(spectrum: Spectrum) -> str:
    """The amplitudes of each adapter's own picture by spatial frequency, and who therefore acts first."""
    edges = spectrum.edges
    middles = [(low + high) / 2 for low, high in pairwise(edges)]
    profiles = [list(profile) for profile in spectrum.profiles]
    if not middles or any(len(profile) != len(middles) for profile in profiles):
        return ""
    series = [
        plots.Line(str(name), f"tone c{index}", profile)
        for index, (name, profile) in enumerate(zip(spectrum.names, profiles, strict=False))
    ]
    chart = plots.lines(
        "Spectrum", "log amplitude of its own picture, largest 1", "spatial frequency", middles, series, right=edges[-1]
    )
    scores = ""
    if spectrum.scores:
        rows = [plots.Bar(str(name), score) for name, score in zip(spectrum.names, spectrum.scores, strict=False)]
        cut = "" if spectrum.cut is None else f" above {spectrum.cut:g}"
        scores = plots.bars("High frequencies", f"mean log amplitude{cut}", rows)
    return f'<div class="panel-card">{chart}</div>' + (f'<div class="panel-card">{scores}</div>' if scores else "")


def facts_html(facts: Mapping[str, Any]) -> str:
    """A chart per figure that a method tells of its steps."""
    charts: list[str] = []
    for name, values in facts.items():
        if not isinstance(values, Sequence) or len(values) < 2:
            continue
        stride = -(-len(values) // MOST_POINTS)
        points = [max(float(value), 0.0) for value in values[::stride]]
        line = plots.Line(name, "change", points)
        steps = [float(index * stride + 1) for index in range(len(points))]
        title = name.replace("_", " ").capitalize()
        charts.append(plots.lines(title, "", "step", steps, [line], right=float(len(values))))
    return "".join(f'<div class="panel-card">{chart}</div>' for chart in charts)
