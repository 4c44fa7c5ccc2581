"""Pickles made into safetensors: what sound ones hold goes over, what hostile ones would do never happens."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import kohya, lora, low_rank, peft
from bad_files import command
from hostile_files import LINEAR, SD15, SOME
from intarsia.app.settings import Home
from intarsia.app.studio import Studio
from intarsia.pipelines import pickles
from intarsia.pipelines.adapter_file import read_adapter
from intarsia.pipelines.errors import AdapterError, InputError
from intarsia.pipelines.headers import read_header
from intarsia.pipelines.identify import inspect
from intarsia.pipelines.pickle_child import flat
from intarsia.pipelines.pickles import environment, is_pickle, unpickle
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]


def tensors(spelling: Callable[[str], tuple[str, str, str]] = kohya, alpha: float | None = 1.5) -> Tensors:
    return {name: torch.from_numpy(value) for name, value in lora(SOME, spelling, rank=2, alpha=alpha).items()}


def test_a_file_of_kohya_goes_over_bit_by_bit(tmp_path: Path) -> None:
    given: dict[str, Any] = dict(tensors())
    first, second = [name for name in given if name.endswith("lora_down.weight")][:2]
    given[first] = given[first].double()
    given[second] = torch.nn.Parameter(given[second].T.contiguous().T)  # strides of a transposed one
    alpha = next(name for name in given if name.endswith(".alpha"))
    saved = given | {alpha: 1.5, "epoch": 3, "optimizer": {"lr": 1e-4}}
    torch.save({"state_dict": saved, "global_step": 100}, tmp_path / "a.pt")
    made = unpickle(tmp_path / "a.pt", tmp_path / "a.safetensors")
    found = load_file(made.path)
    assert found.keys() == given.keys()
    for name, value in found.items():
        wanted = torch.as_tensor(given[name])
        assert value.dtype == wanted.dtype and torch.equal(value, wanted)
    assert found[first].dtype == torch.float64
    assert (made.layers, made.dialect) == (len(SOME), "kohya")
    assert len(made.lost) == 1 and "global_step" in made.lost[0] and "3 entries" in made.lost[0]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_old_form_and_shared_memory(tmp_path: Path) -> None:
    given = tensors(peft, alpha=None)
    base = torch.randn(4, 320)
    name = f"{LINEAR}.lora_A.weight"
    given[name], given[name.replace("to_q", "to_k")] = base[:2], base[1:3]  # overlapping parts of one storage
    given[name.replace("to_q", "to_k").replace("_A", "_B")] = torch.randn(320, 2)
    torch.save(given, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    found = load_file(unpickle(tmp_path / "a.bin", tmp_path / "a.safetensors").path)
    assert found.keys() == given.keys() and all(torch.equal(found[name], given[name]) for name in given)


def test_settings_of_peft_beside_the_file_give_the_alphas(tmp_path: Path) -> None:
    shapes = {path: shape for path, shape in SOME.items() if path.startswith("unet.")}
    given = {f"base_model.model.{name.removeprefix('unet.')}": torch.from_numpy(value)
             for name, value in lora(shapes, peft, rank=2).items()}  # fmt: skip
    torch.save(given, tmp_path / "adapter_model.bin")
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "alpha_pattern": {"to_k": 2}, "target_modules": ".*"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    made = unpickle(tmp_path / "adapter_model.bin", tmp_path / "a.safetensors")
    assert made.lost == ()
    layers = low_rank(read_adapter(made.path))
    assert {path: layer.alpha for path, layer in layers.items()} == {
        path: 2.0 if path.endswith("to_k") else 8.0 for path in shapes
    }
    assert "target_modules" not in read_header(made.path).metadata["lora_adapter_metadata"]
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LOHA", "r": 2}')
    made = unpickle(tmp_path / "adapter_model.bin", tmp_path / "b.safetensors")
    assert "adapter_config.json" in made.lost[0] and inspect(made.path).alpha == (2.0, 2.0)


def test_lists_of_lora_diffusion_and_their_words(tmp_path: Path) -> None:
    shapes = {n: SD15[LINEAR] for n in range(2)}  # its first two layers
    rows = [row for shape in shapes.values() for row in (torch.randn(shape[0], 1), torch.randn(1, shape[1]))]
    torch.save({"unet": rows, "<s1>": torch.randn(768)}, tmp_path / "lora_weight.pt")
    made = unpickle(tmp_path / "lora_weight.pt", tmp_path / "a.safetensors")
    assert (made.layers, made.dialect) == (2, "lora_diffusion")
    found = load_file(made.path)
    assert torch.equal(found["unet:1:up"], rows[2]) and torch.equal(found["unet:0:down"], rows[1])
    assert any("<s1>" in warning for warning in inspect(made.path).warnings)


def test_a_bare_list_is_named_by_its_widths() -> None:
    text = [torch.zeros(768, 1), torch.zeros(1, 768)]
    assert [name for name, _ in flat(text)] == ["text_encoder:0:up", "text_encoder:0:down"]
    assert next(flat([torch.zeros(320, 1), *text[1:]]))[0] == "unet:0:up"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"emb_params": torch.zeros(2, 768)}, "textual inversion"),
        ({768: [{"linear.0.weight": torch.zeros(2, 2)}] * 2}, "hypernetwork"),
        ({"state_dict": {"model.diffusion_model.x.weight": torch.zeros(2)}}, "a whole model"),
        ({"lora_unet_x.oft_blocks": torch.zeros(2, 2)}, "OFT"),
        ({"epoch": 3}, "no tensors"),
        (torch.zeros(2, dtype=torch.complex64), "no tensors"),
    ],
)
def test_what_is_no_adapter_is_refused_by_its_name(value: object, words: str, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(AdapterError, match=words) as caught:
        unpickle(tmp_path / "a.pt", tmp_path / "a.safetensors")
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


# Hostile ones


class Runs:
    """Leaves a mark where it is unpickled by a reader that obeys."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (self.marker,)


