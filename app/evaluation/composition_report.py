"""The composition bench's report, from its records alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from .bench import Figure, Place, Sheet, Summary, Table
from .composed import ARMS
from .statistics import deviation

Row = Mapping[str, Any]
Measure = Callable[[Row], float | None]
MEGABYTE = 2**20


def _all_placed(row: Row) -> float:
    return float(all(row["placed"]))


def _mean(name: str) -> Measure:
    def measured(row: Row) -> float | None:
        return fmean(row[name]) if row[name] else None

    return measured


def _lost(name: str) -> Measure:
    def measured(row: Row) -> float:
        return fmean(row[f"{name}_alone"]) - fmean(row[name])

    return measured


def _value(name: str, unit: float = 1.0) -> Measure:
    def measured(row: Row) -> float:
        return float(row[name]) / unit

    return measured


def _confusion(row: Row) -> float:
    """Share of the contents that are found in a box of another."""
    inside: list[list[bool]] = row["inside"]
    return fmean(any(hit for j, hit in enumerate(hits) if j != i) for i, hits in enumerate(inside))


def _told(row: Row) -> float:
    """Share of the boxes that are more like their own content than like any other that was taught."""
    return fmean(chosen == index for index, chosen in enumerate(row["chosen"]))


def _mistaken(row: Row) -> float:
    """Share of the boxes that are most like another content of the scene."""
    return fmean(chosen not in (index, -1) for index, chosen in enumerate(row["chosen"]))


QUALITY: Mapping[str, Measure] = {  # of one picture; named as in summary.json and in the tables
    "all placed": _all_placed,
    "presence": _mean("present"),
    "place": _mean("placed"),
    "told apart": _told,
    "mistaken": _mistaken,
    "identity": _mean("identity"),
    "Lite0": _mean("lite0"),
    "confusion": _confusion,
    "duplicates": _mean("duplicates"),
    "style": _mean("fidelity"),
    "style fade": _lost("fidelity"),
    "false alarms": _mean("false_alarm"),
}
COST: Mapping[str, Measure] = {
    "identity lost": _lost("identity"),
    "Lite0 lost": _lost("lite0"),
    "seconds": _value("seconds"),
    "passes": _value("passes"),
    "memory, MB": _value("memory", MEGABYTE),
}
READING = (
    "Values are means over pictures ± standard deviation; n is the number of pictures. present: found anywhere (among "
    "the judge's five likeliest contents of a window and above the calibrated threshold). place: the best such window "
    "lies in the content's own box. all placed: share of pictures in which every content is. told apart: share "
    "of the boxes that are more like their own content than like any other that was taught, however little; mistaken: "
    "most like another content of the same scene. identity, Lite0: cosine "
    "of the box with the real picture of the content in the prompt's style. confusion: share of contents found in "
    "another's box. duplicates: things beyond the one asked for, per content. style: cosine of the boxes with the "
    "style asked for; style fade: how much higher that is when each content is drawn alone by its adapter, laid into "
    "the same box. false alarms: share of the taught contents that were not asked for but found."
)


def report(place: Place, weight: float) -> Summary:
    """Build the report.

    Args:
        place: Whose records hold the rows.
        weight: Of every adapter in Merge.
    """
    rows = place.records.rows("picture")
    groups = {(row["count"], row["arm"]): [] for row in rows}
    for row in rows:
        groups[row["count"], row["arm"]].append(row)
    order = {key: groups[key] for key in sorted(groups, key=lambda key: (key[0], list(ARMS).index(key[1])))}
    counts = sorted({count for count, _ in order})
    tables = [_quality(count, order) for count in counts]
    tables += [_cost(order), _matrix(order), _alone(place)]
    return Summary(
        title="Composition: several taught contents in one picture",
        tables=tuple(table for table in tables if table.rows),
        sheets=tuple(_sheet(count, rows, place) for count in counts),
        notes=tuple(_notes(place, weight)),
        figures=_figures(order),
    )


def _values(rows: Iterable[Row], figure: Measure) -> list[float]:
    return [value for row in rows if (value := figure(row)) is not None]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Write mean and standard deviation for a table; "–" for nothing."""
    return f"{fmean(values):.{digits}f} ± {deviation(values):.{digits}f}" if values else "–"


def _quality(count: int, groups: Mapping[tuple[int, str], Sequence[Row]]) -> Table:
    rows = [
        (ARMS[arm].title, len(found), *(spread(_values(found, figure)) for figure in QUALITY.values()))
        for (number, arm), found in groups.items()
        if number == count
    ]
    return Table(f"{count} contents", ("arm", "n", *QUALITY), tuple(rows), READING)


