"""Branches on a model: equal to merged weights and to plain diffusers, linear in their weight, gone afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from adapter_files import attention, kohya, lora, low_rank, old_diffusers, peft, processor, write
from intarsia.pipelines.adapter_file import read_adapter, write_adapter
from intarsia.pipelines.adapter_types import AdapterFile, LowRank
from intarsia.pipelines.architectures import sgm_spelling
from intarsia.pipelines.attach import Attachment, attached
from intarsia.pipelines.errors import AdapterError
from intarsia.pipelines.hooks import Step
from intarsia.pipelines.step_ranges import StepRanges
from torch import Tensor, nn
from torch.nn import functional as F

D: Any = diffusers


class Small(nn.Module):
    """A linear layer, a strided 3x3 convolution and a 1x1 convolution."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 10, dtype=dtype)
        self.inner = nn.ModuleList([nn.Conv2d(4, 8, 3, stride=2, padding=1, dtype=dtype)])
        self.point = nn.Conv2d(8, 5, 1, dtype=dtype)
        self.norm = nn.LayerNorm(6, dtype=dtype)

    def forward(self, x: Tensor, picture: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(self.norm(x)), self.point(self.inner[0](picture).tanh())


SHAPES = {"unet.linear": (10, 6), "unet.inner.0": (8, 4, 3, 3), "unet.point": (5, 8, 1, 1)}


def adapter(seed: int = 0, rank: int = 3, alpha: float = 2.0, names: tuple[str, ...] = tuple(SHAPES)) -> AdapterFile:
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, LowRank] = {}
    for name in names:
        out, *rest = SHAPES[name]
        down = torch.randn(rank, *rest, generator=generator, dtype=torch.float64)
        up = torch.randn(out, rank, *[1] * (len(rest) - 1), generator=generator, dtype=torch.float64)
        layers[name] = LowRank(down, up, alpha)
    return AdapterFile(Path("x"), "sdxl", "concept", "", layers, "", {})


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(2, 7, 6, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randn(2, 4, 9, 9, generator=generator, dtype=torch.float64).to(dtype)


def merge(model: Small, file: AdapterFile, weight: float) -> Small:
    """The oracle: W + weight * scale * up @ down, written into the weights."""
    with torch.no_grad():
        for name, layer in low_rank(file).items():
            target: Any = model.get_submodule(name.removeprefix("unet."))
            delta = layer.up.flatten(1) @ layer.down.flatten(1)
            target.weight += (weight * layer.alpha / layer.rank * delta).reshape(target.weight.shape).to(target.weight)
    return model


def error(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))


def run(model: Small, *uses: Attachment) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), attached({"unet": model}, uses):
        return model(*inputs(model.linear.weight.dtype))


@pytest.mark.parametrize("weight", [1.0, 0.5, -2.0, 7.0])
def test_a_branch_equals_merged_weights(weight: float) -> None:
    merged = merge(Small(), adapter(), weight)
    assert error(run(Small(), Attachment("a", adapter(), weight)), run(merged)) < 1e-6


def test_several_adapters_equal_the_sum_of_their_changes() -> None:
    one, two = adapter(1, rank=2, alpha=1), adapter(2, rank=5, alpha=5, names=("unet.linear", "unet.inner.0"))
    merged = merge(merge(Small(), one, 0.7), two, -0.3)
    assert error(run(Small(), Attachment("a", one, 0.7), Attachment("b", two, -0.3)), run(merged)) < 1e-6


