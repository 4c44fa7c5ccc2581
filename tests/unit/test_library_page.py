"""The library on the page, without a browser: views, cards, reports, the form, the effect, charts as text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import gradio as gr
import pytest
from adapter_files import attention, kohya, lora, matrices, write
from intarsia.app.library_entry import Entry, Page
from intarsia.app.settings import Home
from intarsia.app.studio import Studio
from intarsia.app.ui import library_edit, library_effect, plots, tab_library
from intarsia.app.ui.desk import Desk, Seen
from intarsia.app.ui.library_cards import cards_html
from intarsia.app.ui.library_report import report_html
from intarsia.app.ui.library_view import CARDS, Panel, View, bar, kind_of
from intarsia.app.ui.plots import Bar, Line
from intarsia.app.ui.watch import Watcher
from intarsia.pipelines.block_groups import BlockGroup
from intarsia.pipelines.errors import AdapterError, InputError, IntarsiaError
from intarsia.pipelines.events import Artifact, Done, Failed
from intarsia.pipelines.measure import FileMeasure, GroupMeasure, LayerMeasure
from intarsia.pipelines.requests import EffectRequest

EVIL = '<img src=x onerror="alert(1)">'


@pytest.fixture
def desk(home: Home) -> Iterator[Desk]:
    with Studio(home) as studio:
        yield Desk(studio, Watcher(studio))


@pytest.fixture
def entry(desk: Desk) -> Entry:
    return desk.studio.shelf.find("mini-fast")


@pytest.fixture
def tab(desk: Desk) -> tab_library.LibraryTab:
    with gr.Blocks():
        return tab_library.build(desk)


def sd15_file(folder: Path, seed: int = 0) -> Path:
    some = dict(list(attention(matrices("sd15")).items())[:8])
    return write(folder / f"old-{seed}.safetensors", lora(some, kohya, seed=seed))


def found(*entries: Entry, total: int = 0) -> Page:
    return Page(entries, total or len(entries), {}, {}, {})


# Views and cards


def test_a_view_is_read_from_whatever_the_page_says() -> None:
    view = View.read({"text": "x" * 999, "favourite": True, "sort": "size", "more": 1})
    assert (len(view.text), view.favourite, view.query.sort, view.query.limit) == (200, True, "size", CARDS)
    assert View.read({}) == View() and not View().narrowed and view.narrowed
    with pytest.raises(InputError, match="sorted by"):
        assert View.read({"sort": "luck"}).query


def test_the_bar_tells_titles_and_counts(desk: Desk, entry: Entry) -> None:
    shelf = desk.studio.shelf
    shown = bar(desk, View(), shelf.page(View().query))
    assert shown["family"] == [["sdxl", "SDXL", 1]]
    assert shown["algorithm"] == [["locon", "LoCon", 1]]
    assert (shown["found"], shown["trash"]) == ("1 adapter", 0)
    shelf.remove(entry.name)
    view = View(trashed=True)
    shown = bar(desk, view, shelf.page(view.query))
    assert (shown["found"], shown["trash"]) == ("1 adapter in the trash", 1)


def test_what_is_missing_is_told_in_the_place_of_cards(desk: Desk, entry: Entry) -> None:
    assert "No adapters yet" in cards_html(desk, View(), found())
    assert "Nothing found" in cards_html(desk, View(text="x"), found())
    assert "trash is empty" in cards_html(desk, View(trashed=True), found())
    html = cards_html(desk, View(), found(entry, total=1000))
    assert f"Show {CARDS} more" in html and html.count("<article") == 1
    assert "Show 2 more" in cards_html(desk, View(), found(entry, total=3))
    trash = cards_html(desk, View(trashed=True), found(entry))
    assert 'data-act="restore"' in trash and 'data-act="use"' not in trash and "Delete 1 adapter for good?" in trash


def test_nothing_in_a_card_is_taken_for_markup(desk: Desk, entry: Entry) -> None:
    bad = replace(
        entry, name=EVIL, trigger=EVIL, tags=(EVIL,), notes=EVIL, licence=EVIL, source=EVIL, author=EVIL, base=EVIL,
        warnings=(EVIL, EVIL), confidence=EVIL, folder=EVIL, family=EVIL, algorithm=EVIL,
    )  # fmt: skip
    for view in (View(), View(trashed=True)):
        assert "<img src=x" not in cards_html(desk, view, found(bad))


def test_kinds_have_names_of_people(entry: Entry) -> None:
    named = {name: kind_of(replace(entry, algorithm=name)) for name in ("lora", "loha, dora", "ia3", "new-thing")}
    assert named == {"lora": "LoRA", "loha, dora": "LoHa, DoRA", "ia3": "(IA)³", "new-thing": "new-thing"}
    assert kind_of(replace(entry, role="style")) == "B-LoRA"


# The panel


def measured(*, needs_weight: bool = False) -> Future[FileMeasure]:
    layer = LayerMeasure("unet.mid_block.a", "LoRA", 4, 4.0, 2.5, 2.0, 1.5, needs_weight)
    done: Future[FileMeasure] = Future()
    done.set_result(FileMeasure((layer,), (GroupMeasure(BlockGroup("mid", ("unet.mid_block",), 1), 2.5, 1.5, 0),)))
    return done


def test_a_report_shows_facts_at_once_and_charts_when_they_are_measured(desk: Desk, entry: Entry) -> None:
    report = desk.studio.inspect(entry.name)
    waiting = report_html(entry, report, Future())
    assert "Measuring the layers" in waiting and "shapes of 248 layers" in waiting and "chart columns" in waiting
    html = report_html(entry, report, measured())
    assert "chart bars" in html and "mid 2.5" in html and "<td>1.5</td>" in html
    assert "model's own weights" not in html
    assert "model&#x27;s own weights" in report_html(entry, report, measured(needs_weight=True))
    failed: Future[FileMeasure] = Future()
    failed.set_exception(AdapterError("3 layers are unknown.", "Read it with its model."))
    assert "3 layers are unknown. Read it with its model." in report_html(entry, report, failed)
    dropped: Future[FileMeasure] = Future()
    dropped.cancel()
    assert "Open the report again" in report_html(entry, report, dropped)


def test_texts_of_a_header_are_shown_as_text_and_not_endlessly(desk: Desk, entry: Entry) -> None:
    report = replace(
        desk.studio.inspect(entry.name), metadata={EVIL: EVIL, "long": "y" * 10**5}, unmatched=(EVIL,) * 999
    )
    html = report_html(entry, report, measured())
    assert "<img src=x" not in html
    assert len(html) < 60_000 and "100,000 characters in all" in html and "and 799 more" in html


def test_the_panel_closes_when_its_adapter_goes(desk: Desk, tab: tab_library.LibraryTab, tmp_path: Path) -> None:
    old = desk.studio.import_adapter(sd15_file(tmp_path), "old")
    seen = Seen(panel=Panel("old", "report"))
    tab.measures.of(old).result(60)
    panel, effect = tab_library.panel_html(desk, tab, seen)
    assert "chart bars" in panel and "Effect on pictures" in effect
    seen.panel = Panel("old", "edit")
    panel, effect = tab_library.panel_html(desk, tab, seen)
    assert "<form" in panel and effect == ""
    desk.studio.shelf.remove("old")
    assert tab_library.panel_html(desk, tab, seen) == ("", "") and seen.panel is None


def test_the_cards_are_looked_up_again_only_now_and_then(desk: Desk, tab: tab_library.LibraryTab, entry: Entry) -> None:
    seen = Seen()
    first = tab_library.refresh(desk, tab, seen)
    assert entry.name in first[1]
    desk.studio.shelf.remove(entry.name)
    assert tab_library.refresh(desk, tab, seen, now=False)[1] == gr.skip()
    seen.library_seen -= tab_library.LOOK_EVERY
    assert "No adapters yet" in tab_library.refresh(desk, tab, seen, now=False)[1]


def test_the_form_changes_what_differs_and_nothing_if_anything_is_wrong(desk: Desk, tmp_path: Path) -> None:
    shelf = desk.studio.shelf
    old = desk.studio.import_adapter(sd15_file(tmp_path), "old")
    desk.studio.import_adapter(sd15_file(tmp_path, 1), "other")
    told = {"name": "older", "trigger": " a b ", "tags": "x, y ,,", "licence": "", "notes": "n", "family": ""}
    new = library_edit.save(desk, "old", told)
    assert (new.name, new.trigger, new.tags, new.notes) == ("older", "a b", ("x", "y"), "n")
    assert library_edit.save(desk, "older", {**told, "tags": "y"}).tags == ("y",)
    for wrong in ({"name": "other"}, {"family": "flux1"}, {"notes": "n" * 20_000}):
        with pytest.raises(IntarsiaError):
            library_edit.save(desk, "older", {**told, "licence": "MIT", **wrong})
        assert shelf.find("older").licence == old.licence
    html = library_edit.edit_html(new, desk.studio.inspect("older"))
    assert 'value="x, y"' in html and "SD 1.5" in html


# The effect


def test_the_effect_needs_a_model_of_the_family(desk: Desk, entry: Entry, tmp_path: Path) -> None:
    assert library_effect.model_for(desk, entry) == "mini"
    old = desk.studio.import_adapter(sd15_file(tmp_path))
    assert library_effect.model_for(desk, old) is None
    assert "No model it fits is at hand: put one for SD 1.5" in library_effect.effect_html(desk, old)
    real = replace(entry, base="sd_xl_base_1.0")
    assert library_effect.model_for(desk, real) is None, "Mini has widths of its own"


def test_the_effect_is_asked_for_watched_and_shown(desk: Desk, entry: Entry) -> None:
    assert "Measure effect" in library_effect.effect_html(desk, entry)
    job = library_effect.start(desk, entry.name, {"prompt": "a star"})
    assert isinstance(job.request, EffectRequest) and job.request.prompt == "a star"
    assert "effect-stop" in library_effect.effect_html(desk, entry)
    store = desk.studio.store
    assert store.claim("cpu") is not None
    made = job.folder / "effect.json"
    made.parent.mkdir(parents=True, exist_ok=True)
    made.write_text(
        '{"edges": [0, 0.25, 0.5], "base": [0.5, 0.1], "change": [0.01, 0.0], "low": 0.75, "base_low": 0.9,'
        ' "cut": 0.14, "pairs": []}'
    )
    store.append(job.id, [Artifact(kind="report", path=str(made))])
    store.finish(job.id, Done(seconds=1))
    html = library_effect.effect_html(desk, entry)
    assert "75.0% of what it changes" in html and "Measure again" in html and 'value="a star"' in html
    made.unlink()
    assert "figures are gone" in library_effect.effect_html(desk, entry)
    again = library_effect.start(desk, entry.name, {})
    assert store.claim("cpu") is not None
    store.finish(again.id, Failed(code="x", message="No <room>.", hint="Free some."))
    assert "No &lt;room&gt;. Free some." in library_effect.effect_html(desk, entry)


# Charts


@pytest.mark.parametrize("high", [1e-9, 0.003, 0.9, 1.0, 3.0, 9.99, 12345.0, 7e12])
def test_ticks_are_few_even_and_reach_the_top(high: float) -> None:
    ticks = plots.nice_ticks(high)
    assert ticks[0] == 0 and 3 <= len(ticks) <= 6
    assert ticks[-1] >= high * (1 - 1e-6) and ticks[-2] < high
    assert ticks == pytest.approx([index * ticks[1] for index in range(len(ticks))])
    assert all(tick == round(tick) for tick in plots.nice_ticks(high, whole=True))


def test_bars_are_as_long_as_their_values_and_said_in_words() -> None:
    html = plots.bars("Norms", "units", [Bar("a & b", 4.0), Bar("c", 2.0, True), Bar("d", None)])
    long, short = (float(width) for width in re.findall(r'<rect[^>]* width="([\d.]+)"', html))
    assert long == pytest.approx(2 * short, rel=0.01)
    assert 'aria-label="Norms. a &amp; b 4; c 2; d not known"' in html
    assert "units" in html and "not known</text>" in html
    assert "<svg" in plots.bars("None", "", [])


def test_columns_hold_every_layer_however_many_ranks_there_are() -> None:
    many = [(rank, 1 + rank % 3) for rank in range(1, 300, 2)]
    columns = plots.histogram(many)
    assert len(columns) <= plots.COLUMNS
    assert sum(count for _, count in columns) == sum(count for _, count in many)
    assert plots.histogram([(4, 2), (8, 5)]) == [("4", 2), ("8", 5)]
    html = plots.columns("Ranks", "rank", "layers", [("4", 2), ("8", 5)])
    heights = [float(height) for height in re.findall(r'<rect[^>]* height="([\d.]+)"', html)]
    assert heights[1] == pytest.approx(2.5 * heights[0], rel=0.01)


def test_lines_take_zeros_and_nothing_else_breaks_them() -> None:
    html = plots.lines(
        "P", "y", "x", [0.1, 0.4], [Line("one", "base", [1.0, 0.01]), Line("two", "change", [0, 0])], 0.5
    )
    first, second = re.findall(r'<polyline class="\w+" points="([^"]+)"', html)
    (_, high), (_, low) = ((float(n) for n in point.split(",")) for point in first.split())
    assert high < low, "y grows downwards"
    assert {point.split(",")[1] for point in second.split()} == {f"{plots.FLOOR:.1f}"}
    assert "<polyline" in plots.lines("P", "", "", [0.1], [Line("none", "base", [0.0])])
