"""Refusals of values: plain sentences that name the option, the value and the way out."""

from __future__ import annotations

from typing import Any, cast

import pytest
from intarsia.pipelines.errors import InputError
from intarsia.pipelines.options import Options, option
from intarsia.pipelines.requests import AdapterUse, GenerateRequest, TrainRequest
from pydantic import field_validator

JARGON = ("input", "string", "parse", "validation", "literal", "type=", "pydantic", "'str'")


class Sample(Options):
    """One option of every kind, and limits of every kind."""

    needed: str = option(cast(str, ...), label="Needed", help="What is needed.")
    ratio: float = option(1.0, label="Ratio", low=0.5)
    few: int = option(1, label="Few", high=3)
    free: int = option(1, label="Free")
    switch: bool = option(False, label="Switch")
    short: str = option("abc", label="Short", low=2, high=5)
    uses: tuple[AdapterUse, ...] = ()

    @field_validator("free")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("it must be odd")
        return value


SAID: list[tuple[type[Options], dict[str, Any], str, str]] = [
    (GenerateRequest, {"steps": 0}, "Steps cannot be 0: the least is 1.", "Choose a number from 1 to 200."),
    (GenerateRequest, {"steps": "900"}, "Steps cannot be 900: the most is 200.", "Choose a number from 1 to 200."),
    (GenerateRequest, {"width": 250}, "Width cannot be 250: it must be a multiple of 8.", "Try 248 or 256."),
    (GenerateRequest, {"height": "8"}, "Height cannot be 8: the least is 16.", "Choose a number from 16 to 4096."),
    (GenerateRequest, {"width": 4095}, "Width cannot be 4095: it must be a multiple of 8.", "Try 4088 or 4096."),
    (GenerateRequest, {"steps": "many"}, "Steps cannot be 'many': it must be a whole number.", "from 1 to 200."),
    (GenerateRequest, {"steps": 2.5}, "Steps cannot be 2.5: it must be a whole number.", "from 1 to 200."),
    (GenerateRequest, {"steps": None}, "Steps is empty.", "from 1 to 200."),
    (GenerateRequest, {"guidance": "nan"}, "Guidance cannot be nan: it must be a number.", "from 0 to 30."),
    (GenerateRequest, {"count": 0}, "Pictures (count) cannot be 0: the least is 1.", "from 1 to 64."),
    (GenerateRequest, {"scheduler": "magic"}, "Scheduler cannot be 'magic'.", "Choose one of default, euler,"),
    (GenerateRequest, {"model": ""}, "Model is empty.", "Mini, a folder, a .safetensors checkpoint or a hub id."),
    (GenerateRequest, {"stepz": 1}, "There is no setting called stepz.", "The settings are: kind, model, prompt,"),
    (
        GenerateRequest,
        {"prompt": "a " * 5000},
        "Prompt is too long: it has 10,000 characters, at most 2,000 are allowed.",
        "Shorten it by 8,000 characters.",
    ),
    (GenerateRequest, {"prompt": 5}, "Prompt cannot be 5: it must be text.", ""),
    (AdapterUse, {"adapter": "a", "weight": 99.0}, "Weight cannot be 99: the most is 7.", "from -7 to 7."),
    (AdapterUse, {}, "Adapter is missing.", "Give it."),
    (TrainRequest, {}, "Recipe is missing.", "Give it."),
    (Sample, {}, "Needed is missing.", "What is needed."),
    (Sample, {"needed": "x", "ratio": 0.1}, "Ratio cannot be 0.1: the least is 0.5.", "Choose 0.5 or more."),
    (Sample, {"needed": "x", "few": 4}, "Few cannot be 4: the most is 3.", "Choose 3 or less."),
    (Sample, {"needed": "x", "free": "y"}, "Free cannot be 'y': it must be a whole number.", ""),
    (Sample, {"needed": "x", "free": 2}, "Free cannot be 2: it must be odd.", ""),
    (Sample, {"needed": "x", "switch": "perhaps"}, "Switch cannot be 'perhaps': it must be true or false.", ""),
    (Sample, {"needed": "x", "short": "a"}, "Short is too short: it has 1 characters, at least 2 are needed.", ""),
    (
        Sample,
        {"needed": "x", "uses": [{"adapter": "a"}, {"adapter": "b", "weight": 9}]},
        "Weight of uses entry 2 cannot be 9: the most is 7.",
        "Choose a number from -7 to 7.",
    ),
    (
        Sample,
        {"needed": "x", "uses": [{"adapter": "a", "no": 1}]},
        "no setting called no",
        "adapter, weight, blocks, first, last, sha256.",
    ),
]


@pytest.mark.parametrize(("cls", "values", "message", "hint"), SAID, ids=lambda value: str(value)[:40])
def test_a_wrong_value_is_named_in_plain_words(
    cls: type[Options], values: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(InputError) as caught:
        cls.parse(values)
    assert message in caught.value.message and hint in caught.value.hint
    assert not any(word in str(caught.value) for word in JARGON)


def test_settings_that_are_no_json_are_refused_in_plain_words() -> None:
    with pytest.raises(InputError, match=r"no JSON that can be read\. Copy them again"):
        GenerateRequest.from_json("{")
