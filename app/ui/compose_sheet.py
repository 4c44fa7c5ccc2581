"""The sheet of a composition: rows are seeds, columns are methods, each cell a picture with what the judge saw."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from ..present import duration, size
from .pieces import esc

FILES = ("picture", "path", "mask", "adapter", "model")  # keys of a report that may hold a path
MIXED = 0.25  # share of another concept in a box from which the sheet names it


@dataclass(frozen=True)
class Scores:
    """What the judge saw in one picture.

    Args:
        concepts: Their names.
        presence: Whether each is there.
        identity: How much each is himself in his own place, 0 to 1.
        confusion: By concept and then by box, how much of the concept is seen in the box.
    """

    concepts: Sequence[str]
    presence: Sequence[float]
    identity: Sequence[float]
    confusion: Sequence[Sequence[float]] = ()

    def intruder(self, box: int) -> tuple[str, float] | None:
        """Who else is seen most in a box, and how much; None if nobody was asked for."""
        others = [(row[box], name) for name, row in zip(self.concepts, self.confusion, strict=False)]
        others = [pair for index, pair in enumerate(others) if index != box]
        return (max(others)[1], max(others)[0]) if others else None


@dataclass(frozen=True)
class Shot:
    """One picture of the sheet; `memory` in bytes, `passes` of the network, 0 where not known."""

    method: str
    title: str
    seed: int
    picture: str
    seconds: float = 0.0
    passes: int = 0
    memory: float = 0.0
    facts: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])
    masks: Sequence[tuple[str, str]] = ()
    scores: Scores | None = None


@dataclass(frozen=True)
class Spectrum:
    """How the adapters' changes spread over spatial frequencies: one profile per name, one value per band."""

    names: Sequence[str]
    edges: Sequence[float]
    profiles: Sequence[Sequence[float]]
    scores: Sequence[float] = ()
    cut: float | None = None


@dataclass(frozen=True)
class Sheet:
    """A whole comparison, as its report tells it; `table` is the report as it was read."""

    table: Mapping[str, Any]
    concepts: Sequence[str]
    shots: Sequence[Shot]
    spectrum: Spectrum | None

    @classmethod
    def read(cls, table: Mapping[str, Any], concepts: Sequence[str]) -> Sheet:
        """Read a report; what it does not say is left out.

        Args:
            table: The report.
            concepts: Names of the layout's concepts, in its order.
        """
        spectrum = table.get("spectrum")
        return cls(table, concepts, [_shot(row) for row in table.get("rows", ())], _spectrum(spectrum))

    @cached_property
    def by_place(self) -> Mapping[tuple[str, int], int]:
        """Which shot is of which method and seed."""
        return {(shot.method, shot.seed): index for index, shot in enumerate(self.shots)}


def _shot(row: Mapping[str, Any]) -> Shot:
    scores = row.get("scores")
    return Shot(
        method=str(row.get("method", "")),
        title=str(row.get("title") or row.get("method", "")),
        seed=int(row.get("seed", 0)),
        picture=str(row.get("picture", "")),
        seconds=float(row.get("seconds") or 0),
        passes=int(row.get("passes") or 0),
        memory=float(row.get("memory") or 0),
        facts=row.get("facts") or {},
        masks=[(str(mask["concept"]), str(mask["path"])) for mask in row.get("masks") or ()],
        scores=None if not scores else Scores(
            scores.get("concepts", ()), scores.get("presence", ()), scores.get("identity", ()),
            scores.get("confusion", ()),
        ),
    )  # fmt: skip


def _spectrum(table: Mapping[str, Any] | None) -> Spectrum | None:
    if not table or not table.get("profiles"):
        return None
    return Spectrum(
        table.get("names", ()), table.get("edges", ()), table["profiles"], table.get("scores") or (), table.get("cut")
    )


@dataclass(frozen=True)
class Plan:
    """What was asked for: the sheet's columns and rows, whether they are drawn already or not."""

    methods: Sequence[tuple[str, str]]  # name, title
    seeds: Sequence[int]
    chosen: tuple[str, int] | None = None


def sheet_table(sheet: Sheet, plan: Plan, picture: Callable[[int, Shot], str]) -> str:
    """Lay the sheet out as a table.

    Args:
        sheet: What is there by now.
        plan: What will be there.
        picture: Gives the HTML of a shot's picture.
    """
    heads = "".join(f'<th scope="col">{esc(title)}</th>' for _, title in plan.methods)
    rows = "".join(
        f'<tr><th scope="row"><span>seed</span> {seed}</th>'
        + "".join(_cell(sheet, plan, (name, seed), picture) for name, _ in plan.methods)
        + "</tr>"
        for seed in plan.seeds
    )
    means = "".join(f"<td>{_mean(sheet, name)}</td>" for name, _ in plan.methods)
    foot = f'<tfoot><tr><th scope="row">mean</th>{means}</tr></tfoot>' if len(plan.seeds) > 1 else ""
    return (
        '<div class="sheet-scroll" tabindex="0" role="region" aria-label="Comparison of methods by seed">'
        f'<table class="sheet-table" style="--columns:{len(plan.methods)}">'
        f"<thead><tr><td></td>{heads}</tr></thead><tbody>{rows}</tbody>{foot}</table></div>"
    )