class Big:
    """A few bytes that ask for a hundred gigabytes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (100 * 2**30,)


def _code(folder: Path) -> Path:
    torch.save({"a": Runs(folder / "marker")}, folder / "a.pt")
    return folder / "a.pt"


def _old_code(folder: Path) -> Path:
    torch.save({"a": Runs(folder / "marker")}, folder / "a.pt", _use_new_zipfile_serialization=False)
    return folder / "a.pt"


def _plain_pickle(folder: Path) -> Path:
    (folder / "a.pt").write_bytes(pickle.dumps({"a": Runs(folder / "marker")}))
    return folder / "a.pt"


def _memory(folder: Path) -> Path:
    torch.save({"a": Big()}, folder / "a.pt")
    return folder / "a.pt"


def _stride(folder: Path) -> Path:
    value = torch.zeros(1).expand(2**35)
    torch.save({"unet.a.lora_A.weight": value}, folder / "a.pt")
    return folder / "a.pt"


def _bomb(folder: Path) -> Path:
    raw = io.BytesIO()
    torch.save({"a": torch.zeros(2**26)}, raw)
    with zipfile.ZipFile(raw) as plain, zipfile.ZipFile(folder / "a.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert (folder / "a.pt").stat().st_size < 2**20
    return folder / "a.pt"


def _crowd(folder: Path) -> Path:
    table: dict[str, Any] = {}
    table |= {str(number): table for number in range(1000)}
    torch.save(table, folder / "a.pt")
    return folder / "a.pt"


def _endless(folder: Path) -> Path:
    """A table whose 200,000 whole numbers all have one hash: each is held against all before it."""
    rows = b"".join(pickle.dumps(number * sys.hash_info.modulus, 2)[2:-1] + b"N" for number in range(1, 200_000))
    raw = io.BytesIO()
    torch.save({}, raw)
    with zipfile.ZipFile(raw) as plain, zipfile.ZipFile(folder / "a.pt", "w") as made:
        for name in plain.namelist():
            own = name.endswith("data.pkl")
            made.writestr(name, b"\x80\x02}(" + rows + b"u." if own else plain.read(name))
    return folder / "a.pt"


def _cut(folder: Path) -> Path:
    torch.save(tensors(), folder / "a.pt")
    os.truncate(folder / "a.pt", 5000)
    return folder / "a.pt"


def _page(folder: Path) -> Path:
    (folder / "a.pt").write_text("<html>Sign in</html>")
    return folder / "a.pt"


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (_code, r"os\.makedirs\), which could run code"),
        (_old_code, r"os\.makedirs\), which could run code"),
        (_plain_pickle, "no PyTorch file|could run code"),
        (_memory, "far more memory"),
        (_stride, "far more than it has"),
        (_bomb, "far more than it has"),
        (_crowd, "more than 100,000 entries"),
        (_endless, "not read within 3 seconds"),
        (_cut, "no PyTorch file"),
        (_page, "no PyTorch file"),
    ],
    ids=["code", "code, old form", "plain pickle", "memory", "stride", "bomb", "crowd", "endless", "cut", "page"],
)
def test_hostile_and_broken_pickles_are_refused_and_nothing_runs(
    build: Callable[[Path], Path], words: str, tmp_path: Path
) -> None:
    path = build(tmp_path)
    with pytest.raises(AdapterError, match=words) as caught:
        unpickle(path, tmp_path / "a.safetensors", seconds=3)
    assert "author" in caught.value.hint
    assert [left.name for left in tmp_path.iterdir()] == ["a.pt"]


def test_the_marked_pickle_would_have_run(tmp_path: Path) -> None:
    """The test above proves something only if an obedient reader does leave the mark."""
    path = _code(tmp_path)
    torch.load(path, weights_only=False)
    assert (tmp_path / "marker").is_dir()


def test_a_reader_that_never_ends_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({}, tmp_path / "a.pt")
    slow = tmp_path / "slow"
    slow.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/number\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(pickles.sys, "executable", str(slow))
    monkeypatch.setattr(pickles, "PATIENCE", 0)
    with pytest.raises(AdapterError, match="given up"):
        unpickle(tmp_path / "a.pt", tmp_path / "a.safetensors", seconds=1)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "number").read_text()), 0)


def test_the_reading_process_learns_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PYTHONSTARTUP", "x.py")
    told = environment()
    assert set(told) <= {*pickles.KEPT, "OMP_NUM_THREADS"} and "hf_secret" not in told.values()


def test_pickles_are_told_from_safetensors(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "a.dat")
    (tmp_path / "b.pt").write_bytes(b"")
    (tmp_path / "c.safetensors").write_bytes(struct.pack("<Q", 0x80) + b"{}")
    found = [is_pickle(tmp_path / name) for name in ("a.dat", "b.pt", "c.safetensors", "none.pt")]
    assert found == [True, True, False, False]


# The command line


def test_a_dropped_pickle_names_the_command_which_then_works(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(tensors(), tmp_path / "old.bin")
    with Studio(home) as studio, pytest.raises(AdapterError) as caught:
        studio.import_adapter(tmp_path / "old.bin")
    assert "intarsia adapters convert FILE --out NEW.safetensors" in caught.value.hint
    new = tmp_path / "new.safetensors"
    assert command(monkeypatch, "adapters", "convert", tmp_path / "old.bin", "--out", new) == 0
    assert f"{len(SOME)} layers as kohya names them. Every tensor is the same." in capsys.readouterr().out
    assert command(monkeypatch, "adapters", "import", new) == 0
    assert command(monkeypatch, "adapters", "convert", tmp_path / "old.bin", "--to", "kohya", "--out", new) == 2
    assert "Leave --to out" in capsys.readouterr().err
    torch.save({"a": Runs(tmp_path / "marker")}, tmp_path / "old.bin")
    before = new.read_bytes()
    assert command(monkeypatch, "adapters", "convert", tmp_path / "old.bin", "--to", "safetensors", "--out", new) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: old.bin holds more than tensors") and "Traceback" not in error
    assert new.read_bytes() == before and not (tmp_path / "marker").exists()


def test_the_result_is_named_as_what_it_is(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"does not end in \.safetensors"):
        unpickle(tmp_path / "a.pt", tmp_path / "b.pt")
