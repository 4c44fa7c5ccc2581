"""The tools from file to file: extract and bake against plain diffusers, DoRA on its model, the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from adapter_files import attention, kohya, lora, matrices, peft, write
from fakes_single_file import single_file, stability_names
from intarsia.app.cli import app
from intarsia.app.settings import Home
from intarsia.app.studio import Studio
from intarsia.pipelines.adapter_file import read_adapter
from intarsia.pipelines.architectures import reference
from intarsia.pipelines.attach import Attachment, attached
from intarsia.pipelines.dora import Decomposed
from intarsia.pipelines.errors import AdapterError
from intarsia.pipelines.headers import read_header
from intarsia.pipelines.model_weights import places
from intarsia.pipelines.requests import AdapterUse, ToolRequest
from intarsia.pipelines.sources import ModelSource, resolve, unet_shapes
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

D: Any = diffusers
Tiny = Callable[..., Path]


def run(home: Home, tool: str, *files: str | Path, **more: Any) -> dict[str, Any]:  # noqa: ANN401
    """Do it as the page's worker does; gives the paths of what was made, and the notices."""
    values = {"tool": tool, "adapters": [AdapterUse.read(str(file)) for file in files]} | more
    found: dict[str, Any] = {"notice": []}
    with Studio(home) as studio:
        for event in studio.run(ToolRequest.parse(values)):
            if event.type == "artifact":
                found[event.kind] = Path(event.path)
            elif event.type == "notice":
                found["notice"].append(event.text)
            elif event.type == "failed":
                raise AdapterError(event.message, event.hint)
    return found


def some(shapes: dict[str, tuple[int, ...]], every: int = 3) -> dict[str, tuple[int, ...]]:
    """Some layers of a tiny model, text encoders and convolutions among them."""
    found = {path: shape for path, shape in shapes.items() if len(shape) in (2, 4) and not path.startswith("vae")}
    found = {path: shape for path, shape in found.items() if "embedding" not in path}
    return dict(list(found.items())[::every])


@pytest.fixture
def model(tiny: Tiny) -> Path:
    return tiny("sdxl")


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    return {path.removesuffix(".weight"): shape for path, shape in unet_shapes(resolve(str(folder))).items()}


def tensors(folder: Path, part: str) -> dict[str, Tensor]:
    return load_file(next((folder / part).glob("*.safetensors")))


# Single weights of models


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_weight_of_a_real_checkpoint_is_found_under_stabilitys_names(family: str, tmp_path: Path) -> None:
    """The denoiser of the published model, its names spelled by the writer of single files that the tests have."""
    real = {path: torch.tensor([number]) for number, path in enumerate(reference(family).shapes)}
    unet = {f"{path.removeprefix('unet.')}.weight": value for path, value in real.items() if path.startswith("unet.")}
    spelled = {f"model.diffusion_model.{name}": value for name, value in stability_names(unet, 2)}
    save_file(spelled, tmp_path / "real.safetensors")
    found = places(ModelSource("real", "single_file", tmp_path / "real.safetensors", family))
    assert {path: int(place.read()) for path, place in found.items()} == {
        path: int(value) for path, value in real.items() if path.startswith("unet.")
    }


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_single_file_has_the_weights_of_its_folder(family: str, tiny: Tiny, tmp_path: Path) -> None:
    """Every weight an adapter can sit on, projections that are kept in one tensor among them."""
    folder = tiny(family)
    path = single_file(folder, family, tmp_path / "model.safetensors", layers_per_block=1)
    found = places(resolve(str(path)))
    whole = places(resolve(str(folder)))
    text = [name for name in whole if name.startswith("text_encoder") and "embedding" not in name]
    text = [name for name in text if "final_layer_norm" not in name and "text_projection" not in name]
    assert text and all(torch.equal(found[name].read(), whole[name].read()) for name in text)


# Bake


