"""Headers of adapter files: what is refused before anything is parsed, and what values are read."""

from __future__ import annotations

import json
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from adapter_files import write, write_raw
from intarsia.pipelines import headers
from intarsia.pipelines.errors import AdapterError
from intarsia.pipelines.header_table import MAX_TENSORS
from intarsia.pipelines.headers import hashes, read_header, scan, write_subset

ONE = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def refused(path: Path) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        read_header(path)
    return caught.value


def test_a_sound_file_gives_shapes_and_metadata(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"x": np.ones((2, 3), np.float16)}, {"who": "me"})
    header = read_header(path)
    assert header.tensors["x"].shape == (2, 3)
    assert header.metadata == {"who": "me"}
    assert header.values("x").tolist() == [[1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("name", ["a.ckpt", "a.pt", "a.bin", "a.pkl", "a.PTH"])
def test_pickles_are_refused_by_their_ending(tmp_path: Path, name: str) -> None:
    error = refused(write_raw(tmp_path / name, ONE, b"\0" * 8))
    assert "not read" in error.message
    assert ".safetensors" in error.hint


def test_a_renamed_zip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"x")
    assert "zip" in refused(path).message


def test_a_renamed_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(pickle.dumps({"a": 1}))
    assert "could run code" in refused(path).message


def test_a_header_length_that_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    text = json.dumps(ONE).ljust(0x80)
    path = write_raw(tmp_path / "a.safetensors", text, b"\0" * 8)
    assert path.read_bytes()[:1] == b"\x80"
    assert set(read_header(path).tensors) == {"a"}


def test_a_git_lfs_pointer_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refused(path).hint


@pytest.mark.parametrize(
    ("content", "word"), [(b"", "empty"), (b"abc", "too short"), (b"hello, this is a text file", "not a safetensors")]
)
def test_files_of_another_kind_are_refused(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert word in refused(path).message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "no file" in refused(tmp_path / "none.safetensors").message


def test_a_header_of_100_mb_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a.safetensors", b"{" + b" " * 64, length=100_000_000)
    assert "100,000,000 bytes" in refused(path).message


def test_a_file_cut_off_in_its_header_or_body_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.safetensors", {"x": np.ones(64, np.float32)}).read_bytes()
    for length in (40, len(whole) - 4):
        path = tmp_path / "cut.safetensors"
        path.write_bytes(whole[:length])
        assert "cut off" in refused(path).message


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    assert "after its last tensor" in refused(write_raw(tmp_path / "a.safetensors", ONE, b"\0" * 12)).message


def test_duplicate_names_are_refused(tmp_path: Path) -> None:
    entry = json.dumps(ONE["a"])
    assert "twice" in refused(write_raw(tmp_path / "a.safetensors", f'{{"a":{entry},"a":{entry}}}', b"\0" * 8)).message


def entry(dtype: object = "F32", shape: object = (2,), span: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


@pytest.mark.parametrize(
    ("table", "word"),
    [
        ({"x" * 513: entry()}, "name of 513"),
        ({"": entry()}, "name of 0"),
        ({"a": entry(shape=(1, 1, 1, 1, 1, 2))}, "6 dimensions"),
        ({"a": entry(dtype="F4X")}, "not known"),
        ({"a": entry(shape=(3,))}, "does not fit its shape"),
        ({"a": entry(shape=(-2,))}, "wrongly"),
        ({"a": entry(span=(-8, 0))}, "wrongly"),
        ({"a": entry(shape=(True, 2))}, "wrongly"),
        ({"a": entry(shape=(2**70,))}, "wrongly"),
        ({"a": [1, 2]}, "wrongly"),
        ({"a": entry(), "b": entry()}, "overlap"),
        ({"a": entry(span=(0, 8)), "b": entry(span=(12, 20))}, "hole"),
        ({"a": entry(span=(4, 12))}, "hole"),
        ({"__metadata__": {"n": 1}, "a": entry()}, "metadata"),
        ([1, 2], "not a safetensors"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, table: object, word: str) -> None:
    assert word in refused(write_raw(tmp_path / "a.safetensors", table, b"\0" * 20)).message


@pytest.mark.parametrize("text", ['{"a":', "{" * 100_000, '{"a":NaN}', "{\xff}"])
def test_a_header_that_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    refused(write_raw(tmp_path / "a.safetensors", text.encode("latin-1"), b"\0" * 8))


def test_too_many_tensors_are_refused(tmp_path: Path) -> None:
    table = {f"t{n}": entry(shape=(0,), span=(0, 0)) for n in range(MAX_TENSORS + 1)}
    assert "more than 20,000 tensors" in refused(write_raw(tmp_path / "a.safetensors", table)).message


def test_every_float_type_is_read_exactly(tmp_path: Path) -> None:
    values = np.array([1.5, -2.0, 0.0, 3.140625], np.float32)
    bf16 = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    parts = {"F16": values.astype("<f2").tobytes(), "BF16": bf16, "F32": values.tobytes()}
    parts["F64"] = values.astype("<f8").tobytes()
    at, table = 0, {}
    for dtype, raw in parts.items():
        table[dtype] = entry(dtype, [4], [at, at + len(raw)])
        at += len(raw)
    header = read_header(write_raw(tmp_path / "a.safetensors", table, b"".join(parts.values())))
    for dtype in parts:
        assert header.values(dtype).tolist() == values.tolist(), dtype
    assert scan(header).not_finite is None


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_tensor_that_is_not_finite_is_named(tmp_path: Path, dtype: str, bad: float) -> None:
    kinds = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
    values = np.array([0.0, bad], np.float32)
    raw = (
        (values.view(np.uint32) >> 16).astype("<u2").tobytes()
        if dtype == "BF16"
        else values.astype(kinds[dtype]).tobytes()
    )
    table = {"good": entry("F32", [1], [0, 4]), "bad": entry(dtype, [2], [4, 4 + len(raw)])}
    assert scan(read_header(write_raw(tmp_path / "a.safetensors", table, b"\0" * 4 + raw))).not_finite == "bad"


def test_a_bad_value_behind_the_first_piece_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "CHUNK", 8)
    values = np.zeros(21, np.float32)
    values[20] = np.nan
    header = read_header(write(tmp_path / "a.safetensors", {"x": values}))
    assert scan(header).not_finite == "x"
    assert len(list(header.chunks("x"))) == 3


def test_zero_tensors_are_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"zero": np.zeros(3, np.float32), "one": np.ones(3, np.float32)})
    assert scan(read_header(path)).zeros == {"zero"}


def test_float8_is_refused_with_its_name(tmp_path: Path) -> None:
    header = read_header(write_raw(tmp_path / "a.safetensors", {"a": entry("F8_E4M3", [4], [0, 4])}, b"\0" * 4))
    with pytest.raises(AdapterError, match="F8_E4M3"):
        header.values("a")


def test_hashes_are_those_of_file_and_buffer(tmp_path: Path) -> None:
    import hashlib

    path = write(tmp_path / "a.safetensors", {"x": np.arange(5, dtype=np.float32)})
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    expected = hashlib.sha256(raw).hexdigest(), hashlib.sha256(raw[8 + length :]).hexdigest()
    assert hashes(read_header(path)) == expected


def test_a_subset_keeps_the_bytes_of_its_tensors(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {n: np.full(3, i, np.float16) for i, n in enumerate("xyz")})
    write_subset(read_header(path), ["z", "x"], {"k": "v"}, tmp_path / "b.safetensors")
    part = read_header(tmp_path / "b.safetensors")
    assert (set(part.tensors), part.metadata) == ({"x", "z"}, {"k": "v"})
    assert part.values("z").tolist() == [2, 2, 2]


def test_reading_headers_needs_no_torch() -> None:
    import subprocess

    code = "import sys, intarsia.pipelines.identify, intarsia.pipelines.adapter_file, intarsia.app.shelf; "
    code += "sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
