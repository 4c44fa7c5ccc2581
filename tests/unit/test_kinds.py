"""Every kind of layer against the code that writes it: LyCORIS and PEFT make the file and say what it does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lycoris.modules as lycoris
import peft
import pytest
import torch
from adapter_files import write
from intarsia.pipelines.adapter_file import read_adapter
from intarsia.pipelines.attach import Attachment, attached
from intarsia.pipelines.errors import AdapterError
from intarsia.pipelines.identify import inspect
from intarsia.pipelines.kind import kinds
from safetensors.torch import save_file
from torch import Tensor, nn

LYCORIS: Any = lycoris
PEFT: Any = peft


class Net(nn.Module):
    """One layer of every sort that adapters touch; forward runs each on its own input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(12, 24)
        self.conv = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.point = nn.Conv2d(8, 12, 1)
        self.norm = nn.LayerNorm(12)
        self.group = nn.GroupNorm(2, 8)
        with torch.no_grad():
            for norm in (self.norm, self.group):
                norm.weight.normal_()
                norm.bias.normal_()

    def forward(self, x: Tensor, picture: Tensor) -> dict[str, Tensor]:
        rows, maps = ("linear", "norm"), ("conv", "point", "group")
        made = {name: self.get_submodule(name)(x) for name in rows}
        return made | {name: self.get_submodule(name)(picture) for name in maps}


SHAPES = {f"unet.{name}": tuple(module.weight.shape) for name, module in Net().named_children()}  # type: ignore[union-attr]
ALL, PLAIN = ("linear", "conv", "point"), ("linear", "point")
# name -> class, its arguments, the layers it is put on
MADE: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "lora": ("LoConModule", {}, ALL),
    "lora, tucker": ("LoConModule", {"use_tucker": True}, ("conv",)),
    "lora, rank-stabilised": ("LoConModule", {"rs_lora": True}, ALL),
    "dora": ("LoConModule", {"weight_decompose": True}, ALL),
    "dora, per input": ("LoConModule", {"weight_decompose": True, "wd_on_out": False}, ALL),
    "dora, tucker": ("LoConModule", {"weight_decompose": True, "use_tucker": True}, ("conv",)),
    "loha": ("LohaModule", {}, ALL),
    "loha, tucker": ("LohaModule", {"use_tucker": True}, ("conv",)),
    "loha, dora": ("LohaModule", {"weight_decompose": True}, ALL),
    "lokr": ("LokrModule", {"factor": 2}, ALL),
    "lokr, both low-rank": ("LokrModule", {"factor": 4, "decompose_both": True, "lora_dim": 1}, PLAIN),
    "lokr, tucker": ("LokrModule", {"factor": 2, "use_tucker": True, "lora_dim": 2}, ("conv",)),
    "lokr, whole": ("LokrModule", {"factor": 4, "full_matrix": True}, ALL),
    "lokr, dora": ("LokrModule", {"factor": 2, "weight_decompose": True}, ALL),
    "ia3": ("IA3Module", {}, ALL),
    "ia3, on inputs": ("IA3Module", {"train_on_input": True}, ALL),
    "difference": ("FullModule", {}, ALL),
    "norm": ("NormModule", {}, ("norm", "group")),
}

TWICE = ("LohaModule", "LokrModule")


def inputs() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(9)
    return torch.randn(2, 5, 12, generator=rng), torch.randn(2, 8, 7, 7, generator=rng)


