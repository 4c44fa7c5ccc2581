"""Adapters for SD3, FLUX.1 and Wan in the authors' names, against diffusers' conversion of whole checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from adapter_files import matrices
from diffusers.loaders import single_file_utils
from intarsia.pipelines.adapter_file import read_adapter
from intarsia.pipelines.architectures import ModuleIndex, reference
from intarsia.pipelines.attach import Attachment, attached
from intarsia.pipelines.errors import AdapterError
from intarsia.pipelines.identify import inspect
from intarsia.pipelines.transformer_names import spellings
from safetensors.torch import save_file
from torch import Tensor

D: Any = diffusers
CONVERT: Any = single_file_utils
Tensors = dict[str, Tensor]


def flux() -> Any:  # noqa: ANN401
    return D.FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=10, pooled_projection_dim=6, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def sd3() -> Any:  # noqa: ANN401
    return D.SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=10, caption_projection_dim=16, pooled_projection_dim=6, out_channels=4,
        pos_embed_max_size=8, dual_attention_layers=(0, 1),
    )  # fmt: skip


def wan() -> Any:  # noqa: ANN401
    return D.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, text_dim=10, freq_dim=8,
        ffn_dim=24, num_layers=2, added_kv_proj_dim=16, image_dim=12,
    )  # fmt: skip


MODELS: dict[str, Callable[[], Any]] = {"flux1": flux, "sd3": sd3, "wan": wan}
CONVERTERS = {
    "flux1": "convert_flux_transformer_checkpoint_to_diffusers",
    "sd3": "convert_sd3_transformer_checkpoint_to_diffusers",
    "wan": "convert_wan_transformer_to_diffusers",
}


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:  # noqa: ANN401
    weights = {name: tuple(p.shape) for name, p in model.named_parameters() if name.endswith(".weight")}
    return {f"transformer.{name.removesuffix('.weight')}": shape for name, shape in weights.items()}


class Checkpoint(dict[str, Tensor]):
    """What diffusers converts: the changed weights, and zeros for everything else it asks for."""

    def pop(self, key: str, *rest: Any) -> Any:  # noqa: ANN401
        if key in self or rest:
            return super().pop(key, *rest)
        if "linear1" in key:  # its converter knows one width of FLUX.1 only
            return torch.zeros(3 * 3072 + 4 * 3072)
        return torch.zeros(6)  # can be cut in two and in three


def originals(family: str) -> dict[str, tuple[int, ...]]:
    """The authors' names of a tiny model's layers with the shape of their weights."""
    shapes = {path.removeprefix("transformer."): shape for path, shape in shapes_of(MODELS[family]()).items()}
    return {name: pieces[0].whole for name, pieces in spellings(family, shapes) if "processor" not in name}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def converted(family: str, deltas: Tensors) -> Tensors:
    """The oracle: changes under the authors' names, through diffusers' conversion of a whole checkpoint."""
    given = Checkpoint({f"{name}.weight": delta for name, delta in deltas.items()})
    singles = {name: given.pop(f"{name}.weight") for name in deltas if name.endswith("linear1")}
    made: Tensors = getattr(CONVERT, CONVERTERS[family])(given)
    found = {path.removesuffix(".weight"): value for path, value in made.items() if value.ndim > 1}
    for name, delta in singles.items():  # as black-forest-labs/flux cuts it: q, k, v, then the rest
        width = delta.shape[1]
        block = f"single_transformer_blocks.{name.split('.')[1]}"
        for number, part in enumerate(("attn.to_q", "attn.to_k", "attn.to_v")):
            found[f"{block}.{part}"] = delta[number * width : (number + 1) * width]
        found[f"{block}.proj_mlp"] = delta[3 * width :]
    return {f"transformer.{path}": value for path, value in found.items()}


def kohya(name: str) -> tuple[str, str]:
    return f"lora_unet_{name.replace('.', '_')}", "lora_down.weight lora_up.weight"


def comfy(name: str) -> tuple[str, str]:
    return f"diffusion_model.{name}", "lora_A.weight lora_B.weight"


def kontext(name: str) -> tuple[str, str]:
    return f"base_model.model.{name}", "lora_A.weight lora_B.weight"


@pytest.mark.parametrize("spelling", [kohya, comfy, kontext])
@pytest.mark.parametrize("family", MODELS)
def test_the_authors_names_change_what_diffusers_would_convert_them_to(
    family: str, spelling: Callable[[str], tuple[str, str]], tmp_path: Path
) -> None:
    tensors: Tensors = {}
    deltas: Tensors = {}
    for seed, (name, shape) in enumerate(originals(family).items()):
        if len(shape) != 2:
            continue
        down, up = random(2, shape[1], seed=2 * seed), random(shape[0], 2, seed=2 * seed + 1)
        stem, ends = spelling(name)
        tensors |= {f"{stem}.{end}": part for end, part in zip(ends.split(), (down, up), strict=True)}
        deltas[name] = up @ down
        if "lora_down" in ends:
            tensors[f"{stem}.alpha"], deltas[name] = torch.tensor(1.0), deltas[name] / 2
    save_file(tensors, tmp_path / "a.safetensors")
    shapes = shapes_of(MODELS[family]())
    report = inspect(tmp_path / "a.safetensors", shapes)
    assert report.refusal == "" and report.family == family
    adapter, expected = read_adapter(tmp_path / "a.safetensors", shapes), converted(family, deltas)
    assert set(adapter.layers) == {path for path in expected if path in shapes and len(shapes[path]) == 2}
    for path, layer in adapter.layers.items():
        change = layer.change(torch.zeros(shapes[path])).weight
        assert change is not None and torch.allclose(change, expected[path], atol=1e-5), path


@pytest.mark.parametrize("kind", ["lokr", "dora", "difference"])
def test_a_fused_layer_of_any_kind_is_cut_by_rows(kind: str, tmp_path: Path) -> None:
    model, name = flux(), "single_blocks.1.linear1"
    shape, stem = originals("flux1")[name], f"lycoris_{name.replace('.', '_')}"
    own = [f"single_transformer_blocks.1.{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    weight = torch.cat([model.get_submodule(path).weight for path in own]).detach()
    down, up, one = random(2, shape[1], seed=1), random(shape[0], 2, seed=2), random(2, 2, seed=3)
    if kind == "lokr":
        two = random(shape[0] // 2, shape[1] // 2, seed=4)
        tensors, changed = {"lokr_w1": one, "lokr_w2": two}, weight + torch.kron(one, two)
    elif kind == "dora":
        length = random(shape[0], 1, seed=5).abs() + 1
        turned = weight + up @ down
        changed = length * turned / turned.norm(dim=1, keepdim=True)
        tensors = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": length}
    else:
        tensors, changed = {"diff": up @ down}, weight + up @ down
    save_file({f"{stem}.{part}": value.contiguous() for part, value in tensors.items()}, tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors", shapes_of(model))
    x = random(3, shape[1], seed=6)
    biases = torch.cat([model.get_submodule(path).bias for path in own])
    with torch.no_grad(), attached({"transformer": model}, [Attachment("a", adapter)]):
        found = torch.cat([model.get_submodule(path)(x) for path in own], dim=1)
    assert torch.allclose(found, x @ changed.T + biases, atol=1e-5)


def test_a_magnitude_per_input_of_a_fused_layer_is_refused_in_words(tmp_path: Path) -> None:
    stem, (out, inside) = "lycoris_single_blocks_1_linear1", originals("flux1")["single_blocks.1.linear1"]
    tensors = {"lora_down.weight": torch.ones(2, inside), "lora_up.weight": torch.ones(out, 2)}
    tensors["dora_scale"] = torch.ones(1, inside)
    save_file({f"{stem}.{part}": value for part, value in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="magnitude per input belongs to a fused layer"):
        read_adapter(tmp_path / "a.safetensors", shapes_of(flux()))


def test_xlabs_names(tmp_path: Path) -> None:
    width = 16
    names = {
        "double_blocks.0.processor.qkv_lora1": 3 * width,
        "double_blocks.0.processor.proj_lora2": width,
        "single_blocks.1.processor.qkv_lora": 3 * width,
    }
    tensors: Tensors = {}
    for seed, (name, out) in enumerate(names.items()):
        tensors |= {f"{name}.down.weight": random(2, width, seed=seed), f"{name}.up.weight": random(out, 2, seed=9)}
    save_file(tensors, tmp_path / "a.safetensors")
    layers = read_adapter(tmp_path / "a.safetensors", shapes_of(flux())).layers
    assert set(layers) == {
        *(f"transformer.transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_v", "to_add_out")),
        *(f"transformer.single_transformer_blocks.1.attn.{part}" for part in ("to_q", "to_k", "to_v")),
    }


@pytest.mark.parametrize("family", MODELS)
def test_diffusers_and_onetrainer_names(family: str, tmp_path: Path) -> None:
    shapes = {path: shape for path, shape in shapes_of(MODELS[family]()).items() if len(shape) == 2}
    for number, (down, up) in enumerate((("lora_A", "lora_B"), ("lora_down", "lora_up"))):
        tensors: Tensors = {}
        for path, (out, inside) in shapes.items():  # type: ignore[misc]
            stem = path if number == 0 else "lora_transformer_" + path.removeprefix("transformer.").replace(".", "_")
            tensors |= {f"{stem}.{down}.weight": torch.ones(1, inside), f"{stem}.{up}.weight": torch.ones(out, 1)}
        save_file(tensors, tmp_path / f"{number}.safetensors")
        assert set(read_adapter(tmp_path / f"{number}.safetensors", shapes).layers) == set(shapes)


@pytest.mark.parametrize(
    ("reference_name", "family", "name"),
    [
        ("flux1", "flux1", "double_blocks.3.img_attn.qkv"),
        ("sd3", "sd3", "joint_blocks.3.x_block.attn.qkv"),
        ("sd35-large", "sd3", "joint_blocks.37.x_block.mlp.fc1"),
        ("wan-1.3b", "wan", "blocks.3.self_attn.q"),
        ("wan-14b", "wan", "blocks.39.ffn.0"),
    ],
)
def test_a_file_alone_tells_its_model(reference_name: str, family: str, name: str, tmp_path: Path) -> None:
    (piece, *_) = reference(reference_name).pieces("transformer", name)
    out, inside = piece.whole
    tensors = {f"diffusion_model.{name}.lora_A.weight": torch.ones(1, inside),
               f"diffusion_model.{name}.lora_B.weight": torch.ones(out, 1)}  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    report = inspect(tmp_path / "a.safetensors")
    assert (report.family, report.yardstick, report.refusal) == (family, reference_name, "")
    assert report.confidence == "certain" and not report.unmatched


def test_every_layer_of_the_published_transformers_has_one_name_of_theirs() -> None:
    for name in ("flux1", "sd3", "wan-14b"):
        index = reference(name)
        paths = {path for path in index.shapes if path.startswith("transformer.") and len(index.shapes[path]) == 2}
        inner = {path.removeprefix("transformer."): shape for path, shape in index.shapes.items()}
        reached = {piece.path for _, pieces in spellings(index.family, inner) for piece in pieces}
        assert paths <= reached, sorted(paths - reached)[:3]


def test_a_t5_adapter_finds_its_encoder() -> None:
    for family, component in (("flux1", "text_encoder_2"), ("sd3", "text_encoder_3")):
        path = f"{component}.encoder.block.3.layer.0.SelfAttention.q"
        assert path in matrices(family)
        index: ModuleIndex = reference(family)
        assert index.find(component, "encoder_block_3_layer_0_SelfAttention_q") == path
