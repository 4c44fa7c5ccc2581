"""The page's own logic, without a browser: forms, folded events, plots, escaping, and what it may import."""

from __future__ import annotations

import errno
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
import pytest
from intarsia.app.settings import Home
from intarsia.app.studio import Studio
from intarsia.app.ui import library_cards, pieces, rack
from intarsia.app.ui.desk import Desk, Seen, shown, uploaded
from intarsia.app.ui.forms import Form, FormBuilder, simple_form
from intarsia.app.ui.watch import Watch, Watcher
from intarsia.pipelines.errors import InputError, MemoryLimitError
from intarsia.pipelines.events import Artifact, Done, Event, Metric, Preview, Progress, Stage
from intarsia.pipelines.options import describe
from intarsia.pipelines.requests import AdapterUse, GenerateRequest
from intarsia.training.recipe import recipes
from PIL import Image


def generate_form() -> Form:
    with gr.Blocks():
        builder = FormBuilder(GenerateRequest, "")
        builder.place(
            *(info.name for info in describe(GenerateRequest) if info.kind != "other" and info.name != "kind")
        )
    return builder.build()


def test_what_a_form_shows_is_what_it_reads_back() -> None:
    form = generate_form()
    request = GenerateRequest(prompt="a key", seed=3, width=512, guidance=3.5, scheduler="euler", count=2)
    sent = dict(zip(form.components, form.show(request), strict=True))
    assert GenerateRequest.parse(form.read(sent)) == request


def test_an_empty_size_means_the_models_own() -> None:
    form = generate_form()
    sent = dict(zip(form.components, form.show(GenerateRequest()), strict=True))
    assert sent[form.controls["width"]] == ""
    assert GenerateRequest.parse(form.read(sent)).width is None


def test_an_emptied_number_is_named_and_a_wrong_text_is_refused() -> None:
    form = generate_form()
    sent = dict(zip(form.components, form.show(GenerateRequest()), strict=True))
    with pytest.raises(InputError, match="Seed is empty"):
        form.read({**sent, form.controls["seed"]: None})
    with pytest.raises(InputError, match="Width"):
        GenerateRequest.parse(form.read({**sent, form.controls["width"]: "wide"}))


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_recipe_gets_a_form_whose_defaults_are_its_own(name: str) -> None:
    options = recipes()[name].options
    with gr.Blocks():
        form = simple_form(options, "")
    sent = dict(zip(form.components, form.show(options()), strict=True))
    assert options.parse(form.read(sent)) == options()


def folded(events: Sequence[tuple[float, Event]]) -> Watch:
    watch = Watch()
    for now, event in events:
        watch.add(event, now)
    return watch


def test_events_fold_into_what_a_person_wants_to_know() -> None:
    watch = folded(
        [
            (0.0, Stage(name="denoise")),
            (0.0, Progress(stage="denoise", step=1, total=10)),
            (2.0, Progress(stage="denoise", step=5, total=10)),
            (2.0, Preview(path="p.png", step=4)),
        ]
    )
    assert (watch.step, watch.total, watch.fraction) == (5, 10, 0.5)
    assert watch.rate == pytest.approx(2.0)
    assert watch.left == pytest.approx(2.5)
    assert watch.preview == ("p.png", 4)
    watch.add(Artifact(kind="picture", path="a.png"), 3.0)
    watch.add(Done(seconds=3.0), 3.0)
    assert [artifact.path for artifact in watch.pictures] == ["a.png"]
    assert watch.seconds == 3.0


def test_a_backlog_read_at_once_gives_no_speed() -> None:
    steps = [(5.0, Progress(stage="denoise", step=step, total=10)) for step in range(1, 9)]
    assert folded(steps).rate == 0.0


def test_a_samples_stage_does_not_forget_how_far_training_is() -> None:
    watch = folded(
        [
            (0.0, Progress(stage="train", step=6, total=6)),
            (0.0, Metric(name="loss", value=0.5, step=6)),
            (0.0, Stage(name="sample")),
            (0.0, Stage(name="train")),
        ]
    )
    assert watch.reached["train"] == (6, 6)
    assert watch.losses == [(6, 0.5)]


