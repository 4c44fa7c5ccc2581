"""Adapters merged into weights: the same as hanging on, and afterwards every bit is where it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from intarsia.pipelines.adapter_types import AdapterFile, Layer
from intarsia.pipelines.attach import Attachment, attached
from intarsia.pipelines.dora import Decomposed
from intarsia.pipelines.errors import AdapterError
from intarsia.pipelines.kinds.difference import Difference
from intarsia.pipelines.kinds.lora import LowRank
from intarsia.pipelines.merged import merged
from torch import Tensor, nn


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.conv = nn.Linear(6, 10, dtype=dtype), nn.Conv2d(4, 8, 3, padding=1, dtype=dtype)
        self.bare, self.norm = nn.Linear(6, 10, bias=False, dtype=dtype), nn.LayerNorm(6, dtype=dtype)

    def forward(self, x: Tensor, picture: Tensor) -> tuple[Tensor, ...]:
        return self.linear(self.norm(x)), self.bare(x), self.conv(picture)


def some(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapter(seed: int, bare_bias: bool = False) -> AdapterFile:
    low = LowRank(some(2, 6, seed=seed), some(10, 2, seed=seed + 1), 1.0, some(10, seed=seed + 2))
    layers: dict[str, Layer] = {
        "unet.linear": low,
        "unet.bare": Decomposed(
            LowRank(low.down, low.up, 2.0, low.bias if bare_bias else None), some(10, seed=seed + 3).abs(), True
        ),
        "unet.conv": LowRank(some(2, 4, 3, 3, seed=seed + 4), some(8, 2, 1, 1, seed=seed + 5), 2.0),
        "unet.norm": Difference(some(6, seed=seed + 6), some(6, seed=seed + 7)),
    }
    return AdapterFile(Path("x"), "sd15", "concept", "", layers, "", {})


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return some(3, 6, seed=50).to(dtype), some(2, 4, 5, 5, seed=51).to(dtype)


USES = [Attachment("a", adapter(1), 0.7, {"unet.conv": 0.5}), Attachment("b", adapter(20), -0.3)]


def test_merging_is_the_same_as_hanging_on() -> None:
    net = Net()
    with torch.no_grad(), attached({"unet": net}, USES):
        hung = net(*inputs())
    with torch.no_grad(), merged({"unet": net}, USES) as matched:
        inside = net(*inputs())
    assert matched == {"a": "a: 4 of 4 modules matched", "b": "b: 4 of 4 modules matched"}
    for one, other, plain in zip(inside, hung, Net()(*inputs()), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        assert float((one - plain).norm()) > 0.1


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_afterwards_every_bit_is_as_before(dtype: torch.dtype, broken: bool) -> None:
    net = Net(dtype)
    before = {name: (value.data_ptr(), value.detach().clone()) for name, value in net.state_dict().items()}
    try:
        with merged({"unet": net}, USES):
            assert not all(torch.equal(value, before[name][1]) for name, value in net.state_dict().items())
            if broken:
                raise RuntimeError("in the middle")
    except RuntimeError:
        assert broken
    for name, value in net.state_dict().items():
        assert value.data_ptr() == before[name][0] and torch.equal(value, before[name][1])
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_what_cannot_be_merged_is_refused_and_the_model_is_as_before() -> None:
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    refused = [Attachment("late", adapter(1), steps=(0.5, 1.0)), Attachment("biased", adapter(1, bare_bias=True))]
    for use, said in zip(refused, ("part of the steps", "has none"), strict=True):
        with pytest.raises(AdapterError, match=said), merged({"unet": net}, [USES[1], use]):
            raise AssertionError("it was merged")
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