def test_single_precision_equals_merged_weights() -> None:
    merged = merge(Small(torch.float32), adapter(), 0.5)
    got = run(Small(torch.float32), Attachment("a", adapter(), 0.5))
    assert error(got, run(merged)) < 1e-5
    assert got[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_layers_own_type_is_kept(dtype: torch.dtype) -> None:
    got = run(Small(dtype), Attachment("a", adapter(), 0.5))
    assert {tensor.dtype for tensor in got} == {dtype}


def test_weight_zero_equals_no_adapter_exactly() -> None:
    assert error(run(Small(), Attachment("a", adapter(), 0.0)), run(Small())) == 0


def test_half_the_weight_is_half_the_change() -> None:
    base, whole = run(Small())[0], run(Small(), Attachment("a", adapter(), 1.0))[0]
    got = run(Small(), Attachment("a", adapter(), 0.5))[0]
    assert torch.allclose(got - base, (whole - base) / 2, atol=1e-12)
    assert (whole - base).abs().max() > 0.1


def test_weights_and_active_adapters_change_between_two_steps() -> None:
    model, x = Small(), inputs()
    one, two = adapter(1), adapter(2)
    with torch.no_grad(), attached({"unet": model}, [Attachment("a", one), Attachment("b", two)]) as branches:
        assert branches.names == ("a", "b")
        branches.activate({"b"})
        assert error(model(*x), run(merge(Small(), two, 1))) < 1e-6
        branches.activate({"a", "b"})
        branches.weights = {"a": 0.25}
        assert dict(branches.weights) == {"a": 0.25, "b": 1.0}
        assert error(model(*x), run(merge(merge(Small(), one, 0.25), two, 1))) < 1e-6
        branches.activate(())
        assert error(model(*x), run(Small())) == 0
        with pytest.raises(AdapterError, match="No adapter called c"):
            branches.activate({"c"})
        with pytest.raises(AdapterError, match="No adapter called c"):
            branches.weights = {"c": 1}
        with pytest.raises(AdapterError, match="nan"):
            branches.weights = {"a": float("nan")}


def test_the_count_of_matched_modules_is_said() -> None:
    with attached({"unet": Small()}, [Attachment("a", adapter())]) as branches:
        assert branches.matched["a"] == "a: 3 of 3 modules matched"


def state(model: nn.Module) -> list[Any]:
    """Everything about a model that a careless adapter could change."""
    found: list[Any] = []
    for name, module in model.named_modules():
        values = {
            key: value for key, value in vars(module).items() if key not in ("_modules", "_parameters", "_buffers")
        }
        hooks = {key: list(value) if isinstance(value, dict) else value for key, value in values.items()}
        found.append((name, id(module), type(module), module.training, hooks, module.forward))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found.append(
            (name, id(tensor), tensor.data_ptr(), tensor.requires_grad, tensor.grad, tensor.detach().sum().item())
        )
    return found


@pytest.mark.parametrize("broken", [False, True])
def test_detaching_leaves_no_trace(broken: bool) -> None:
    model = Small()
    before, output = state(model), run(Small())
    try:
        with attached({"unet": model}, [Attachment("a", adapter())]):
            assert state(model) != before
            model(*inputs())
            if broken:
                raise RuntimeError("in the middle")
    except RuntimeError:
        assert broken
    assert state(model) == before
    assert error(run(model), output) == 0


def test_an_error_of_one_adapter_leaves_the_model_untouched() -> None:
    model = Small()
    before = state(model)
    wrong = adapter()
    layers = {**wrong.layers, "unet.nowhere": wrong.layers["unet.linear"]}
    bad = AdapterFile(Path("x"), "sdxl", "concept", "", layers, "", {"intarsia.base": "mini"})
    with (
        pytest.raises(AdapterError) as caught,
        attached({"unet": model}, [Attachment("a", adapter()), Attachment("b", bad)]),
    ):
        pass
    assert caught.value.message.startswith("b fits 3 of 4 modules")
    assert "unet.nowhere" in caught.value.message
    assert "mini" in caught.value.hint
    assert state(model) == before


@pytest.mark.parametrize(
    ("name", "down", "up", "word"),
    [
        ("unet.linear", (3, 7), (10, 3), "down expected (r, 6) but has (r, 7)"),
        ("unet.linear", (3, 6), (9, 3), "up expected (10, 3) but has (9, 3)"),
        ("unet.linear", (3, 6), (10, 2), "up expected (10, 3)"),
        ("unet.inner.0", (3, 4), (8, 3), "down expected (r, 4, 3, 3) but has (r, 4)"),
        ("unet.norm", (3, 6), (6, 3), "a LayerNorm cannot take a LoRA"),
        ("vae.linear", (3, 6), (10, 3), "no module vae.linear"),
    ],
)
def test_what_does_not_fit_is_refused_with_shapes(
    name: str, down: tuple[int, ...], up: tuple[int, ...], word: str
) -> None:
    layers = {name: LowRank(torch.ones(down), torch.ones(up), 1)}
    file = AdapterFile(Path("x"), "sdxl", "concept", "", layers, "", {})
    with pytest.raises(AdapterError) as caught, attached({"unet": Small()}, [Attachment("a", file)]):
        pass
    assert "fits 0 of 1 modules" in caught.value.message
    assert word in caught.value.message


def test_an_adapter_without_layers_and_equal_names_are_refused() -> None:
    empty = AdapterFile(Path("x"), "sdxl", "concept", "", {}, "", {})
    with pytest.raises(AdapterError, match="0 of 0"), attached({"unet": Small()}, [Attachment("a", empty)]):
        pass
    twice = [Attachment("a", adapter()), Attachment("a", adapter())]
    with pytest.raises(AdapterError, match="twice"), attached({"unet": Small()}, twice):
        pass


def test_no_adapters_is_fine() -> None:
    with attached({"unet": Small()}, []) as branches:
        assert branches.names == ()


def test_other_padding_modes_follow_their_layer() -> None:
    model = nn.Module()
    model.conv = nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular", dtype=torch.float64)
    layer = low_rank(adapter())["unet.inner.0"]
    file = AdapterFile(Path("x"), "sdxl", "concept", "", {"unet.conv": layer}, "", {})
    x = inputs()[1]
    weight = (layer.scale * layer.up.flatten(1) @ layer.down.flatten(1)).reshape(8, 4, 3, 3)
    expected = model.conv(x) + F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight)
    with attached({"unet": model}, [Attachment("a", file)]):
        assert (model.conv(x) - expected).abs().max() < 1e-9