def test_a_baked_model_draws_as_the_adapter_does(model: Path, home: Home, tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", lora(some(shapes_of(model)), peft, scale=0.1))
    made = run(home, "bake", f"{file}:0.7", out=str(tmp_path / "baked"), options={"model": str(model)})
    assert made["model"] == tmp_path / "baked"
    plain = D.StableDiffusionXLPipeline.from_pretrained(model)
    baked = D.StableDiffusionXLPipeline.from_pretrained(tmp_path / "baked")
    parts = {name: getattr(plain, name) for name in ("unet", "text_encoder", "text_encoder_2")}
    adapter = read_adapter(file, unet_shapes(resolve(str(model))))
    with attached(parts, [Attachment("a", adapter, 0.7)]), torch.no_grad():
        wanted = outputs(plain)
    with torch.no_grad():
        found, untouched = outputs(baked), outputs(plain)
    assert float((wanted - untouched).norm()) > 1e-2 * float(untouched.norm())
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def outputs(pipeline: Any) -> Tensor:  # noqa: ANN401
    random = torch.Generator().manual_seed(0)
    ids = pipeline.tokenizer("a cat", return_tensors="pt", padding="max_length").input_ids
    first = pipeline.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
    second = pipeline.text_encoder_2(ids, output_hidden_states=True)
    states = torch.cat([first, second.hidden_states[-2]], dim=-1)
    config = pipeline.unet.config
    latents = torch.randn(1, config.in_channels, 16, 16, generator=random)
    times = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    return pipeline.unet(
        latents, torch.tensor([500]), states, added_cond_kwargs={"text_embeds": second.text_embeds, "time_ids": times}
    ).sample


def test_baking_changes_the_adapters_layers_alone_and_its_opposite_takes_it_back(
    model: Path, home: Home, tmp_path: Path
) -> None:
    shapes = some(shapes_of(model))
    file = write(tmp_path / "a.safetensors", lora(shapes, peft, scale=0.1))
    run(home, "bake", file, out=str(tmp_path / "there"), options={"model": str(model)})
    run(home, "bake", f"{file}:-1", out=str(tmp_path / "back"), options={"model": str(tmp_path / "there")})
    for part in ("unet", "text_encoder", "text_encoder_2", "vae"):
        before, there, back = (tensors(folder, part) for folder in (model, tmp_path / "there", tmp_path / "back"))
        for name, value in before.items():
            touched = any(f"{part}.{name}".replace("text_model.", "") == f"{path}.weight".replace("text_model.", "")
                          for path in shapes)  # fmt: skip
            assert torch.equal(value, there[name]) != touched, name
            torch.testing.assert_close(back[name], value, atol=1e-6, rtol=1e-5)


def test_nothing_is_baked_where_something_is(model: Path, home: Home, tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", lora(some(shapes_of(model)), peft))
    (tmp_path / "there").mkdir()
    with pytest.raises(AdapterError, match="already there"):
        run(home, "bake", file, out=str(tmp_path / "there"), options={"model": str(model)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "home", "there"]


def test_baking_in_sixteen_bits_tells_the_rounding(model: Path, home: Home, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(model, folder)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        file = next((folder / part).glob("*.safetensors"))
        save_file({name: value.half() for name, value in load_file(file).items()}, file, {"format": "pt"})
    adapter = write(tmp_path / "a.safetensors", lora(some(shapes_of(model)), peft, scale=0.05))
    made = run(home, "bake", adapter, out=str(tmp_path / "baked"), options={"model": str(folder)})
    report = json.loads(made["report"].read_text())
    relative = [row[3] for row in report["rows"]]
    assert 0 < max(relative) < 0.2 and "of the change" in made["notice"][0]
    found, before = tensors(tmp_path / "baked", "unet"), tensors(folder, "unet")
    assert {value.dtype for value in found.values()} == {torch.float16}
    assert found.keys() == before.keys()


# Extract


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_what_was_baked_is_extracted_again(family: str, tiny: Tiny, home: Home, tmp_path: Path) -> None:
    model = tiny(family)
    shapes = some(shapes_of(model))
    file = write(tmp_path / "a.safetensors", lora(shapes, peft, rank=2, scale=0.2))
    run(home, "bake", file, out=str(tmp_path / "tuned"), options={"model": str(model)})
    options = {"model": str(model), "tuned": str(tmp_path / "tuned"), "rank": 2, "dtype": "float32"}
    made = run(home, "extract", out=str(tmp_path / "found.safetensors"), options=options)
    index = unet_shapes(resolve(str(model)))
    wanted, found = read_adapter(file, index), read_adapter(made["adapter"], index)
    assert found.family == family and found.layers.keys() == wanted.layers.keys()
    assert str(tmp_path) not in str(dict(found.metadata)) and model.name in found.metadata["intarsia.made"]
    for path, shape in shapes.items():
        one, other = (file.layers[path].change(torch.zeros(shape)).weight for file in (found, wanted))
        assert one is not None and other is not None
        assert float((one - other).norm() / other.norm()) < 1e-4, path
    assert all(row[3] < 1e-4 for row in json.loads(made["report"].read_text())["rows"])


def test_two_equal_models_have_nothing_to_extract(model: Path, home: Home, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="do not differ"):
        run(home, "extract", name="x", options={"model": str(model), "tuned": str(model)})


# DoRA


def test_a_dora_is_merged_on_its_model_and_refused_without(model: Path, home: Home, tmp_path: Path) -> None:
    """Its change, computed from the model's weights, at full rank; plain PEFT would merge the factors alone."""
    shapes = dict(list(attention(shapes_of(model)).items())[:4])
    arrays = lora(shapes, kohya, seed=1)
    for path, shape in shapes.items():
        arrays[kohya(path)[0].replace("lora_down.weight", "dora_scale")] = (
            1 + abs(torch.randn(shape[0], 1, generator=torch.Generator().manual_seed(2))).numpy()
        )
    dora = write(tmp_path / "dora.safetensors", arrays)
    plain = write(tmp_path / "plain.safetensors", lora(shapes, peft, seed=3))
    index = unet_shapes(resolve(str(model)))
    with pytest.raises(AdapterError, match="own weights"):
        run(home, "cat", dora, plain, out=str(tmp_path / "no.safetensors"))
    options = {"model": str(model), "dtype": "float32"}
    made = run(home, "cat", dora, f"{plain}:0.5", out=str(tmp_path / "made.safetensors"), options=options)
    weights = places(resolve(str(model)))
    for path in shapes:
        own = weights[path].read()
        one, other, both = (
            read_adapter(file, index).layers[path].change(own).weight for file in (dora, plain, made["adapter"])
        )
        assert one is not None and other is not None and both is not None
        torch.testing.assert_close(both, one + 0.5 * other, atol=1e-5, rtol=1e-4)


# Slice


def test_a_slice_holds_its_layers_byte_for_byte(home: Home, tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", lora(dict(list(attention(matrices("sdxl")).items())), kohya, alpha=1.0))
    made = run(home, "slice", file, out=str(tmp_path / "style.safetensors"), options={"part": "style"})
    adapter = read_adapter(made["adapter"])
    assert adapter.role == "style" and all(".up_blocks.0.attentions.1." in path for path in adapter.layers)
    before, after = load_file(file), load_file(made["adapter"])
    assert after and all(torch.equal(before[name], value) for name, value in after.items())
    whole = read_adapter(file)
    left = {path for path in whole.layers if path not in adapter.layers}
    rows = {row[0]: row[1:] for row in json.loads(made["report"].read_text())["rows"]}
    assert {path for path, (_, error) in rows.items() if error} == left


def test_a_dora_is_sliced_without_its_model(home: Home, tmp_path: Path) -> None:
    shapes = dict(list(attention(matrices("sd15")).items())[::20])
    arrays = lora(shapes, kohya)
    for path, shape in shapes.items():
        arrays[kohya(path)[0].replace("lora_down.weight", "dora_scale")] = np.ones((shape[0], 1), np.float32)
    file = write(tmp_path / "dora.safetensors", arrays)
    options = {"blocks": "unet.down_blocks, unet.mid_block"}
    made = run(home, "slice", file, out=str(tmp_path / "part.safetensors"), options=options)
    kept = read_adapter(made["adapter"]).layers
    assert set(kept) == {path for path in shapes if not path.startswith("unet.up_blocks")} != set(shapes)
    assert all(isinstance(layer, Decomposed) for layer in kept.values())


def test_a_slice_of_nothing_is_refused_with_what_there_is(home: Home, tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", lora(dict(list(attention(matrices("sd15")).items())[:6]), kohya))
    with pytest.raises(AdapterError, match="no layers in unet") as caught:
        run(home, "slice", file, name="x", options={"blocks": "unet.mid_block"})
    assert "unet.down_blocks.0" in caught.value.hint


# Convert


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_converting_shows_that_nothing_is_lost(dialect: str, home: Home, tmp_path: Path) -> None:
    shapes = dict(list(attention(matrices("sd15")).items())[:6])
    file = write(tmp_path / "a.safetensors", lora(shapes, kohya if dialect == "diffusers" else peft, alpha=1.5))
    made = run(home, "convert", file, name="again", options={"to": dialect})
    report = json.loads(made["report"].read_text())
    assert {row[0] for row in report["rows"]} == set(shapes) and all(row[3] < 1e-10 for row in report["rows"])
    names = load_file(made["adapter"])
    assert all(("lora_down" in name or "lora_up" in name or "alpha" in name) == (dialect == "kohya") for name in names)


# The studio and the command line


def test_a_merge_enters_the_library_and_says_what_it_was_made_of(home: Home, tmp_path: Path) -> None:
    shapes = dict(list(attention(matrices("sd15")).items())[:6])
    files = [
        write(tmp_path / f"{name}.safetensors", lora(shapes, kohya, seed=seed), {"intarsia.trigger": name})
        for seed, name in enumerate(("cat", "dog"))
    ]
    run(home, "cat", files[0], f"{files[1]}:0.5", name="both")
    with Studio(home) as studio:
        entry = studio.shelf.find("both")
    assert (entry.family, entry.rank, entry.trigger) == ("sd15", 4, "cat, dog")
    made = json.loads(read_header(entry.path).metadata["intarsia.made"])
    assert made["tool"] == "cat" and [(item["name"], item["weight"]) for item in made["from"]] == [
        ("cat", 1.0),
        ("dog", 0.5),
    ]


def test_the_command_line_shows_the_error_before_it_writes(home: Home, tmp_path: Path) -> None:
    shapes = dict(list(attention(matrices("sd15")).items())[:3])
    one, other = (
        str(write(tmp_path / f"{seed}.safetensors", lora(shapes, kohya, rank=4, seed=seed))) for seed in range(2)
    )
    out = tmp_path / "small.safetensors"
    command = ["adapters", "resize", one, "--rank", "1", "--out", str(out)]
    looked = CliRunner().invoke(app, [*command, "--dry-run"])
    assert looked.exit_code == 0 and not out.exists()
    assert next(iter(shapes)) in looked.output and "relative" in looked.output
    told = CliRunner().invoke(app, [*command, "--json"])
    value = json.loads(told.output.strip().splitlines()[-1])
    assert told.exit_code == 0 and value["results"] == [str(out)] and len(value["figures"]["rows"]) == 3
    assert all(0 < row[3] < 1 and row[4] == 1 for row in value["figures"]["rows"])
    shown = CliRunner().invoke(app, ["adapters", "diff", one, other])
    assert shown.exit_code == 0 and "cosine" in shown.output
    again = CliRunner().invoke(app, [*command])
    assert again.exit_code != 0 and "already there" in again.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["merge", "cat", "{one}"], "takes 2 or more"),
        (["merge", "cat", "{one}", "{other}"], "needs a name"),
        (["merge", "ties", "{one}", "{other}", "--density", "2", "--name", "x"], "Density"),
        (["merge", "linear", "{one}", "{wide}", "--name", "x"], "ranks"),
        (["bake", "{one}", "--out", "{folder}/baked"], "no model to bake into"),
        (["extract", "--name", "x"], "Two models"),
        (["resize", "{one}", "--out", "{folder}/none/x.safetensors"], "no folder"),
        (["merge", "cat", "{one}", "{sdxl}", "--name", "x"], "is for"),
        (["diff", "{one}:0.5", "{other}"], "no weights"),
        (["resize", "{one}@unet.down_blocks.0=0.5", "--name", "x"], "as a whole"),
        (["merge", "cat", "{one}@0-0.5", "{other}", "--name", "x"], "as a whole"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(words: list[str], said: str, home: Home, tmp_path: Path) -> None:
    shapes = dict(list(attention(matrices("sd15")).items())[:3])
    large = dict(list(attention(matrices("sdxl")).items())[-3:])
    places = {
        "one": write(tmp_path / "one.safetensors", lora(shapes, kohya)),
        "other": write(tmp_path / "other.safetensors", lora(shapes, kohya, seed=1)),
        "wide": write(tmp_path / "wide.safetensors", lora(shapes, kohya, rank=3)),
        "sdxl": write(tmp_path / "sdxl.safetensors", lora(large, kohya)),
        "folder": tmp_path,
    }
    result = CliRunner().invoke(app, ["adapters", *(word.format(**places) for word in words)])
    assert result.exit_code == 2 and said in result.output and "Traceback" not in result.output