def test_the_smoothed_loss_is_the_corrected_exponential_mean() -> None:
    losses = [(1, 4.0), (2, 0.0), (3, 2.0)]
    weight = 0.5
    expected = [
        sum(weight ** (k - i) * losses[i][1] for i in range(k + 1)) / sum(weight ** (k - i) for i in range(k + 1))
        for k in range(3)
    ]
    assert [value for _, value in pieces.smoothed(losses, weight)] == pytest.approx(expected)


def test_a_value_is_sent_twice_and_then_left_alone() -> None:
    seen = Seen()
    assert [seen.fresh("a", "x") for _ in range(2)] == ["x", "x"]
    assert seen.fresh("a", "x") == gr.skip()
    assert seen.fresh("a", "y") == "y"


def test_the_page_reads_uploads_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    inside, outside = tmp_path / "cache" / "a.png", tmp_path / "secret.txt"
    inside.write_text("x")
    outside.write_text("x")
    assert uploaded(str(inside)) == inside.resolve()
    for path in (str(outside), str(tmp_path / "cache" / ".." / "secret.txt"), "", str(tmp_path / "cache" / "none")):
        with pytest.raises(InputError):
            uploaded(path)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InputError("Wrong <b>.", "Do this."), "Wrong &lt;b&gt;."),
        (OSError(errno.ENOSPC, "No space left on device"), "is full"),
        (sqlite3.OperationalError("database or disk is full"), "is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "/a/b: Permission denied."),
    ],
    ids=str,
)
def test_what_a_person_can_mend_reaches_the_page_as_a_toast(error: Exception, said: str) -> None:
    @shown
    def handler() -> None:
        raise error

    with pytest.raises(gr.Error) as caught:
        handler()
    assert said in caught.value.message and "hint" in caught.value.message


def test_a_full_disk_keeps_no_half_of_an_upload(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with Studio(home) as studio, pytest.raises(MemoryLimitError, match="disk is full"):
        studio.store_upload(tmp_path / "a.png")
    assert list(home.uploads.iterdir()) == []


def test_texts_from_files_are_escaped() -> None:
    from intarsia.app.shelf import Entry

    evil = '<img src=x onerror="alert(1)">'
    entry = Entry(
        name=evil, path=Path(f"{evil}.safetensors"), family="sdxl", algorithm="lora", rank=4, role="concept",
        trigger=evil, sha256="0" * 64, base=evil, modules=1, matched=1, size=1, created=0.0, warnings=(evil,),
    )  # fmt: skip
    html = library_cards.card(entry, Path())
    assert "<img src=x" not in html
    assert "&lt;img src=x" in html
    assert evil in rack.row(entry)["adapter"]  # a value: the script shows it as text


def test_a_rows_parts_and_steps_reach_the_request_and_come_back(home: Home) -> None:
    use = AdapterUse(adapter="mini-fast", weight=0.5, blocks={"unet.mid_block": 0.0}, first=0.1, last=0.6)
    with Studio(home) as studio:
        desk = Desk(studio, Watcher(studio))
        value, missing = rack.restored(desk, [use, AdapterUse(adapter="gone")])
        assert missing == ["mini-fast", "gone"]  # nothing is in the library yet
        studio.shelf.find("mini-fast")
        value, missing = rack.restored(desk, [use])
        assert missing == []
        assert rack.requested(value) == (use,)
        groups = studio.block_groups("mini-fast")
    assert "mid" in {group.title for group in groups}
    assert sum(group.layers for group in groups if not group.inside) == 248


def test_an_adapter_that_was_in_use_comes_back_as_it_was(home: Home) -> None:
    with Studio(home) as studio:
        entry = studio.shelf.find("mini-fast")
    before = rack.row(entry, AdapterUse(adapter="mini-fast", weight=0.25, blocks={"unet": 2.0}, last=0.5))
    value = {"uses": [], "kept": [before]}
    again = rack.with_entries(value, [entry])
    assert rack.requested(again) == (AdapterUse(adapter="mini-fast", weight=0.25, blocks={"unet": 2.0}, last=0.5),)
    assert rack.with_entries(again, [entry]) == again


def test_the_page_process_never_imports_torch() -> None:
    code = (
        "import sys, intarsia.app.ui.serve; "
        "print([name for name in ('torch', 'diffusers', 'transformers', 'peft') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
