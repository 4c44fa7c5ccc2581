"""The library is asked by a prompt: the adapter whose words are said comes first, others of other families never."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import composition_fakes as fakes
import pytest
from adapter_files import low_rank
from intarsia.app.cli import app
from intarsia.app.settings import Home
from intarsia.app.studio import Change, Studio
from intarsia.app.suggest import words
from intarsia.pipelines.adapter_file import write_adapter
from intarsia.pipelines.errors import InputError
from typer.testing import CliRunner

Tiny = Callable[..., Path]


@pytest.fixture
def studio(tiny: Tiny, home: Home, tmp_path: Path) -> Studio:
    """A library with three adapters for a tiny SDXL model and one for SD1.5."""
    studio = Studio(home)
    for index, (name, family) in enumerate((("apple", "sdxl"), ("dog", "sdxl"), ("blue-cat", "sdxl"), ("cat", "sd15"))):
        path = tmp_path / f"{name}.safetensors"
        write_adapter(path, low_rank(fakes.random_adapter(fakes.tiny_model(tiny, family), index + 1)), {})
        studio.import_adapter(path)
    return studio


def test_what_a_prompt_says_comes_first(studio: Studio, tiny: Tiny) -> None:
    model = str(tiny("sdxl"))
    assert [one.name for one in studio.suggest("a dog, a photo", model, 1)] == ["dog"]
    assert {one.name for one in studio.suggest("a dog", model, 9)} == {"apple", "dog", "blue-cat"}
    studio.shelf.edit("apple", Change(notes="photo of a red dog"))
    assert studio.suggest("photo of a red dog", model, 1)[0].name == "apple"
    with pytest.raises(InputError, match="empty"):
        studio.suggest(" ", model)


def test_the_words_of_an_entry_are_read_as_words(studio: Studio) -> None:
    assert words(studio.shelf.find("blue-cat")) == ("blue cat",)


def test_the_command_lists_them(studio: Studio, tiny: Tiny) -> None:
    studio.close()
    asked = ["adapters", "suggest", "a dog, a photo", "--model", str(tiny("sdxl")), "--count", "2"]
    found = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert next(one["name"] for one in found) == "dog" and len(found) == 2
    refused = CliRunner().invoke(app, ["adapters", "suggest", "", "--model", str(tiny("sdxl"))])
    assert refused.exit_code == 2 and "The prompt is empty" in refused.output
