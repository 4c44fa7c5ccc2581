"""An adapter in use as one text: what is written is read again, whatever the numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from intarsia.pipelines.errors import InputError
from intarsia.pipelines.requests import AdapterUse

STARTS = st.from_regex(r"[a-z_]+(\.[a-z0-9_]+){0,4}", fullmatch=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat", AdapterUse(adapter="cat")),
        ("cat@0-0.6", AdapterUse(adapter="cat", last=0.6)),
        ("cat:0.8@mid=-0.5", AdapterUse(adapter="cat", weight=0.8, blocks={"mid": -0.5})),
        (
            "cat:0.8@unet.up_blocks.0=0.5,text_encoder=0@.25-1",
            AdapterUse(adapter="cat", weight=0.8, blocks={"unet.up_blocks.0": 0.5, "text_encoder": 0}, first=0.25),
        ),
        ("./a@2x.safetensors", AdapterUse(adapter="./a@2x.safetensors")),
        ("./a@0-1.safetensors:2", AdapterUse(adapter="./a@0-1.safetensors", weight=2)),
        ("./x=1@y=2/a.safetensors", AdapterUse(adapter="./x=1@y=2/a.safetensors")),
    ],
)
def test_parts_and_steps_stand_behind_the_weight(text: str, expected: AdapterUse) -> None:
    assert AdapterUse.read(text) == expected
    assert AdapterUse.read(expected.spelled) == expected


@given(
    weight=st.floats(-7, 7),
    blocks=st.dictionaries(STARTS, st.floats(-9, 9), max_size=3),
    first=st.floats(0, 1),
    last=st.floats(0, 1),
)
def test_what_is_spelled_is_read_again(weight: float, blocks: dict[str, float], first: float, last: float) -> None:
    use = AdapterUse(adapter="a-cat_2", weight=weight, blocks=blocks, first=first, last=last)
    assert AdapterUse.read(use.spelled) == use


@pytest.mark.parametrize("text", ["cat@mid=much", "cat:0.5@mid=1,up=", "cat@mid=1,up"])
def test_a_part_without_a_factor_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="no part of an adapter"):
        AdapterUse.read(text)