def by_lycoris(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The file's tensors as LyCORIS writes them, and what its own layers give."""
    kind, options, layers = MADE[name]
    net, (x, picture) = Net(), inputs()
    tensors: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for number, layer in enumerate(layers):
        base: Any = net.get_submodule(layer)
        arguments = {"lora_dim": 3, "alpha": 2.0} | options
        module = getattr(LYCORIS, kind)(f"lycoris_{layer}", base, 1.0, **arguments)
        own = [parameter for name, parameter in module.named_parameters() if "org" not in name]
        rng = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in own:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
        if kind == "FullModule":  # its own writer expects to have taken the layer's place
            state = {"diff": module.weight, "diff_b": module.bias}
        else:
            state = module.custom_state_dict() or module.state_dict()
        tensors |= {f"lycoris_{layer}.{part}": torch.as_tensor(value).detach().clone().contiguous()
                    for part, value in state.items()}  # fmt: skip
        merged, bias = (
            _merged(module, base) if "weight_decompose" in options or kind in TWICE else module.get_merged_weight(1.0)
        )
        expected[layer] = _run(base, merged, bias, picture if base.weight.ndim == 4 or layer == "group" else x)
    return tensors, expected


def _merged(module: Any, base: Any) -> tuple[Tensor, None]:  # noqa: ANN401
    """The weight their forward uses, which trained the file: their own merge applies the scale a second time."""
    change = module.make_weight() * module.scale if hasattr(module, "make_weight") else module.get_weight(module.shape)
    weight = base.weight + change.reshape(base.weight.shape)
    return (module.apply_weight_decompose(weight) if module.wd else weight), None


def _run(base: Any, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:  # noqa: ANN401
    """What a layer gives with its weight (and bias) replaced: the oracle, a dense weight written into the layer."""
    import copy

    other = copy.deepcopy(base)
    with torch.no_grad():
        other.weight.copy_(weight.reshape(base.weight.shape))
        if bias is not None:
            other.bias.copy_(bias)
        return other(x)


def quiet(net: Net) -> dict[str, Tensor]:
    with torch.no_grad():
        return net(*inputs())


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((found[name] - value).abs().max() / value.abs().max()) for name, value in expected.items())


@pytest.mark.parametrize("name", MADE)
def test_what_lycoris_writes_acts_as_lycoris_does(name: str, tmp_path: Path) -> None:
    tensors, expected = by_lycoris(name)
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors", SHAPES)
    net = Net()
    before, plain = {k: v.clone() for k, v in net.state_dict().items()}, quiet(net)
    with torch.no_grad(), attached({"unet": net}, [Attachment("a", adapter)]):
        found = net(*inputs())
    assert largest_error(found, expected) < 1e-5
    assert max(float((found[k] - plain[k]).abs().max()) for k in expected) > 1e-2, "it does something"
    after = quiet(net)
    assert all(torch.equal(plain[k], after[k]) for k in plain), "and is gone"
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize("name", ["dora", "lokr", "difference"])
def test_half_the_weight_is_half_the_change_and_two_adapters_add(name: str, tmp_path: Path) -> None:
    tensors, expected = by_lycoris(name)
    save_file(tensors, tmp_path / "a.safetensors")
    adapter, net = read_adapter(tmp_path / "a.safetensors", SHAPES), Net()
    plain = quiet(net)
    pair = [Attachment("a", adapter, 0.25), Attachment("b", adapter, 0.5)]
    with torch.no_grad(), attached({"unet": net}, pair) as branches:
        found = net(*inputs())
        branches.weights = {"a": 0.5}
        whole = net(*inputs())
    wanted = {k: plain[k] + 0.75 * (v - plain[k]) for k, v in expected.items()}
    assert largest_error(found, wanted) < 1e-5 and largest_error(whole, expected) < 1e-5


PEFT_MADE: dict[str, Callable[[], Any]] = {
    "lora": lambda: PEFT.LoraConfig(r=3, lora_alpha=3, target_modules=list(ALL)),
    "lora, bias": lambda: PEFT.LoraConfig(r=3, lora_alpha=3, target_modules=list(ALL), lora_bias=True),
    "dora": lambda: PEFT.LoraConfig(r=3, lora_alpha=3, target_modules=list(ALL), use_dora=True),
    "loha": lambda: PEFT.LoHaConfig(r=3, alpha=3, target_modules=list(ALL)),
    "loha, tucker": lambda: PEFT.LoHaConfig(r=3, alpha=3, target_modules=["conv"], use_effective_conv2d=True),
    "lokr": lambda: PEFT.LoKrConfig(r=2, alpha=2, target_modules=list(ALL)),
    "lokr, both low-rank": lambda: PEFT.LoKrConfig(r=1, alpha=1, target_modules=list(ALL), decompose_both=True),
    "ia3": lambda: PEFT.IA3Config(target_modules=list(ALL), feedforward_modules=["point"]),
}


@pytest.mark.parametrize("name", PEFT_MADE)
def test_what_peft_writes_acts_as_peft_does(name: str, tmp_path: Path) -> None:
    wrapped = PEFT.get_peft_model(Net(), PEFT_MADE[name]())
    for number, (key, parameter) in enumerate(wrapped.named_parameters()):
        if parameter.requires_grad:
            rng = torch.Generator().manual_seed(number)
            with torch.no_grad():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng)).abs_().add_(0.1 * ("magn" in key))
    with torch.no_grad():
        expected = wrapped.eval()(*inputs())
    tensors = {k: v.contiguous() for k, v in PEFT.get_peft_model_state_dict(wrapped).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter, net = read_adapter(tmp_path / "a.safetensors", SHAPES), Net()
    with torch.no_grad(), attached({"unet": net}, [Attachment("a", adapter)]):
        found = net(*inputs())
    assert largest_error(found, expected) < 1e-5
    assert largest_error(quiet(net), expected) > 1e-2


@pytest.mark.parametrize("name", MADE)
def test_a_file_says_what_it_is_and_that_it_fits(name: str, tmp_path: Path) -> None:
    tensors, expected = by_lycoris(name)
    save_file(tensors, tmp_path / "a.safetensors")
    report = inspect(tmp_path / "a.safetensors", SHAPES)
    assert report.refusal == "" and report.modules == report.matched == len(expected)
    parts = {"norm": "difference", "lora": "locon"}.get(name.split(",")[0], name.split(",")[0])
    assert parts in report.algorithm.split(", ") or (parts == "locon" and report.algorithm == "locon")


@pytest.mark.parametrize("name", ["loha", "lokr", "ia3", "difference", "dora"])
def test_a_file_for_another_width_is_refused_before_anything_is_touched(name: str, tmp_path: Path) -> None:
    tensors, _ = by_lycoris(name)
    save_file({k: v for k, v in tensors.items() if "_linear" in k}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="fits 0 of 1 modules"):
        read_adapter(tmp_path / "a.safetensors", SHAPES | {"unet.linear": (26, 10)})


def test_half_a_layer_is_refused(tmp_path: Path) -> None:
    tensors, _ = by_lycoris("loha")
    del tensors["lycoris_linear.hada_w2_b"]
    save_file(tensors, tmp_path / "a.safetensors")
    report = inspect(tmp_path / "a.safetensors", SHAPES)
    assert "lack some of their tensors" in report.refusal and "linear" in report.refusal


@pytest.mark.parametrize(("name", "part"), [("loha", "hada_w2_a"), ("lokr", "lokr_w1"), ("difference", "diff")])
def test_a_change_of_zero_is_told(name: str, part: str, tmp_path: Path) -> None:
    tensors, _ = by_lycoris(name)
    zero = {k: v * (not k.endswith((part, "diff_b"))) for k, v in tensors.items()}
    write(tmp_path / "a.safetensors", {k: v.numpy() for k, v in zero.items()})
    assert any("does nothing" in text for text in inspect(tmp_path / "a.safetensors", SHAPES).warnings)


def test_kinds_have_titles_and_no_part_twice() -> None:
    assert set(kinds()) == {"difference", "ia3", "loha", "lokr", "lora"}
    needs = [need for kind in kinds().values() for need in kind.required]
    assert len(needs) == len(set(needs))