def _cost(groups: Mapping[tuple[int, str], Sequence[Row]]) -> Table:
    rows = [
        (count, ARMS[arm].title, len(found), *(spread(_values(found, figure)) for figure in COST.values()))
        for (count, arm), found in groups.items()
        if not ARMS[arm].control
    ]
    return Table(
        "What composing costs", ("contents", "arm", "n", *COST), tuple(rows),
        "lost: how much higher the figure is when each content is drawn alone by its adapter, laid into the same box. "
        "seconds: per picture. passes: times the denoiser was run per picture; "
        "with guidance two per step. memory: the most seen, of the accelerator or the whole process.",
    )  # fmt: skip


def _matrix(groups: Mapping[tuple[int, str], Sequence[Row]]) -> Table:
    widest = max((count for count, _ in groups), default=0)
    rows: list[tuple[str | int, ...]] = []
    for (count, arm), found in groups.items():
        for i in range(count):
            cells = [f"{fmean(row['inside'][i][j] for row in found):.2f}" for j in range(count)]
            rows.append((count, ARMS[arm].title, f"box {i + 1}", *cells, *[""] * (widest - count)))
    return Table(
        "Who is found in whose box",
        ("contents", "arm", "content of", *(f"in box {j + 1}" for j in range(widest))),
        tuple(rows),
        "Share of pictures; on the diagonal a content in its own box, beside it confusion.",
    )


def _alone(place: Place) -> Table:
    """How well each content is drawn alone: what a composition can keep at most."""
    rows: list[tuple[str | int, ...]] = []
    found = place.records.rows("alone")
    for content in dict.fromkeys(row["content"] for row in found):
        for arm in (name for name in ARMS if not ARMS[name].control):
            mine = [row for row in found if row["content"] == content and row["arm"] == arm]
            if mine:
                named = [float(row["named"]) for row in mine]
                looks = [spread([row[key][0] for row in mine]) for key in ("identity", "lite0", "fidelity")]
                rows.append((content, ARMS[arm].title, len(mine), f"{fmean(named):.2f}", *looks))
    taught = place.records.rows("taught")
    note = "recognised: share of pictures in which the judge finds the content."
    if taught:
        seconds = spread([row["seconds"] for row in taught], 1)
        note += (
            f" Each was taught in {taught[0]['steps']} steps from {taught[0]['pictures']} pictures or so: {seconds} s."
        )
    return Table(
        "Each content alone", ("content", "arm", "n", "recognised", "identity", "Lite0", "style"), tuple(rows), note
    )


def _sheet(count: int, rows: Sequence[Row], place: Place) -> Sheet:
    """The first seed of every scene, arm by arm, with the boxes drawn."""
    mine = [row for row in rows if row["count"] == count]
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in mine)]
    first = min(row["seed"] for row in mine)
    by_scene = {(row["scene"], row["arm"]): row for row in mine if row["seed"] == first}
    shown = [by_scene[scene, arm] for scene in dict.fromkeys(row["scene"] for row in mine) for arm in arms
             if (scene, arm) in by_scene]  # fmt: skip
    return Sheet(
        title=f"{count} contents",
        paths=tuple(place.path(f"{row['key']}-boxes") for row in shown),
        captions=tuple(f"{row['arm']}: {row['prompt']}" for row in shown),
        across=len(arms),
        note="Seed of each: the first. + is in its place, o is somewhere else, - was not found.",
    )


def _notes(place: Place, weight: float) -> Iterable[str]:
    if place.records.has("calibration"):
        made = place.records["calibration"]
        yield (
            f"Calibrated on {made['scenes']} scenes of real pictures of other contents: above {made['threshold']:.2f}, "
            f"{made['hits']:.1%} of {made['present']} contents are found in their box, and "
            f"{made['false_alarms']:.2%} of {made['absent']:,} contents that are not there are found somewhere."
        )
    yield (
        "The two arms of real pictures are controls: laid out rightly, everything must be present and placed; with the "
        "boxes exchanged, present but not placed."
    )
    yield (
        f"Every adapter has weight {weight:g}, every method its usual options; methods without boxes are told the "
        "places only by the words of the prompt. A method that composes no more than two concepts is missing where "
        "there are more."
    )


def _figures(groups: Mapping[tuple[int, str], Sequence[Row]]) -> dict[str, Figure]:
    """Mean, deviation and n of everything; what heads the page first."""
    found: dict[str, Figure] = {}
    for (count, arm), rows in groups.items():
        if not ARMS[arm].control:
            found[f"{arm}, {count}: all placed"] = round(fmean(_values(rows, _all_placed)), 4)
    for (count, arm), rows in groups.items():
        found[f"{arm}, {count}: n"] = len(rows)
        for name, figure in {**QUALITY, **COST}.items():
            if values := _values(rows, figure):
                found[f"{arm}, {count}: {name}"] = round(fmean(values), 4)
                found[f"{arm}, {count}: {name}, deviation"] = round(deviation(values), 4)
    return found
