"""Layout files: one schema for page, command line and job; what is wrong is said in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from intarsia.composition.layout import ComposeRequest, ConceptUse, parse_layout, read_layout, write_layout
from intarsia.pipelines.errors import InputError

TEXT = """
version: 1
canvas: {width: 256, height: 192}
prompt: a cat left of a dog, noto style
styles: [{adapter: pencil, weight: 0.8}]
concepts:
  - {adapter: my-cat, prompt: "a cat, noto style", box: [0, 0.25, 0.5, 0.75]}
  - {adapter: dog.safetensors, name: rex, weight: 0.9, prompt: a dog, mask: dog.png, order: 2}
method: region
options: {edge: 2}
seeds: [1, 2]
"""


def test_a_layout_file_is_read_with_its_shorthands(tmp_path: Path) -> None:
    for name in ("dog.safetensors", "dog.png"):
        (tmp_path / name).write_bytes(b"x")
    path = tmp_path / "two.yaml"
    path.write_text(TEXT)
    found = read_layout(path)
    assert (found.width, found.height, found.seeds) == (256, 192, (1, 2))
    cat, rex = found.concepts
    assert (cat.called, cat.phrase, cat.adapter) == ("my-cat", "a cat", "my-cat")
    assert (rex.called, rex.adapter, rex.mask) == ("rex", str(tmp_path / "dog.safetensors"), str(tmp_path / "dog.png"))
    assert [(use.method, use.options) for use in found.methods] == [("region", {"edge": 2})]
    assert found.styles[0].weight == 0.8


@pytest.mark.parametrize("as_json", [False, True])
def test_what_is_written_reads_as_the_same_request(tmp_path: Path, as_json: bool) -> None:
    import yaml

    request = parse_layout(yaml.safe_load(TEXT))
    path = tmp_path / ("x.json" if as_json else "x.yaml")
    path.write_text(write_layout(request, as_json))
    assert read_layout(path) == request
    assert json.loads(path.read_text())["version"] == 1 if as_json else path.read_text().startswith("version: 1")
    assert "scheduler" not in path.read_text()  # nothing that is as usual


def test_without_a_prompt_the_concepts_speak() -> None:
    uses = [{"adapter": "a", "prompt": "a cat"}, {"adapter": "b", "prompt": "a dog"}, {"adapter": "c"}]
    assert parse_layout({"concepts": uses}).said == "a cat, a dog"


CAT: dict[str, Any] = {"adapter": "cat", "prompt": "a cat"}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("outside", {"concepts": [CAT | {"box": [0.5, 0, 1.2, 1]}]}, "outside the canvas"),
    ("empty", {"concepts": [CAT | {"box": [0.5, 0, 0.5, 1]}]}, "empty"),
    ("turned", {"concepts": [CAT | {"box": [0.9, 0, 0.1, 1]}]}, "empty"),
    ("three", {"concepts": [CAT | {"box": [0, 0, 1]}]}, "four fractions"),
    ("words", {"concepts": [CAT | {"box": "left"}]}, "four fractions"),
    ("twice", {"concepts": [CAT, CAT]}, "called cat"),
    ("with style", {"concepts": [CAT], "styles": [{"adapter": "cat"}]}, "called cat"),
    ("many", {"concepts": [CAT | {"name": str(n)} for n in range(11)]}, "at most 10"),
    ("seeds", {"concepts": [CAT], "seeds": [1, 1]}, "twice"),
    ("no seeds", {"concepts": [CAT], "seeds": []}, "at least one"),
    ("negative seed", {"concepts": [CAT], "seeds": [-1]}, "0 to"),
    ("key", {"concepts": [CAT], "colour": "red"}, "no setting called colour"),
    ("both", {"method": "merge", "methods": []}, "both method and methods"),
    ("none", {"concepts": [CAT], "methods": []}, "Name a method"),
    ("size", {"concepts": [CAT], "canvas": {"width": 100}}, "multiple of 8"),
    ("newer", {"concepts": [CAT], "version": 2}, "most is 1"),
    ("weight", {"concepts": [CAT | {"weight": "heavy"}]}, "must be a number"),
]


@pytest.mark.parametrize(("values", "said"), [wrong[1:] for wrong in WRONG], ids=[wrong[0] for wrong in WRONG])
def test_what_is_wrong_is_said_in_words(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_layout(values)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.txt", "a: 1", "no layout file"),
        ("x.yaml", "a: [1", "no YAML"),
        ("x.yaml", "- 1", "holds no layout"),
        ("x.yaml", "", "holds no layout"),
        ("x.json", "{", "no YAML"),
    ],
)
def test_a_file_that_is_no_layout_is_refused(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        read_layout(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no layout .*gone\.yaml"):
        read_layout(tmp_path / "gone.yaml")


def test_a_request_survives_json() -> None:
    request = ComposeRequest(concepts=(ConceptUse(adapter="a", box=(0.1, 0.2, 0.3, 0.4)),))
    assert ComposeRequest.from_json(request.to_json()) == request
