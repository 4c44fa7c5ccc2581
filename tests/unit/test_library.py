"""The library's index: search, filters, counts, a person's changes, the trash, and taking over the older table."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from adapter_files import attention, kohya, lora, matrices, peft, write
from intarsia.app.library_entry import MAX_TAGS
from intarsia.app.library_index import Card, Index, Place
from intarsia.app.settings import Home
from intarsia.app.shelf import Change, Entry, Page, Query, Shelf
from intarsia.pipelines.errors import AdapterError, InputError

SOME = dict(list(attention(matrices("sd15")).items())[::20])
LARGE = dict(list(attention(matrices("sdxl")).items())[::40])
OLD_TABLE = """CREATE TABLE adapters (
    name TEXT PRIMARY KEY COLLATE NOCASE, sha256 TEXT NOT NULL, file TEXT NOT NULL, created REAL NOT NULL,
    card TEXT NOT NULL)"""


def entry(name: str, number: int = 0, family: str = "sd15", algorithm: str = "lora", size: int = 1) -> Entry:
    return Entry(
        name=name, path=Path(f"{name}.safetensors"), family=family, algorithm=algorithm, rank=4, role="concept",
        trigger="", sha256=f"{number:064x}", base="", modules=1, matched=1, size=size, created=float(number),
    )  # fmt: skip


def fill(home: Home, *entries: Entry) -> Shelf:
    """List entries without files."""
    index = Index(home)
    with index.writing() as db:
        for one in entries:
            index.put(db, Card(0, one, Place("", one.path.name, one.size, 0)))
    return Shelf(home)


def names(page: Page) -> list[str]:
    return [one.name for one in page.entries]


def found(shelf: Shelf, text: str) -> list[str]:
    return names(shelf.page(Query(text, sort="name")))


def add(home: Home, folder: Path, name: str, seed: int = 0, metadata: dict[str, str] | None = None) -> Entry:
    return Shelf(home).add(write(folder / f"{name}.safetensors", lora(SOME, peft, seed=seed), metadata))


def test_search_finds_every_word_by_its_beginning_in_all_that_a_card_says(home: Home) -> None:
    shelf = fill(
        home,
        replace(entry("DetailTweakerXL", 1), base="Juggernaut"),
        replace(entry("ink_wash-v2", 2), trigger="sumi style", triggers=("bamboo",)),
        replace(entry("Müller", 3), title="Portrait of a miller"),
    )
    shelf.note("Müller", "better at 0.7, says (Ana)")
    shelf.tag("ink_wash-v2", ["black & white"])
    cases = {
        "tweak": ["DetailTweakerXL"], "detail XL": ["DetailTweakerXL"], "jugger": ["DetailTweakerXL"],
        "wash": ["ink_wash-v2"], "ink_wash": ["ink_wash-v2"], "sumi ink": ["ink_wash-v2"], "bam": ["ink_wash-v2"],
        "white": ["ink_wash-v2"], "muller": ["Müller"], "MÜLL": ["Müller"], "ana 0.7": ["Müller"],
        "portrait": ["Müller"], "sumi tweak": [], "weaker": [], "!!!": [], 'a" OR "b': [], "  ": 3 * [""],
    }  # fmt: skip
    for text, expected in cases.items():
        if text.strip():
            assert found(shelf, text) == expected, text
        else:
            assert len(found(shelf, text)) == len(expected)


def test_pages_are_filtered_sorted_cut_and_counted(home: Home) -> None:
    shelf = fill(
        home,
        entry("b", 1, "sd15", "lora", size=30),
        entry("A", 2, "sdxl", "lora", size=10),
        entry("c", 3, "sdxl", "dora", size=20),
    )
    shelf.tag("b", ["ink"])
    shelf.tag("c", ["ink", "paper"])
    shelf.favourite("c")
    assert names(shelf.page(Query())) == ["c", "A", "b"]
    assert names(shelf.page(Query(sort="name"))) == ["A", "b", "c"]
    assert names(shelf.page(Query(sort="size"))) == ["b", "c", "A"]
    page = shelf.page(Query(sort="name", offset=1, limit=1))
    assert (names(page), page.total) == (["b"], 3)
    page = shelf.page(Query(family="sdxl"))
    assert (names(page), page.total) == (["c", "A"], 2)
    assert page.families == {"sdxl": 2, "sd15": 1}, "what else there is stays in sight"
    assert (page.algorithms, page.tags) == ({"dora": 1, "lora": 1}, {"ink": 1, "paper": 1})
    assert names(shelf.page(Query(family="sdxl", algorithm="dora", tag="INK"))) == ["c"]
    assert names(shelf.page(Query(favourite=True))) == ["c"]
    assert names(shelf.page(Query("c", role="concept"))) == ["c"] and names(shelf.page(Query(role="style"))) == []
    assert names(shelf.page(Query(folder="/elsewhere"))) == [] and len(shelf.page(Query(folder="")).entries) == 3


@pytest.mark.parametrize("wrong", [{"sort": "colour"}, {"limit": 0}, {"offset": -1}])
def test_impossible_queries_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError):
        Query(**wrong)  # type: ignore[arg-type]


def test_a_persons_changes_are_kept_and_searched(home: Home, tmp_path: Path) -> None:
    add(home, tmp_path, "cat")
    shelf = Shelf(home)
    change = Change("Kitten", True, "for  Ana", "CC0", "a [c] cat", tag=(" two  words ", "b", "B"))
    changed = shelf.edit("cat", change)
    assert changed == Shelf(home).find("kitten") == shelf.entries()[0]
    assert (changed.name, changed.favourite, changed.notes, changed.licence, changed.trigger, changed.tags) == (
        "Kitten", True, "for  Ana", "CC0", "a [c] cat", ("b", "two words"),
    )  # fmt: skip
    assert changed.path.name == "cat.safetensors", "the file keeps its name"
    assert found(shelf, "ana cat two") == ["Kitten"] and found(shelf, "cat kitten") == ["Kitten"]
    assert shelf.untag("Kitten", ["B"]).tags == ("two words",)
    assert not shelf.favourite("Kitten", False).favourite
    assert shelf.rename("Kitten", "kitten").name == "kitten", "only the case of letters"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tag": ["x" * 41]}, "1 to 40 characters"),
        ({"tag": [" "]}, "1 to 40 characters"),
        ({"notes": "x" * 10_001}, "at most 10,000"),
        ({"licence": "x" * 301}, "at most 300"),
        ({"trigger": "x" * 301}, "at most 300"),
    ],
)
def test_texts_have_bounds(change: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Change(**change)  # type: ignore[arg-type]


def test_a_change_that_cannot_be_made_changes_nothing(home: Home, tmp_path: Path) -> None:
    add(home, tmp_path, "a")
    before = add(home, tmp_path, "b", 1)
    shelf = Shelf(home)
    for change in (Change("A", favourite=True), Change("...", notes="x")):
        with pytest.raises(InputError):
            shelf.edit("b", change)
    with pytest.raises(InputError, match=f"more than {MAX_TAGS} tags"):
        shelf.tag("b", [f"t{number}" for number in range(MAX_TAGS + 1)])
    with pytest.raises(AdapterError, match="no adapter called c"):
        shelf.note("c", "x")
    assert shelf.find("b") == before and found(shelf, "t3") == []


def test_a_renamed_b_lora_keeps_its_halves(home: Home, tmp_path: Path) -> None:
    both = {p: s for p, s in attention(matrices("sdxl")).items() if ".up_blocks.0.attentions." in p}
    both = {p: s for p, s in both.items() if ".attentions.2" not in p}
    Shelf(home).add(write(tmp_path / "cat.safetensors", lora(both, kohya, rank=1)))
    Shelf(home).split("cat")
    Shelf(home).rename("cat", "dog")
    assert [(one.name, one.source) for one in Shelf(home).group("dog")] == [
        ("cat-content", "cut from cat"),
        ("cat-style", "cut from cat"),
    ]


def test_the_trash_gives_back_what_was_removed(home: Home, tmp_path: Path) -> None:
    first = add(home, tmp_path, "cat")
    shelf = Shelf(home)
    shelf.tag("cat", ["ink"])
    shelf.remove("CAT")
    assert names(shelf.page(Query())) == [] and found(shelf, "cat") == []
    trashed = shelf.page(Query(trashed=True))
    assert names(trashed) == ["cat"] and trashed.entries[0].trashed and trashed.tags == {"ink": 1}
    with pytest.raises(AdapterError, match="no adapter called cat"):
        shelf.find("cat")
    (tmp_path / "2").mkdir()
    other = add(home, tmp_path / "2", "cat", 1)
    assert other.name == "cat" and other.path != first.path, "its name is free, its file is not touched"
    back = shelf.restore("cat")
    assert (back.name, back.tags, back.path) == ("cat-2", ("ink",), first.path)
    assert shelf.find("cat-2") == back
    with pytest.raises(AdapterError, match="no adapter called cat in the trash"):
        shelf.restore("cat")


def test_importing_a_file_that_lies_in_the_trash_restores_it(home: Home, tmp_path: Path) -> None:
    old = add(home, tmp_path, "cat")
    shelf = Shelf(home)
    shelf.note("cat", "mine")
    shelf.remove("cat")
    back = shelf.add(tmp_path / "cat.safetensors")
    assert (back.notes, back.path, back.trashed) == ("mine", old.path, False)
    assert shelf.page(Query(trashed=True)).total == 0
    shelf.remove("cat")
    old.path.unlink()
    assert not shelf.add(tmp_path / "cat.safetensors").missing, "also when its file is gone"


def test_a_replaced_entry_goes_to_the_trash(home: Home, tmp_path: Path) -> None:
    add(home, tmp_path, "cat")
    other = write(tmp_path / "b.safetensors", lora(SOME, peft, seed=1))
    new = Shelf(home).add(other, "cat", replace=True, numbered=True)
    assert Shelf(home).find("cat") == new
    assert [one.sha256 == new.sha256 for one in Shelf(home).page(Query(trashed=True)).entries] == [False]


def test_emptying_the_trash_spares_a_file_that_is_another_one_now(home: Home, tmp_path: Path) -> None:
    old = add(home, tmp_path, "cat")
    Shelf(home).remove("cat")
    write(old.path, lora(SOME, peft, seed=1))
    Shelf(home).empty_trash()
    assert old.path.is_file()


def test_what_a_header_says_of_itself_is_text_within_bounds(home: Home, tmp_path: Path) -> None:
    said = {"license": "CC-BY\x00-4.0", "author": "A" * 5000, "title": "<b>T</b>", "description": "one\ntwo\x1b[2J"}
    made = add(home, tmp_path, "a", metadata={f"modelspec.{key}": text for key, text in said.items()})
    assert (made.licence, made.title, made.description) == ("CC-BY-4.0", "<b>T</b>", "one\ntwo[2J")
    assert len(made.author) == 300 and made.source == f"imported from {tmp_path / 'a.safetensors'}"
    assert (made.alpha, made.dtypes, made.ranks) == ((2.0, 2.0), ("F32",), ((2, len(SOME)),))


def old_home(home: Home, folder: Path) -> list[Entry]:
    """Make a home as it was before: files, and a table of JSON cards."""
    made = [add(home, folder, f"old{number}", number, {"modelspec.license": "MIT"}) for number in range(3)]
    (home.adapters / "old0.webp").write_bytes(b"picture")
    fields = (
        *("name", "family", "algorithm", "rank", "role", "trigger", "sha256", "base", "modules", "matched", "size"),
        *("created", "group", "halves", "triggers", "warnings"),
    )
    home.database.unlink()
    with sqlite3.connect(home.database) as db:
        db.execute(OLD_TABLE)
        for one in made:
            values = {name: getattr(one, name) for name in fields} | {"path": one.path.name}
            values["thumbnail"] = "old0.webp" if one.name == "old0" else None
            row = (one.name, one.sha256, one.path.name, one.created, json.dumps(values))
            db.execute("INSERT INTO adapters VALUES (?, ?, ?, ?, ?)", row)
    return made


def test_the_older_table_is_taken_over_without_loss(home: Home, tmp_path: Path) -> None:
    made = old_home(home, tmp_path)
    made[2].path.unlink()
    taken = Shelf(home).entries()
    assert [(one.name, one.path, one.sha256, one.created, one.trigger) for one in taken] == [
        (one.name, one.path, one.sha256, one.created, one.trigger) for one in made
    ]
    assert taken[0].thumbnail == home.adapters / "old0.webp" and taken[2].missing
    assert found(Shelf(home), "old1") == ["old1"]
    assert Shelf(home).scan().missing == 1
    known = Shelf(home).find("old1")  # a scan fills in what the older cards did not have
    assert (known.dtypes, known.ranks, known.licence) == (made[1].dtypes, made[1].ranks, "MIT")
    assert len(Shelf(home).entries()) == 3
    with sqlite3.connect(home.database) as db:
        assert db.execute("SELECT name FROM sqlite_master WHERE name = 'adapters'").fetchall() == []


def test_an_older_table_that_cannot_be_read_stays_as_it_is(home: Home, tmp_path: Path) -> None:
    old_home(home, tmp_path)
    with sqlite3.connect(home.database) as db:
        db.execute("UPDATE adapters SET card = '{' WHERE name = 'old1'")
    for _ in range(2):
        with pytest.raises(ValueError, match="property name"):
            Shelf(home).entries()
    with sqlite3.connect(home.database) as db:
        assert db.execute("SELECT count(*) FROM adapters").fetchone() == (3,)


def test_processes_that_take_over_at_the_same_time_do_it_once(home: Home, tmp_path: Path) -> None:
    old_home(home, tmp_path)
    counts: list[int] = []
    threads = [threading.Thread(target=lambda: counts.append(len(Shelf(home).entries()))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [3] * 6


def test_a_page_of_ten_thousand_comes_quickly_and_stats_only_its_own_files(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    families = ("sd15", "sdxl", "flux1")
    many = (entry(f"adapter-{n:05}-{'ink' if n % 7 else 'oil'}", n, families[n % 3]) for n in range(10_000))
    shelf = fill(home, *many)
    asked: list[Path] = []
    monkeypatch.setattr(Path, "is_file", lambda path: bool(asked.append(path)))  # type: ignore[misc]
    for query in (Query(), Query("oil 0"), Query(sort="name", offset=9000), Query(sort="size", family="sdxl")):
        began = time.perf_counter()
        page = shelf.page(query)
        assert [one.missing for one in page.entries] == [True] * 60
        assert time.perf_counter() - began < 1.0, "far above what it takes, far below a walk over all cards"
    assert len(asked) == 4 * 60
    assert shelf.page(Query("oil")).total == len(range(0, 10_000, 7))
