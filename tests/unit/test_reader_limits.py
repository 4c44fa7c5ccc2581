"""What a hostile file may cost, in seconds and in memory, measured in a process of its own."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from adapter_files import lora, peft, write_raw
from hostile_files import SD15, Part, assemble, parts, zeros
from intarsia.pipelines import layers, trigger_words
from intarsia.pipelines.errors import AdapterError
from intarsia.pipelines.header_table import MAX_TENSORS
from intarsia.pipelines.headers import MAX_HEADER
from intarsia.pipelines.identify import inspect

WATCHED = """
import json, sys, time, tracemalloc
from pathlib import Path
from intarsia.pipelines.errors import AdapterError
from intarsia.pipelines.identify import inspect

def look(path):
    try:
        return inspect(Path(path)).refusal
    except AdapterError as error:
        return error.message

look(sys.argv[1])  # so that tables which every file needs are there
for path in sys.argv[2:]:
    begun = time.process_time()
    said = look(path)
    seconds = time.process_time() - begun
    tracemalloc.start()  # numpy's arrays are counted too; it would slow the clock
    look(path)
    print(json.dumps([said, seconds, tracemalloc.get_traced_memory()[1]]))
    tracemalloc.stop()
"""
MB = 2**20


@dataclass(frozen=True)
class Cost:
    """What came of a file: the refusal ("" if it was taken), seconds of work, bytes held at the worst moment."""

    said: str
    seconds: float
    memory: int


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "sound.safetensors"
    path.write_bytes(parts(lora(dict(list(SD15.items())[:4]), peft)).bytes())
    return path


def costs(sound: Path, hostile: Sequence[Path]) -> list[Cost]:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, sound, *hostile], capture_output=True, text=True, timeout=200, check=True
    )
    return [Cost(*json.loads(line)) for line in done.stdout.splitlines()]


def cost(sound: Path, hostile: Path) -> Cost:
    return costs(sound, [hostile])[0]


def test_a_header_of_100_mb_costs_nothing(sound: Path, tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a.safetensors", b'{"__metadata__":{"a":"' + b"x" * 100_000_000 + b'"}}')
    found = cost(sound, path)
    assert "declares a header of 100,000,025 bytes" in found.said
    assert found.seconds < 0.1 and found.memory < 20 * MB, found


FILLED = {
    "nested lists": (b'{"a":', b"[[[[[]]]]],"),
    "lists in lists": (b'{"a":', b"["),
    "empty tables": (b'{"a":{"dtype":', b"{},"),
    "numbers": (b'{"a":{"dtype":"F32","shape":[', b"0,"),
    "spaces": (b"{", b" "),
    "one name": (b'{"', b"x"),
    "escapes": (b'{"', b"\\u0041"),
    "metadata of numbers": (b'{"__metadata__":{"a":[', b"1,"),
    "backslashes": (b'{"__metadata__":{"a":"', b"\\\\"),
}


def test_16_mb_of_nonsense_are_refused_soon_and_in_little_memory(sound: Path, tmp_path: Path) -> None:
    paths: list[Path] = []
    for kind, (start, filling) in FILLED.items():
        raw = start + filling * ((MAX_HEADER - len(start)) // len(filling))
        paths.append(write_raw(tmp_path / f"{kind}.safetensors", raw))
    for path, found in zip(paths, costs(sound, paths), strict=True):
        assert found.said, path.stem
        assert found.seconds < 1 and found.memory < 6 * MAX_HEADER, (path.stem, found)


def test_a_crowd_of_tiny_tensors_is_refused_at_the_first_one_too_many(sound: Path, tmp_path: Path) -> None:
    rows = ",".join(f'"{n}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for n in range(250_000))
    found = cost(sound, write_raw(tmp_path / "a.safetensors", f"{{{rows}}}"))
    assert f"more than {MAX_TENSORS:,} tensors" in found.said
    assert found.seconds < 1 and found.memory < 100 * MB, found


def test_as_many_tensors_as_are_read_are_read_in_seconds(tmp_path: Path) -> None:
    """Names of full length that look like layers, held against every known model."""
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_"
    names = [f"{stem}{n:0430}.lora_{part}.weight" for n in range(MAX_TENSORS // 2) for part in ("up", "down")]
    raw = assemble([(name, zeros("F16", (1, 1))) for name in names])
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw)
    begun = time.process_time()
    assert "0 of 10000 layers" in inspect(path).refusal
    assert time.process_time() - begun < 10


def test_ten_gigabytes_that_are_announced_and_not_there(sound: Path, tmp_path: Path) -> None:
    size = 10 * 2**30
    head = json.dumps({"a.lora_A.weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path = write_raw(tmp_path / "a.safetensors", head)
    found = cost(sound, path)
    assert "10,737,418,240 bytes of tensors are announced, 0 are there" in found.said
    assert found.seconds < 0.1 and found.memory < 20 * MB, found


def test_a_large_file_is_never_in_memory_as_a_whole(sound: Path, tmp_path: Path) -> None:
    """200 MB, mostly holes of a sparse file; the promise is 1.2 times the file, the reader takes a tenth."""
    wide = 100 * MB // 2 // 1280
    names = ["unet.mid_block.resnets.0.conv1.lora_A.weight", "unet.mid_block.resnets.0.conv1.lora_B.weight"]
    shapes, at, table = [(wide, 1280), (1280, wide)], 0, {}
    for name, shape in zip(names, shapes, strict=True):
        length = shape[0] * shape[1]
        table[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at + 2 * length]}
        at += 2 * length
    head = json.dumps(table).encode()
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + at)
    found = cost(sound, path)
    assert at > 190 * MB
    assert found.memory < 0.1 * at, found


def test_a_pattern_of_many_rows_is_looked_up_not_walked(sound: Path, tmp_path: Path) -> None:
    """722 layers against a hundred thousand rows took minutes when each was held against each."""
    rows = {f"nowhere.{n}": 1 for n in range(100_000)}
    told = json.dumps({"unet.r": 1, "unet.lora_alpha": 2, "unet.alpha_pattern": rows, "unet.rank_pattern": rows})
    path = tmp_path / "a.safetensors"
    path.write_bytes(parts(lora(SD15, peft, rank=1), {"lora_adapter_metadata": told}).bytes())
    assert len(told) < layers.MAX_TEXT
    found = cost(sound, path)
    assert found.said == "" and found.seconds < 5, found
    assert inspect(path).alpha == (1.0, 2.0)  # text encoders are not told of


def test_texts_too_long_to_be_parsed_are_left_aside_with_a_warning(sound: Path, tmp_path: Path) -> None:
    filling = '{"":{}},'
    text = '{"a":' + filling * (1 + trigger_words.MAX_CAPTIONS // len(filling))
    texts = {"ss_tag_frequency": text, "lora_adapter_metadata": text}
    path = tmp_path / "a.safetensors"
    path.write_bytes(parts(lora(dict(list(SD15.items())[:4]), peft), texts).bytes())
    found = cost(sound, path)
    assert found.said == "" and found.seconds < 1 and found.memory < 100 * MB, found
    told = " ".join(inspect(path).warnings)
    assert "captions is too long" in told and "lora_adapter_metadata in the file cannot be read" in told


def test_a_name_of_full_length_is_shortened_where_it_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(assemble([(f"unet.{'x' * 490}.{n}", Part("F32", (1,), bytes(4))) for n in range(9)]))
    assert len(inspect(path).refusal) < 700


def test_numbers_of_other_types_are_told_by_type(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(assemble([("a.lora_A.weight", Part("C64", (1,), bytes(8)))]))
    with pytest.raises(AdapterError, match=r"stores a\.lora_A\.weight as C64, which is not known"):
        inspect(path)
