"""The splits: what is held out is never trained on, and lists that were edited are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from intarsia.pipelines.errors import InputError
from intarsia.training import splits
from intarsia.training.corpus import HELD_OUT_SETS, SETS, Captioned
from intarsia.training.procedural import STAINED_GLASS

# Written here a second time: whoever changes a split with its hash must also change a test.
HASHES = {
    splits.CONTENTS: "7953fe0849ae3320105d5482cb881e3c6a0a82d26e7446a7c85cdaf2ac8c2fb1",
    splits.STYLES: "ed4003563a57f2a7c8da2893466d970fd789e80364fabc751e499defb55c88c1",
    splits.TRAINING: "ff3bd1b32c68b2a076f0d36563af2c226aa5e42e4acdf93222f3817359cbed18",
}
SPLITS = Path(splits.__file__).parents[1] / "assets" / "splits"


def training_rows() -> list[Captioned]:
    """One row per training content in every training style: what a whole corpus holds and more, without pictures."""
    rows: list[Captioned] = []
    for entry in splits.read_split(splits.TRAINING):
        known, _, tags = entry.partition("\t")
        code, group, name = known.split(" ", 2)
        rows += [
            Captioned(f"{s.style}/{code}.webp", name, s.style, tuple(tags.split(", ")), group, code, "train")
            for s in SETS
        ]
    return rows


@pytest.fixture(scope="module")
def rows() -> list[Captioned]:
    return training_rows()


@pytest.mark.parametrize("name", HASHES)
def test_a_split_is_the_one_that_was_written_down(name: str) -> None:
    assert splits.entries_hash(splits.read_split(name)) == HASHES[name]


@pytest.mark.parametrize("name", HASHES)
def test_an_edited_split_is_refused(name: str, tmp_path: Path) -> None:
    text = (SPLITS / name).read_text("utf-8")
    without_last = "\n".join(text.splitlines()[:-1]) + "\n"
    unhashed = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("# sha256"))
    for edited in (without_last, text + "1F408 animals cat\n", unhashed):
        (tmp_path / name).write_text(edited, "utf-8")
        with pytest.raises(InputError, match="was edited"):
            splits.read_split(name, tmp_path)


def test_no_content_and_no_style_is_on_both_sides(rows: list[Captioned]) -> None:
    hidden = splits.held_out_contents()
    assert len(hidden) == 60
    assert not {row.code for row in rows} & set(hidden)
    assert not {row.content for row in rows} & set(hidden.values())
    assert len({row.code for row in rows}) == 1360
    assert splits.held_out_styles() == {item.style for item in HELD_OUT_SETS} | {STAINED_GLASS}
    assert not splits.held_out_styles() & {item.style for item in SETS}
    groups = {entry.split(" ")[1] for entry in splits.read_split(splits.CONTENTS)}
    assert groups == {row.group for row in rows}


def test_training_rows_pass_the_guard(rows: list[Captioned]) -> None:
    splits.check_training_rows(rows)


@pytest.mark.parametrize(
    ("planted", "what"),
    [
        ({"code": "1F405", "content": "striped animal"}, "tiger"),
        ({"code": "1f5a5-fe0f", "content": "screen"}, "desktop computer"),
        ({"style": "stained-glass"}, "style “stained-glass”"),
        ({"split": "held-out"}, "split “held-out”"),
        ({"content": "tiger"}, "tiger"),
        ({"content": "a Tiger on a blue background, my style"}, "tiger"),
        ({"content": "a red apple left of a glass of milk"}, "glass of milk"),
    ],
)
def test_a_planted_row_is_named(rows: list[Captioned], planted: dict[str, str], what: str) -> None:
    spoiled = [*rows[:50], replace(rows[50], **planted), *rows[51:60]]
    with pytest.raises(InputError, match=what):
        splits.check_training_rows(spoiled)


def test_longer_names_and_keywords_of_training_contents_are_no_leak() -> None:
    allowed = (
        "a tiger face, noto style",
        "tiger, animal, pet, twemoji style",
        "an open mailbox on a fog-grey wall",
        "",
    )
    splits.check_captions(allowed, {"tiger", "animal", "pet"})
    for caption in (
        *("a tiger, animal, pet", "tiger face and a tiger", "a tiger on a white background", "tiger style, the tiger"),
        *("a cat above a fog", "a cat, a goat and a pizza", "a dog, stained-glass style"),
    ):
        with pytest.raises(InputError, match="held-out"):
            splits.check_captions([caption], {"tiger", "animal", "pet"})


def test_thousands_of_planned_captions_name_nothing_held_out_and_a_planted_name_fails(rows: list[Captioned]) -> None:
    from intarsia.training.scenes import Planner

    keywords = {tag for row in rows for tag in row.tags}
    rng = np.random.default_rng(11)
    for scenes in (0.2, 1.0):
        captions = [plan.caption for plan in Planner(rows, scenes).draw(2000, rng)]
        assert len(set(captions)) > 1500
        splits.check_captions(captions, keywords)
    milk = [replace(row, content="glass of milk") if row.content == "baby bottle" else row for row in rows]
    assert milk != rows
    with pytest.raises(InputError, match="glass of milk"):
        splits.check_training_rows(milk)
    few = [row for row in milk if row.group == "food"]
    spoiled = [plan.caption for plan in Planner(few).draw(3000, rng)]
    with pytest.raises(InputError, match="glass of milk"):
        splits.check_captions(spoiled, keywords)