def _cell(sheet: Sheet, plan: Plan, place: tuple[str, int], picture: Callable[[int, Shot], str]) -> str:
    index = sheet.by_place.get(place)
    if index is None:
        return '<td><div class="shot pending shimmer"></div></td>'
    shot = sheet.shots[index]
    mark = ' class="chosen"' if plan.chosen == place else ""
    return f"<td{mark}><div class='shot'>{picture(index, shot)}</div>{_marks(shot.scores)}{_figures(shot)}</td>"


def _figures(shot: Shot) -> str:
    parts = [duration(shot.seconds)]
    parts += [size(shot.memory)] if shot.memory else []
    parts += [f"{shot.passes:,} passes"] if shot.passes else []
    return f'<p class="cost">{" · ".join(esc(part) for part in parts)}</p>'


def _marks(scores: Scores | None) -> str:
    """One line per concept: whether it is there, how much it is itself, and who else is seen in its place."""
    if scores is None:
        return ""
    lines: list[str] = []
    for index, name in enumerate(scores.concepts):
        there = bool(scores.presence[index]) if index < len(scores.presence) else False
        itself = float(scores.identity[index]) if index < len(scores.identity) else 0.0
        other = scores.intruder(index)
        mixed = ""
        if other and other[1] >= MIXED:
            said = f"{other[0]} is seen in the place of {name}: {other[1]:.2f}"
            mixed = f'<span class="mixed" title="{esc(said)}">{esc(other[0])} {other[1]:.2f}</span>'
        word, sign = ("present", "✓") if there else ("absent", "✗")
        lines.append(
            f'<li class="c{index} {word}"><span class="who"><i></i>{esc(name)}</span>'
            f'<span class="there" role="img" aria-label="{word}" title="{word}">{sign}</span>'
            f'<span class="meter" title="identity {itself:.2f}">'
            f'<i style="width:{100 * min(max(itself, 0), 1):.0f}%"></i></span><b>{itself:.2f}</b>{mixed}</li>'
        )
    return f'<ul class="marks">{"".join(lines)}</ul>{_matrix(scores)}'


def _matrix(scores: Scores) -> str:
    """How much of every concept is seen in every box, folded away."""
    if len(scores.confusion) < 2:
        return ""
    heads = "".join(f'<th scope="col" class="c{index}"><i></i></th>' for index in range(len(scores.concepts)))
    rows = "".join(
        f'<tr><th scope="row" class="c{index}"><i></i>{esc(name)}</th>'
        + "".join(f'<td style="--much:{100 * min(max(value, 0), 1):.0f}%">{value:.2f}</td>' for value in row)
        + "</tr>"
        for index, (name, row) in enumerate(zip(scores.concepts, scores.confusion, strict=False))
    )
    return (
        '<details class="confusion"><summary>Confusion</summary>'
        f'<table><caption class="sr">How much of each concept (rows) is seen in each place (columns)</caption>'
        f"<thead><tr><td></td>{heads}</tr></thead><tbody>{rows}</tbody></table></details>"
    )


def _mean(sheet: Sheet, method: str) -> str:
    """What a method's pictures have in common: how many concepts are there, how much themselves, what it costs."""
    shots = [shot for shot in sheet.shots if shot.method == method]
    if not shots:
        return ""
    parts: list[str] = []
    scores = [shot.scores for shot in shots if shot.scores]
    if scores and all(score.presence and score.identity for score in scores):
        there = fmean(value for score in scores for value in score.presence)
        itself = fmean(value for score in scores for value in score.identity)
        parts += [f"<b>{there:.0%}</b> present", f"<b>{itself:.2f}</b> identity"]
    parts.append(f"<b>{duration(fmean(shot.seconds for shot in shots))}</b> a picture")
    return f'<p class="mean">{"".join(f"<span>{part}</span>" for part in parts)}</p>'


def without_places(value: Any) -> Any:  # noqa: ANN401 - JSON
    """Leave folders of this computer out of a report: files keep their names."""
    if isinstance(value, Mapping):
        return {
            key: Path(inner).name if key in FILES and isinstance(inner, str) else without_places(inner)
            for key, inner in value.items()
        }
    return [without_places(inner) for inner in value] if isinstance(value, list) else value


def sheet_json(sheet: Sheet) -> str:
    """The report for others, as JSON."""
    return json.dumps(without_places(sheet.table), indent=1, ensure_ascii=False)
