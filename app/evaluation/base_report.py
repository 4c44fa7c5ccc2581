"""The report card's page, from its records alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .bench import Figure, Place, Sheet, Summary, Table
from .prompts import STYLES
from .records import Row
from .statistics import interval, mean_spread, shown

SINGLE = {
    "held-in": "Contents it was taught",
    "real": "the real pictures of the same",
    "held-out": "Contents no training saw",
}
PER_SHEET = {"held-in": 60, "held-out": 30, "scene": 20, "variety": 32}


def summary(place: Place) -> Summary:
    """Put what was measured into tables, contact sheets and figures."""
    rows = {kind: place.records.rows(kind) for kind in (*SINGLE, "scene", "pasted", "near", "variety-of")}
    figures: dict[str, Figure] = {}
    tables = [_contents(rows, figures), _scenes(rows, figures), _by_style(rows), *_distances(place, rows, figures)]
    return Summary(
        title="Report card",
        tables=tuple(table for table in tables if table.rows),
        sheets=tuple(_sheet(kind, found, place) for kind in PER_SHEET if (found := place.records.rows(kind))),
        notes=_notes(place, rows),
        figures=figures,
    )


def share(hits: Sequence[bool]) -> str:
    """A share in percent with its 95 % interval: "91 % (87 to 94)"."""
    if not hits:
        return "–"
    low, high = interval(sum(hits), len(hits))
    return f"{100 * sum(hits) / len(hits):.1f} % ({100 * low:.0f} to {100 * high:.0f})"


def _mean(hits: Sequence[bool]) -> float:
    return mean_spread([float(hit) for hit in hits])[0]


def _contents(rows: dict[str, list[Row]], figures: dict[str, Figure]) -> Table:
    lines: list[tuple[str | int, ...]] = []
    for kind, title in SINGLE.items():
        ranks: list[int] = [row["rank"] for row in rows[kind]]
        if not ranks:
            continue
        first, five = [rank == 1 for rank in ranks], [rank <= 5 for rank in ranks]
        styles: list[bool] = [row["style_right"] for row in rows[kind]]
        name = kind.replace("-", "_")
        figures |= {f"{name}_top1": _mean(first), f"{name}_top5": _mean(five), f"{name}_style": _mean(styles)}
        lines.append((title, len(ranks), share(first), share(five), share(styles)))
    return Table(
        "Is it what was asked for?",
        ("prompts", "pictures", "content first", "among first five", "style"),
        tuple(lines),
        "The judge chooses among all contents it knows, and among the ten base styles; fluent-emoji and fluent-3d are "
        "the same drawings rendered twice and count as one. In brackets: 95 % interval.",
    )


def _scenes(rows: dict[str, list[Row]], figures: dict[str, Figure]) -> Table:
    lines: list[tuple[str | int, ...]] = []
    for kind, title in (("scene", "drawn"), ("pasted", "pasted from real pictures")):
        found = rows[kind]
        if not found:
            continue
        one = [bool(hit) for row in found for hit in row["present"]]
        both = [all(row["present"]) for row in found]
        placed = [all(row["placed"]) for row in found]
        styles = [bool(hit) for row in found for hit in row["styles_right"]]
        figures |= {f"{kind}_present": _mean(both), f"{kind}_placed": _mean(placed), f"{kind}_style": _mean(styles)}
        lines.append((title, len(found), share(one), share(both), share(placed), share(styles)))
    return Table(
        "Scenes of two",
        ("scenes", "pictures", "each is there", "both are there", "both there and in place", "style of each"),
        tuple(lines),
        "Found: among the five contents the judge finds likeliest in some window, above a threshold chosen on pasted "
        "scenes. In place: its best window lies where the prompt says. The second row is the most the judge can see.",
    )


def _by_style(rows: dict[str, list[Row]]) -> Table:
    lines: list[tuple[str | int, ...]] = []
    for style in STYLES:
        held = [row for row in rows["held-in"] if row["style"] == style]
        scenes = [row for row in rows["scene"] if row["style"] == style]
        if held or scenes:
            first = [row["rank"] == 1 for row in held]
            right = [bool(row["style_right"]) for row in held]
            lines.append((style, len(held), share(first), share(right), share([all(row["placed"]) for row in scenes])))
    return Table("By style", ("style", "pictures", "content first", "style", "scenes in place"), tuple(lines))


def _distances(place: Place, rows: dict[str, list[Row]], figures: dict[str, Figure]) -> list[Table]:
    lines: list[tuple[str | int | float, ...]] = []
    for row in place.records.rows("frechet"):
        figures |= {"frechet_drawn": row["drawn"], "frechet_real": row["real"]}
        count = row["count"]
        lines.append(("Frechet distance (Lite0), held-out prompts to real pictures", f"{row['drawn']:.1f}", count))
        lines.append(("the same, two halves of the real pictures", f"{row['real']:.1f}", count))
    for name, title in (("same", "ST-LPIPS between seeds of one prompt"), ("other", "ST-LPIPS between prompts")):
        values: list[float] = [row[name] for row in rows["variety-of"]]
        if values:
            figures[f"variety_{name}"] = mean_spread(values)[0]
            lines.append((title, shown(values), len(values)))
    for of in ("held-in", "held-out", "real"):
        near: list[float] = [row["distance"] for row in rows["near"] if row["of"] == of]
        if near:
            figures[f"nearest_{of.replace('-', '_')}"] = mean_spread(near)[0]
            title = "real held-out pictures" if of == "real" else f"drawn, {of}"
            lines.append((f"ST-LPIPS to the nearest training picture: {title}", shown(near), len(near)))
    for row in place.records.rows("speed"):
        seconds: list[float] = row["seconds"]
        figures["seconds"] = mean_spread(seconds)[0]
        lines.append(
            (f"seconds per picture, one at a time on {place.model.device.type}", shown(seconds, 2), len(seconds))
        )
    return [Table("New, varied, quick", ("measure", "value", "n"), tuple(lines))]


def _notes(place: Place, rows: dict[str, list[Row]]) -> tuple[str, ...]:
    notes: list[str] = []
    for row in place.records.rows("threshold"):
        notes.append(
            f"A content counts as found from a score of {row['threshold']:.2f} on: so the judge finds "
            f"{100 * row['hits']:.1f} % of what is in pasted scenes, {100 * row['false_alarms']:.2f} % of what is not."
        )
    wrong = Counter((row["contents"][0], row["taken_for"]) for row in rows["held-in"] if row["rank"] > 1)
    if wrong:
        pairs = "; ".join(f"{asked} for {taken}" for (asked, taken), _ in wrong.most_common(8))
        notes.append(f"Taken for something else (asked for what): {pairs}.")
    return tuple(notes)


def _sheet(kind: str, rows: Sequence[Row], place: Place) -> Sheet:
    titles = SINGLE | {"scene": "Scenes", "variety": "One prompt, four seeds"}
    chosen = rows[: PER_SHEET[kind]]
    captions = tuple(f"{'' if _right(row) else '✗ '}{row['prompt']}" for row in chosen)
    return Sheet(titles[kind], tuple(place.path(row["key"]) for row in chosen), captions, 4 if kind == "variety" else 5)


def _right(row: Row) -> bool:
    return all(row["placed"]) if "placed" in row else row["rank"] == 1