# Against plain diffusers, on tiny pipelines

CLASSES = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


def shapes_of(pipeline: Any) -> dict[str, tuple[int, ...]]:  # noqa: ANN401
    """Every linear and convolution weight by canonical path."""
    found: dict[str, tuple[int, ...]] = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        root: nn.Module | None = getattr(pipeline, component, None)
        for name, module in root.named_modules() if root else ():
            if isinstance(module, nn.Linear | nn.Conv2d) and name != "text_projection":
                inner = name if component == "unet" or name.startswith("text_model") else f"text_model.{name}"
                found[f"{component}.{inner}"] = tuple(module.weight.shape)
    return found


def parts_of(pipeline: Any) -> dict[str, nn.Module]:  # noqa: ANN401
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: part for name in names if (part := getattr(pipeline, name, None))}


def outputs(pipeline: Any, family: str) -> list[Tensor]:  # noqa: ANN401
    """The network's answer and the text encoders' states for fixed inputs."""
    unet = pipeline.unet
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, unet.config.in_channels, 16, 16, generator=generator)
    text = torch.randn(2, 7, unet.config.cross_attention_dim, generator=generator)
    more: dict[str, Any] = {}
    if family == "sdxl":
        width = unet.add_embedding.linear_1.in_features - 6 * unet.config.addition_time_embed_dim
        more["added_cond_kwargs"] = {
            "text_embeds": torch.randn(2, width, generator=generator),
            "time_ids": torch.ones(2, 6),
        }
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        results = [unet(latents, 500, text, **more).sample, pipeline.text_encoder(tokens).last_hidden_state]
        if family == "sdxl":
            results.append(pipeline.text_encoder_2(tokens).last_hidden_state)
    return results


@pytest.fixture(params=["sd15", "sdxl"])
def pair(request: pytest.FixtureRequest, tiny: Callable[..., Path]) -> Iterator[tuple[str, Any, Any]]:
    """A family and two equal pipelines: one for us, one for diffusers."""
    family: str = request.param
    kind = getattr(D, CLASSES[family])
    yield family, kind.from_pretrained(tiny(family)), kind.from_pretrained(tiny(family))


def compare(pair: tuple[str, Any, Any], path: Path) -> None:
    family, ours, theirs = pair
    base = outputs(ours, family)
    file = read_adapter(path, shapes_of(ours))
    theirs.load_lora_weights(str(path), use_safetensors=True, adapter_name="a")
    expected = outputs(theirs, family)
    with attached(parts_of(ours), [Attachment("a", file)]):
        got = outputs(ours, family)
    for before, left, right in zip(base, got, expected, strict=True):
        assert (left - right).abs().max().item() < 1e-5
        assert (before - right).abs().max().item() > 1e-3  # the adapter does something
    theirs.set_adapters("a", 0.5)
    with attached(parts_of(ours), [Attachment("a", file, 0.5)]):
        for left, right in zip(outputs(ours, family), outputs(theirs, family), strict=True):
            assert (left - right).abs().max().item() < 1e-5


def test_what_we_write_acts_the_same_in_plain_diffusers(pair: tuple[str, Any, Any], tmp_path: Path) -> None:
    """Mixed ranks and alphas, UNet, text encoders and convolutions: the scale survives in diffusers' own metadata."""
    shapes = shapes_of(pair[1])
    generator = torch.Generator().manual_seed(1)
    layers: dict[str, LowRank] = {}
    for number, (name, (out, *rest)) in enumerate(shapes.items()):
        rank, alpha = (4, 2.0) if number % 3 else (2, 0.5)
        down = 0.1 * torch.randn(rank, *rest, generator=generator)
        up = 0.1 * torch.randn(out, rank, *[1] * (len(rest) - 1), generator=generator)
        layers[name] = LowRank(down, up, alpha)
    write_adapter(tmp_path / "a.safetensors", layers, {})
    compare(pair, tmp_path / "a.safetensors")


