"""Composition jobs end to end on tiny models: the command, the page's service, masks, scores, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import composition_fakes as fakes
import pytest
import torch
from adapter_files import low_rank
from intarsia.app.cli import app
from intarsia.app.settings import Home
from intarsia.app.studio import Studio
from intarsia.composition.layout import parse_layout
from intarsia.composition.run import boxes_of
from intarsia.pipelines.adapter_file import write_adapter
from intarsia.pipelines.errors import InputError, IntarsiaError
from intarsia.pipelines.events import Artifact, CancelToken, Done, Event, Failed, Stopped
from intarsia.pipelines.picture import read_settings
from PIL import Image
from typer.testing import CliRunner

Tiny = Callable[..., Path]
CLI = CliRunner()


@pytest.fixture
def layout(tiny: Tiny, home: Home, tmp_path: Path) -> dict[str, Any]:
    """Two concepts in two boxes, for a tiny SDXL model; the adapters are in the library."""
    model = fakes.tiny_model(tiny, "sdxl")
    with Studio(home) as studio:
        for index, name in enumerate(("apple", "cat")):
            path = tmp_path / f"{name}.safetensors"
            write_adapter(path, low_rank(fakes.random_adapter(model, index + 1)), {})
            studio.import_adapter(path)
    return {
        "model": str(tiny("sdxl")), "canvas": {"width": 64, "height": 64}, "prompt": "a apple and a cat", "steps": 2,
        "guidance": 3.0, "seeds": [1],
        "concepts": [
            {"adapter": "apple", "prompt": "a apple, style", "box": [0, 0, 0.5, 1]},
            {"adapter": "cat", "prompt": "a cat, style", "box": [0.5, 0, 1, 1]},
        ],
    }  # fmt: skip


def done(studio: Studio, values: dict[str, Any], token: CancelToken | None = None) -> list[Event]:
    return list(studio.run(parse_layout(values), token))


def test_every_method_and_seed_gives_a_picture_and_a_row(layout: dict[str, Any], home: Home) -> None:
    layout |= {"seeds": [1, 2], "methods": [{"method": name} for name in ("merge", "region")], "score": True}
    with Studio(home) as studio:
        events = done(studio, layout)
        assert isinstance(events[-1], Done)
        job = studio.jobs()[0]
        found = studio.comparison(job.id)
    assert found is not None
    assert [(row["method"], row["seed"]) for row in found["rows"]] == [
        ("merge", 1), ("region", 1), ("merge", 2), ("region", 2)
    ]  # fmt: skip
    labels = [event.label for event in events if isinstance(event, Artifact) and event.kind == "picture"]
    assert labels == ["merge, seed 1", "region, seed 1", "merge, seed 2", "region, seed 2"]
    for row in found["rows"]:
        assert row["passes"] == 4 and row["seconds"] > 0 and row["memory"] > 10**6
        assert row["scores"]["concepts"] == ["apple", "cat"] and len(row["scores"]["confusion"][1]) == 2
        assert row["scores"]["identity"] == [row["scores"]["confusion"][i][i] for i in range(2)]
        assert len(row["masks"]) == (2 if row["method"] == "region" else 0)
        for mask in row["masks"]:
            with Image.open(mask["path"]) as picture:
                assert picture.size == (8, 8)
        restored = read_settings(Path(row["picture"]))
        assert restored.request.seed == row["seed"] and [use.adapter for use in restored.request.adapters] == [
            "apple", "cat"
        ]  # fmt: skip
        with Image.open(row["picture"]) as picture:
            kept: dict[Any, Any] = dict(picture.info)
        single = json.loads(kept["intarsia"])["composition"]
        assert single["seeds"] == [row["seed"]] and single["methods"][0]["method"] == row["method"]
        assert all(use["sha256"] for use in single["concepts"])


def test_a_picture_of_a_comparison_is_the_picture_alone(layout: dict[str, Any], home: Home) -> None:
    methods = [{"method": name} for name in ("composite", "switch", "merge")]
    with Studio(home) as studio:
        together = [e.path for e in done(studio, layout | {"methods": methods, "seeds": [3, 4]})
                    if isinstance(e, Artifact) and e.kind == "picture"]  # fmt: skip
        alone = [e.path for e in done(studio, layout | {"methods": methods[1:2], "seeds": [4]})
                 if isinstance(e, Artifact) and e.kind == "picture"]  # fmt: skip
    with Image.open(together[4]) as first, Image.open(alone[0]) as second:
        assert first.tobytes() == second.tobytes()


def test_a_stop_keeps_what_was_finished(layout: dict[str, Any], home: Home) -> None:
    token = CancelToken()
    with Studio(home) as studio:
        seen: list[Event] = []
        for event in studio.run(parse_layout(layout | {"seeds": list(range(60))}), token):
            seen.append(event)
            if isinstance(event, Artifact) and event.kind == "report":
                token.cancel()
        assert isinstance(seen[-1], Stopped)
        found = studio.comparison(studio.jobs()[0].id)
    assert found is not None
    seeds = [row["seed"] for row in found["rows"]]  # a stop is looked for five times a second
    assert seeds == list(range(len(seeds))) and 0 < len(seeds) < 60


def painted(
    path: Path, size: tuple[int, int], colour: str = "white", box: tuple[int, int, int, int] | None = None
) -> str:
    picture = Image.new("L", size, 0)
    if box is not None or colour != "black":
        picture.paste(255, box or (0, 0, *size))
    picture.save(path)
    return str(path)


def test_a_mask_of_any_size_and_the_canvas_shape_is_a_place(layout: dict[str, Any], home: Home, tmp_path: Path) -> None:
    mask = painted(tmp_path / "m.png", (256, 256), box=(0, 0, 128, 256))
    with Studio(home) as studio:
        boxed = done(studio, layout)
        layout["concepts"][0] = {**layout["concepts"][0], "mask": mask, "box": None}
        masked = done(studio, layout)
    files = [
        next(e.path for e in events if isinstance(e, Artifact) and e.kind == "picture") for events in (boxed, masked)
    ]
    with Image.open(files[0]) as first, Image.open(files[1]) as second:
        assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize(
    ("kind", "said"),
    [("black", "black"), ("shape", "128 x 64 pixels"), ("gone", "no mask"), ("text", "not a picture")],
)
def test_a_mask_that_is_no_place_is_refused(
    layout: dict[str, Any], home: Home, tmp_path: Path, kind: str, said: str
) -> None:
    path = tmp_path / "m.png"
    if kind == "black":
        painted(path, (64, 64), "black")
    elif kind == "shape":
        painted(path, (128, 64))
    elif kind == "text":
        path.write_text("x")
    layout["concepts"][0]["mask"] = str(path)
    with Studio(home) as studio:
        try:
            final = done(studio, layout)[-1]
        except IntarsiaError as error:
            assert said in error.message
        else:
            assert isinstance(final, Failed) and said in final.message and final.code != "bug"


def test_an_adapter_of_another_family_is_refused(layout: dict[str, Any], home: Home, tiny: Tiny) -> None:
    with Studio(home) as studio:
        final = done(studio, layout | {"model": str(tiny("sd15"))})[-1]
    assert isinstance(final, Failed) and final.code == "adapter" and "apple" in final.message


def test_what_is_seen_of_a_mask_is_the_box_around_it() -> None:
    mask = torch.zeros(10, 20)
    mask[2:5, 4:10] = 1
    concept = fakes.Concept(
        fakes.Attachment("a", fakes.AdapterFile(Path("x"), "sdxl", "concept", "", {}, "", {})), mask=mask
    )
    assert boxes_of([concept, replace(concept, mask=None)]) == [(0.2, 0.2, 0.5, 0.5), (0.0, 0.0, 1.0, 1.0)]


def run(*arguments: str) -> Any:  # noqa: ANN401
    return CLI.invoke(app, ["compose", *arguments])


def test_the_command_draws_a_layout_and_writes_a_folder(layout: dict[str, Any], tmp_path: Path, home: Home) -> None:
    path = tmp_path / "two.json"
    path.write_text(json.dumps(layout))
    out = tmp_path / "out"
    result = run(str(path), "--method", "merge,region", "--seeds", "5,6", "--out", str(out), "--score", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert [(row["method"], row["seed"]) for row in report["rows"]] == [
        ("merge", 5), ("region", 5), ("merge", 6), ("region", 6)
    ]  # fmt: skip
    assert sorted(file.name for file in out.iterdir()) == [
        "comparison.json", "merge-5.png", "merge-6.png", "region-5.png", "region-6.png"
    ]  # fmt: skip
    again = json.loads((out / "comparison.json").read_text())
    assert again["rows"][0]["picture"] == str(out / "merge-5.png")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--method", "magic"), "no method 'magic'"),
        (("--seeds", "x"), "'x' is no seed"),
        (("--seeds", "-1"), "0 to"),
        (("--steps", "0"), "least is 1"),
        (("--width", "63"), "multiple of"),
    ],
)
def test_what_the_command_cannot_do_is_one_sentence(
    layout: dict[str, Any], tmp_path: Path, home: Home, arguments: tuple[str, ...], said: str
) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(json.dumps(layout))
    result = run(str(path), *arguments)
    assert result.exit_code == 2 and said in result.output and "Traceback" not in result.output


def test_a_method_that_needs_boxes_is_named_and_all_leaves_it_out(
    layout: dict[str, Any], tmp_path: Path, home: Home
) -> None:
    for concept in layout["concepts"]:
        del concept["box"]
    path = tmp_path / "two.yaml"
    path.write_text(json.dumps(layout))
    refused = run(str(path), "--method", "region")
    assert refused.exit_code == 2 and "Region needs a place for apple" in refused.output
    with Studio(home) as studio:
        request = parse_layout(layout)
        with pytest.raises(InputError, match="needs a place"):
            studio.submit(request)
