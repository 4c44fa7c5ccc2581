"""The report of one adapter: what it is and why, what the file says of itself, and its layers as charts."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING

from ...pipelines.errors import IntarsiaError
from ..present import size
from ..studio import Studio
from . import plots
from .library_cards import copyable
from .library_view import family_title, kind_title
from .pieces import chip, esc, facts
from .plots import Bar

if TYPE_CHECKING:
    from ...pipelines.measure import FileMeasure, GroupMeasure
    from ...pipelines.report import Report
    from ..library_entry import Entry

KEPT = 24  # measures held in memory
MAX_NAMES = 200  # names of layers written out
MAX_HEADER = 4000  # characters of one text of the header


class Measures:
    """Reads reports, and measures layers beside the page, one file at a time; keeps what was found.

    Args:
        studio: Does it.
    """

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="measure")
        self._lock = Lock()
        self._known: dict[str, Future[FileMeasure]] = {}
        self._reports: dict[tuple[str, str, str], Report] = {}

    def of(self, entry: Entry) -> Future[FileMeasure]:
        """Give the measure of an adapter, begun now unless it was before."""
        with self._lock:
            found = self._known.pop(entry.sha256, None) or self._worker.submit(self._studio.measure, entry.name)
            self._known[entry.sha256] = found  # last in, last to be dropped
            while len(self._known) > KEPT:
                self._known.pop(next(iter(self._known))).cancel()
            return found

    def inspect(self, entry: Entry) -> Report:
        """Say everything about an adapter's file; read again only when its card has changed."""
        key = (entry.sha256, entry.family, entry.confidence)
        with self._lock:
            found = self._reports.get(key)
            if found is None:
                found = self._reports[key] = self._studio.inspect(entry.name)
                while len(self._reports) > KEPT:
                    del self._reports[next(iter(self._reports))]
            return found


def report_html(entry: Entry, report: Report, measured: Future[FileMeasure]) -> str:
    """The whole report; charts follow when the layers are measured."""
    warnings = "".join(f'<p class="warning">{esc(text)}</p>' for text in report.warnings)
    return (
        f'<section class="panel" data-panel="report {esc(entry.name)}" aria-label="Report of {esc(entry.name)}">'
        f"{panel_head(entry.name, 'Report')}"
        f'<div class="chips">{chip(kind_title(report.algorithm), "kind")}{chip(family_title(report.family), "family")}'
        f"</div>{warnings}{_facts(entry, report)}{copyable('SHA-256', report.sha256)}"
        f"{_ranks(report)}{_layers(measured)}"
        f"{_names('Layers without a place in the model', report.unmatched)}"
        f"{_names('Layers of another shape than their place', report.misfits)}"
        f"{_header(report)}</section>"
    )


def panel_head(name: str, what: str) -> str:
    """Name of a panel and the button that closes it."""
    return (
        f'<header class="panel-head"><div><p class="soft">{esc(what)}</p><h3 tabindex="-1">{esc(name)}</h3></div>'
        '<button type="button" class="icon" data-act="close" aria-label="Close" title="Close">×</button></header>'
    )


def _facts(entry: Entry, report: Report) -> str:
    low, high = report.alpha
    alpha = "" if not report.rank else f"{low:g}" if low == high else f"{low:g} to {high:g}"
    stored = ", ".join(report.dtypes)
    return facts(
        (
            ("Made for", report.base),
            ("Family", f"{family_title(report.family)}, {report.confidence}: {report.reason}"),
            ("Kinds", kind_title(report.algorithm)),
            ("Modules", f"{report.matched} of {report.modules} matched"),
            ("In", ", ".join(f"{part.replace('_', ' ')} {count}" for part, count in report.components.items())),
            ("Rank", report.rank or ""),
            ("Alpha", alpha),
            ("Stored as", stored),
            ("Spelling", report.dialect),
            ("Size", size(report.size)),
            ("Trigger words", report.trigger),
            ("More words", ", ".join(report.triggers)),
            ("From", entry.source),
        )
    )


def _ranks(report: Report) -> str:
    if not report.ranks:
        return ""
    counts = plots.histogram(sorted(report.ranks.items()))
    return plots.columns("Ranks", "rank", "number of layers", counts)


def _layers(measured: Future[FileMeasure]) -> str:
    """Charts of the layers, or that they are on their way, or why there are none."""
    if not measured.done():
        return '<div class="plot hollow measuring" role="status"><span>Measuring the layers…</span></div>'
    error = None if measured.cancelled() else measured.exception()
    if measured.cancelled() or isinstance(error, IntarsiaError):
        said = f"{error.message} {error.hint}" if isinstance(error, IntarsiaError) else "Open the report again."
        return f'<p class="soft">Its layers could not be measured. {esc(said)}</p>'
    found = measured.result()
    bars = [Bar(part.group.title, _norm(part), bool(part.group.inside)) for part in found.groups]
    notes: list[str] = []
    if found.needs_weight:
        notes.append(
            f"The whole change of {found.needs_weight} layers follows from the model's own weights, which are not in "
            "the file: a DoRA's norm here is that of what turns the directions."
        )
    said = "".join(f'<p class="soft">{esc(text)}</p>' for text in notes)
    chart = plots.bars("Change by part of the model", "Frobenius norm, alpha included", bars)
    return f"{chart}{said}<details><summary>As a table</summary>{_table(found.groups)}</details>"


def _norm(part: GroupMeasure) -> float | None:
    return None if part.unmeasured == part.group.layers else part.norm


def _table(groups: Iterable[GroupMeasure]) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{esc(part.group.title)}</th><td>{part.group.layers}</td>"
        f"<td>{'' if (norm := _norm(part)) is None else plots.number(norm)}</td>"
        f"<td>{'' if part.effective_rank is None else f'{part.effective_rank:.1f}'}</td></tr>"
        for part in groups
    )
    head = "".join(f'<th scope="col">{title}</th>' for title in ("Part", "Layers", "Norm", "Effective rank, mean"))
    return f'<table class="figures"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _names(title: str, names: tuple[str, ...]) -> str:
    if not names:
        return ""
    rest = f"<li>and {len(names) - MAX_NAMES:,} more</li>" if len(names) > MAX_NAMES else ""
    items = "".join(f"<li><code>{esc(name)}</code></li>" for name in names[:MAX_NAMES])
    return f'<details><summary>{title} ({len(names):,})</summary><ul class="names">{items}{rest}</ul></details>'


def _header(report: Report) -> str:
    """What the file says of itself, as the text it is."""
    texts = [
        (key, text if len(text) <= MAX_HEADER else f"{text[:MAX_HEADER]} … {len(text):,} characters in all")
        for key, text in sorted(report.metadata.items())
    ]
    if not texts:
        return '<p class="soft">The file says nothing about itself.</p>'
    rows = "".join(f"<dt>{esc(key)}</dt><dd>{esc(text)}</dd>" for key, text in texts)
    title = f"What the file says ({len(texts)} texts)"
    return f'<details><summary>{title}</summary><dl class="facts texts">{rows}</dl></details>'