def test_diffusers_names_act_the_same_in_plain_diffusers(pair: tuple[str, Any, Any], tmp_path: Path) -> None:
    shapes = {p: s for p, s in shapes_of(pair[1]).items() if ".attn" in p or "self_attn" in p}
    compare(pair, write(tmp_path / "a.safetensors", lora(shapes, peft, scale=0.1)))


def test_kohya_names_with_alpha_act_the_same_in_plain_diffusers(pair: tuple[str, Any, Any], tmp_path: Path) -> None:
    shapes = shapes_of(pair[1])
    shapes = {p: s for p, s in shapes.items() if ".attentions." in p or "self_attn" in p or ".mlp." in p}

    def spelling(path: str) -> tuple[str, str, str]:
        return kohya(path, text="lora_te_" if pair[0] == "sd15" else "lora_te1_")

    compare(pair, write(tmp_path / "a.safetensors", lora(shapes, spelling, rank=4, alpha=3, scale=0.1)))


def test_kohya_sdxl_in_sgm_names_acts_the_same_in_plain_diffusers(tiny: Callable[..., Path], tmp_path: Path) -> None:
    kind = D.StableDiffusionXLPipeline
    ours, theirs = kind.from_pretrained(tiny("sdxl")), kind.from_pretrained(tiny("sdxl"))
    shapes = shapes_of(ours)
    paths = [path.removeprefix("unet.") for path in shapes if path.startswith("unet.")]
    chosen = {p: s for p, s in shapes.items() if ".attentions." in p or "self_attn" in p}

    def spelling(path: str) -> tuple[str, str, str]:
        if not path.startswith("unet."):
            return kohya(path)
        stem = f"lora_unet_{sgm_spelling(path.removeprefix('unet.'), 2, paths)}"
        return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"

    path = write(tmp_path / "a.safetensors", lora(chosen, spelling, rank=4, alpha=3, scale=0.1))
    compare(("sdxl", ours, theirs), path)


def test_old_attention_processors_act_as_plain_peft_names(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """diffusers no longer reads files without a component prefix; the same factors in PEFT names are the oracle."""
    pipeline = D.StableDiffusionPipeline.from_pretrained(tiny("sd15"))
    shapes = attention(shapes_of(pipeline))
    results: list[Tensor] = []
    for name, spelling in (("a", processor), ("b", old_diffusers), ("c", peft)):
        file = read_adapter(write(tmp_path / f"{name}.safetensors", lora(shapes, spelling)), shapes_of(pipeline))
        with attached(parts_of(pipeline), [Attachment("a", file)]):
            results.append(outputs(pipeline, "sd15")[0])
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[2])


def test_blocks_have_factors_of_their_own_and_the_longest_start_counts() -> None:
    model, one = Small(), adapter()
    blocks = {"unet": 0.5, "unet.inner": 2.0, "unet.inner.0": 0.0}
    with torch.no_grad(), attached({"unet": model}, [Attachment("a", one, 0.8, blocks)]):
        found = model(*inputs())
    kept = {name: layer for name, layer in one.layers.items() if name != "unet.inner.0"}
    with torch.no_grad():
        expected = merge(Small(), replace(one, layers=kept), 0.4)(*inputs())
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("attachment", "word"),
    [
        (Attachment("a", adapter(), 1.0, {"unet.up_blocks": 1.0}), "no layers in unet.up_blocks"),
        (Attachment("a", adapter(), 1.0, {"unet": float("nan")}), "is nan"),
        (Attachment("a", adapter(), 1.0, {}, (0.5, 0.5)), "cannot act from 0.5 to 0.5"),
    ],
)
def test_parts_that_are_not_there_are_refused(attachment: Attachment, word: str) -> None:
    with pytest.raises(AdapterError, match=word), attached({"unet": Small()}, [attachment]):
        pass


def test_an_adapter_acts_within_its_steps_alone() -> None:
    pair = [Attachment("a", adapter(1), steps=(0.0, 0.5)), Attachment("b", adapter(2), steps=(0.25, 1.0))]
    seen: list[set[str]] = []
    with attached({"unet": Small()}, pair) as branches:
        hook = StepRanges(branches, pair)
        for index in range(4):
            latents = torch.zeros(1)
            assert hook.before(Step(index, 4, 0.0, 0.0, latents, lambda x: x)) is latents
            seen.append(set(branches.active))
    assert seen == [{"a"}, {"a", "b"}, {"b"}, {"b"}]
