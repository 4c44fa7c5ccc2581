"""Adapters by sample, by place and put together: each against running them one after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from intarsia.pipelines.adapter_types import AdapterFile, Layer, LowRank
from intarsia.pipelines.attach import Attachment, attached
from intarsia.pipelines.dora import Decomposed
from intarsia.pipelines.kinds.difference import Difference
from intarsia.pipelines.site import Gain
from torch import Tensor, nn

OUT, IN = 10, 6


class Model(nn.Module):
    """A linear layer on tokens, a strided convolution, a 1x1 convolution and a linear layer on one vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(IN, OUT, dtype=torch.float64)
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, dtype=torch.float64)
        self.point = nn.Conv2d(8, 5, 1, dtype=torch.float64)
        self.clock = nn.Linear(IN, OUT, dtype=torch.float64)
        self.norm = nn.LayerNorm(IN, dtype=torch.float64)

    def forward(self, x: Tensor, picture: Tensor) -> tuple[Tensor, ...]:
        return self.linear(self.norm(x)), self.point(self.conv(picture).tanh()), self.clock(x[:, 0])


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def adapter(seed: int, kind: str = "lora", rank: int = 3) -> AdapterFile:
    g = torch.Generator().manual_seed(seed)
    layers: dict[str, Layer] = {
        "unet.linear": LowRank(normal(rank, IN, generator=g), normal(OUT, rank, generator=g), 2.0),
        "unet.conv": LowRank(normal(rank, 4, 3, 3, generator=g), normal(8, rank, 1, 1, generator=g), 2.0),
        "unet.point": LowRank(normal(rank, 8, 1, 1, generator=g), normal(5, rank, 1, 1, generator=g), 2.0),
        "unet.clock": LowRank(normal(rank, IN, generator=g), normal(OUT, rank, generator=g), 2.0),
    }
    if kind == "dora":
        inner = layers["unet.linear"]
        layers["unet.linear"] = Decomposed(inner, normal(OUT, generator=g).abs() + 1, True)
    if kind == "difference":
        layers["unet.conv"] = Difference(normal(8, 4, 3, 3, generator=g), normal(8, generator=g))
        layers["unet.norm"] = Difference(normal(IN, generator=g), normal(IN, generator=g))
    if kind == "bias":
        inner = layers["unet.linear"]
        assert isinstance(inner, LowRank)
        layers["unet.linear"] = replace(inner, bias=normal(OUT, generator=g))
    if kind == "few":
        layers = {"unet.linear": layers["unet.linear"]}
    return AdapterFile(Path("x"), "sdxl", "concept", "", layers, "", {})


def uses(*kinds: str) -> list[Attachment]:
    return [Attachment(f"a{i}", adapter(i + 1, kind, rank=2 + i), 0.5 + i) for i, kind in enumerate(kinds)]


def batch(count: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(9)
    return normal(count, 7, IN, generator=g), normal(count, 4, 9, 9, generator=g)


KINDS = [("lora", "lora", "lora"), ("lora", "dora", "difference"), ("bias", "few", "lora")]


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
@pytest.mark.parametrize("halves", [1, 2])
def test_a_batch_with_an_adapter_per_sample_equals_one_after_another(kinds: tuple[str, ...], halves: int) -> None:
    model, attachments = Model(), uses(*kinds)
    rows = [("a0",), ("a1", "a2"), (), ("a2",)]
    x, picture = batch(len(rows) * halves)
    with torch.no_grad(), attached({"unet": model}, attachments) as hung:
        hung.assign(rows)
        got = model(x, picture)
        for half in range(halves):
            for row, names in enumerate(rows):
                at = half * len(rows) + row
                hung.activate(names)
                alone = model(x[at : at + 1], picture[at : at + 1])
                for part, whole in zip(alone, got, strict=True):
                    assert torch.allclose(part[0], whole[at], atol=1e-5), (half, names)  # dense changes are float32


def test_weights_and_muted_adapters_count_in_every_sample() -> None:
    model, attachments = Model(), uses("lora", "lora")
    x, picture = batch(2)
    with torch.no_grad(), attached({"unet": model}, attachments) as hung:
        hung.assign([("a0",), ("a1",)])
        before = model(x, picture)
        hung.weights = {"a1": 3.0}
        changed = model(x, picture)
        hung.mute(["a1"])
        muted = model(x, picture)
        hung.activate(())
        plain = model(x, picture)
    assert torch.equal(before[0][0], changed[0][0])
    assert torch.allclose(changed[0][1] - plain[0][1], 2 * (before[0][1] - plain[0][1]))
    assert torch.equal(muted[0][1], plain[0][1]) and not torch.equal(muted[0][0], plain[0][0])


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_a_gain_multiplies_what_an_adapter_adds_at_each_place(kinds: tuple[str, ...]) -> None:
    model, attachments = Model(), uses(*kinds)
    x, picture = batch(2)
    masks = {7: torch.rand(7, 1, dtype=torch.float64), 5: torch.rand(5, 5, dtype=torch.float64)}
    seen: set[str] = set()

    def gains(path: str, output: Tensor) -> Mapping[str, Gain]:
        seen.add(path)
        place: Gain = 0.25
        if output.ndim > 2:
            place = masks[output.shape[2] if output.ndim == 4 else output.shape[1]]
        return {"a0": place, "a1": 0.5}  # a2 acts nowhere

    with torch.no_grad(), attached({"unet": model}, attachments) as hung:
        hung.spread(gains)
        for path in ("linear", "conv", "clock"):
            layer = model.get_submodule(path)
            inputs = {"linear": x, "conv": picture, "clock": x[:, 0]}[path]
            hung.spread(gains)
            got = layer(inputs)
            parts: list[Tensor] = []
            for names in ((), ("a0",), ("a1",)):
                hung.activate(names)
                parts.append(layer(inputs))
            plain, first, second = parts
            place = gains(path, plain)["a0"]
            assert torch.allclose(got, plain + place * (first - plain) + 0.5 * (second - plain), atol=1e-5), path
    assert "unet.linear" in seen and "unet.conv" in seen


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_parts_put_together_by_their_sum_are_the_sum(kinds: tuple[str, ...]) -> None:
    model, attachments = Model(), uses(*kinds)
    x, picture = batch(2)

    def fuse(path: str, output: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        assert set(parts) <= {"a0", "a1", "a2"}
        return output + sum(parts.values())

    with torch.no_grad(), attached({"unet": model}, attachments) as hung:
        everywhere = model(x, picture)
        hung.combine(fuse)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(model(x, picture), everywhere, strict=True))
        hung.combine(lambda path, output, parts: output)
        nothing = model(x, picture)
        hung.activate(())
        assert all(torch.equal(a, b) for a, b in zip(model(x, picture), nothing, strict=True))


def test_the_gradient_reaches_the_input_through_every_mode() -> None:
    model, attachments = Model(), uses("lora", "dora")
    x, picture = batch(2)
    with attached({"unet": model}, attachments) as hung:
        for plan in (lambda: hung.assign([("a0",), ("a1",)]), lambda: hung.spread(lambda path, output: {"a0": 0.5})):
            plan()
            wanted = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(model(wanted, picture)[0].square().sum(), wanted)
            nudge = torch.zeros_like(x)
            nudge[0, 1, 2] = 1e-6
            with torch.no_grad():
                change = (
                    model(x + nudge, picture)[0].square().sum() - model(x - nudge, picture)[0].square().sum()
                ) / 2e-6
            assert gradient[0, 1, 2].item() == pytest.approx(change.item(), rel=1e-4)
