"""The reader against files nobody thought of: whatever the bytes are, it answers or refuses in words, soon."""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_files import STEM, Part, Parts, assemble, sound_files, touched, zeros
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from intarsia.pipelines.adapter_file import read_adapter
from intarsia.pipelines.adapter_types import AdapterFile
from intarsia.pipelines.convert import convert
from intarsia.pipelines.errors import IntarsiaError
from intarsia.pipelines.headers import BITS, read_header
from intarsia.pipelines.identify import Report, inspect

SOUND = sound_files()
MODEL = touched()
DEADLINE = 5.0  # seconds for all readings of one small file, on a machine that does other things too
QUICK = settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
LONG = settings(QUICK, max_examples=5_000, derandomize=False)


def read_all(path: Path) -> None:
    """Everything that is ever done with a stranger's file; each may refuse, none may break."""
    begun = time.monotonic()
    readings: list[Callable[[], Any]] = [
        lambda: read_header(path),
        lambda: told(inspect(path)),
        lambda: told(inspect(path, MODEL)),
        lambda: read_adapter(path),
        lambda: changed(read_adapter(path, MODEL)),
        lambda: convert(path, "kohya", path.with_name("kohya.safetensors")),
        lambda: convert(path, "diffusers", path.with_name("diffusers.safetensors")),
        lambda: convert(path, "peft", path.with_name("peft")),
    ]
    shutil.rmtree(path.with_name("peft"), ignore_errors=True)
    for reading in readings:
        try:
            reading()
        except IntarsiaError as error:
            assert error.message and error.message.isprintable(), error.message
    assert time.monotonic() - begun < DEADLINE
    assert not list(path.parent.glob("*.part"))


def told(report: Report) -> None:
    """What is said can be written and shown."""
    values = report.as_dict()
    json.dumps(values, allow_nan=False)
    for text in (report.refusal, report.hint, report.trigger, report.base, *report.warnings, *report.unmatched):
        assert text.isprintable(), text


def changed(adapter: AdapterFile) -> None:
    """A layer that was read can be put on the model's layer."""
    for path, layer in adapter.layers.items():
        if path in MODEL:
            weight = torch.ones(MODEL[path])
            change = layer.change(weight, torch.ones(weight.shape[0]))
            assert change.weight is None or change.weight.shape == weight.shape


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strange") / "strange.safetensors"


@pytest.mark.parametrize("name", SOUND)
def test_sound_files_are_read(name: str, file: Path) -> None:
    file.write_bytes(SOUND[name].bytes())
    report = inspect(file)
    assert (report.refusal, report.unmatched, report.misfits) == ("", (), ())
    assert read_adapter(file).layers
    read_all(file)


# Bytes


def frame(length: int, head: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", length) + head + body


framed = st.builds(
    frame,
    st.one_of(st.integers(0, 400), st.integers(0, 2**64 - 1)),
    st.one_of(st.binary(max_size=64), st.just(b"{"), st.just(b'{"a":')),
    st.binary(max_size=400),
)


def any_bytes(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    read_all(file)


# Headers

plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**62, 2**63, 2**64, 10**30, -1, 0, 1]),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from([*BITS, "F4", "C64", "\ud800", "\x00", "a" * 600, "../x", "\x1b[2J", "<script>"]),
)
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3))
sizes = st.lists(st.one_of(st.integers(0, 9), st.sampled_from([2**31, 2**62, True, -1, 1.0])), max_size=7)
entries = st.one_of(
    values,
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.one_of(st.sampled_from([*BITS]), values),
            "shape": st.one_of(sizes, values),
            "data_offsets": st.one_of(st.lists(st.integers(0, 64), min_size=2, max_size=2), values),
            "more": values,
        },
    ),
)
names = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["__metadata__", *(name for file in SOUND.values() for name in file.tensors)]),
    st.sampled_from(["x" * 513, "../../x", "a\x00b", "\\\\host\\x", "/etc/passwd", "C:\\x", "\ud800", "\u202e", ""]),
)
tables = st.lists(st.tuples(names, st.one_of(entries, entries, values)), max_size=6)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A header of valid JSON (duplicates, NaN and huge numbers among it) before some bytes."""
    rows = [f"{json.dumps(name)}:{json.dumps(value)}" for name, value in draw(tables)]
    text = "{" + ",".join(rows) + "}"
    if draw(st.booleans()):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.sampled_from(["\ud800", "NaN", "-0", "1e999", "9" * 5000, "[" * 5000])) + text[at:]
    raw = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw + draw(st.binary(max_size=64))


# Real files, bent

ACTIONS = ["shape", "shape", "shape", "dtype", "dtype", "alpha", "text", "peft", "mix", "rename", "drop", "twice"]
STRANGE_NAMES = ["__metadata__x", "../../x", "\x00", "\ud800", "<b>", "lora_unet_x.alpha", "emb_params", "x" * 512]
ALPHAS = [Part("F32", (), struct.pack("<f", value)) for value in (0.0, -1.0, 1e38, float("nan"), float("inf"))] + [
    zeros("F32", (3,)),
    zeros("F32", (0,)),
    zeros("BOOL", ()),
    zeros("I64", ()),
    zeros("F8_E4M3", (1, 1)),
]
NUMBERS = [0, -1, 1, 8, 1.5, 10**400, 1e308, True, None, "4", [], {}, "NaN", 65_536, 65_537]
TEXTS = ["x" * 2**20, "\x00\x1b[2J\r\n", "<script>alert(1)</script>", "[" * 10_000, "{}", "null", '{"a":{"b":1e400}}']
TEXT_KEYS = [
    "lora_adapter_metadata", "ss_tag_frequency", "modelspec.thumbnail", "modelspec.architecture", "intarsia.role",
    "intarsia.family", "intarsia.base", "intarsia.trigger", "ss_sd_model_name", "<img src=x onerror=alert(1)>",
]  # fmt: skip


@st.composite
def shapes(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Another shape, near the one given."""
    sides = list(shape)
    for _ in range(draw(st.integers(1, 2))):
        action = draw(st.sampled_from(["drop", "add", "set", "swap", "none"]))
        if action == "none":
            sides = []
        elif action == "add":
            sides.insert(draw(st.integers(0, len(sides))), draw(st.sampled_from([0, 1, 2, 3])))
        elif sides:
            at = draw(st.integers(0, len(sides) - 1))
            if action == "drop":
                del sides[at]
            elif action == "swap":
                sides.reverse()
            else:
                sides[at] = draw(st.sampled_from([0, 1, 2, 3, 320, 1280, sides[at] + 1]))
    return tuple(sides)


@st.composite
def peft_texts(draw: st.DrawFn) -> str:
    keys = st.sampled_from(["unet.r", "unet.lora_alpha", "unet.alpha_pattern", "unet.rank_pattern", "unet.use_rslora"])
    patterns = st.dictionaries(st.sampled_from(["to_q", "^to_q", ".*", "(a+)+$", ""]), st.sampled_from(NUMBERS))
    return json.dumps(draw(st.dictionaries(keys, st.one_of(st.sampled_from(NUMBERS), patterns))))


@st.composite
def bent(draw: st.DrawFn) -> bytes:
    """A sound file of any dialect and kind, with up to three things wrong with it."""
    found: Parts = SOUND[draw(st.sampled_from(sorted(SOUND)))]
    tensors, metadata = list(found.tensors.items()), dict(found.metadata)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(tensors) - 1)) if tensors else None
        action = draw(st.sampled_from(ACTIONS))
        if action == "text":
            metadata[draw(st.sampled_from(TEXT_KEYS))] = draw(st.one_of(st.sampled_from(TEXTS), st.text(max_size=30)))
        elif action == "peft":
            metadata["lora_adapter_metadata"] = draw(peft_texts())
        elif action == "mix":
            others = SOUND[draw(st.sampled_from(sorted(SOUND)))].tensors
            tensors += [row for row in others.items() if row[0] not in dict(tensors)]
        elif at is not None:
            _bend(draw, tensors, at, action)
    raw = bytearray(assemble(tensors, metadata))
    return bytes(_scratched(draw, raw)) if draw(st.integers(0, 7)) == 0 else bytes(raw)


def _bend(draw: st.DrawFn, tensors: list[tuple[str, Part]], at: int, action: str) -> None:
    name, part = tensors[at]
    if action == "rename":
        stem, _, end = name.partition(".")
        other, _ = tensors[draw(st.integers(0, len(tensors) - 1))]
        tensors[at] = draw(st.sampled_from([*STRANGE_NAMES, other, f"{stem}x.{end}", f"{name}x", end])), part
    elif action == "drop":
        del tensors[at]
    elif action == "twice":
        tensors.append((name, part))
    elif action == "alpha":
        tensors[at] = name.rpartition(".lora_")[0] + ".alpha", draw(st.sampled_from(ALPHAS))
    else:
        shape = draw(shapes(part.shape)) if action == "shape" else part.shape
        dtype = draw(st.sampled_from([*BITS, "C64", "F4"])) if action == "dtype" else part.dtype
        tensors[at] = name, replace(zeros(dtype if dtype in BITS else "U8", shape), dtype=dtype)


def _scratched(draw: st.DrawFn, raw: bytearray) -> bytearray:
    """Flip, cut or insert bytes, mostly in the header."""
    (length,) = struct.unpack("<Q", raw[:8])
    at = draw(st.one_of(st.integers(0, 7 + length), st.integers(0, len(raw) - 1)))
    action = draw(st.sampled_from(["flip", "cut", "insert", "length"]))
    if action == "flip":
        raw[at] ^= draw(st.integers(1, 255))
    elif action == "cut":
        del raw[at:]
    elif action == "insert":
        raw[at:at] = draw(st.binary(max_size=8))
    else:
        raw[:8] = struct.pack("<Q", max(0, length + draw(st.integers(-9, 9))))
    return raw


# What such files broke when they were first tried, so that it is tried first.

FACTORS = {f"{STEM}.lora_down.weight": zeros("F32", (1, 320)), f"{STEM}.lora_up.weight": zeros("F32", (320, 1))}
HADA = {
    f"{STEM}.hada_w{n}_{end}": zeros("F32", shape) for n in "12" for end, shape in (("a", (320, 1)), ("b", (1, 320)))
}
PEFT = SOUND["peft"].tensors


def told_by_peft(**values: object) -> bytes:
    named = {f"unet.{key}": value for key, value in values.items()}
    return Parts(
        {k: v for k, v in PEFT.items() if "alpha" not in k}, {"lora_adapter_metadata": json.dumps(named)}
    ).bytes()


def bent_lora(part: str, *shape: int) -> bytes:
    return Parts(FACTORS | {f"{STEM}.{part}": zeros("F32", shape)}).bytes()


def bent_loha(**shapes: tuple[int, ...]) -> bytes:
    return Parts(HADA | {f"{STEM}.hada_{part}": zeros("F32", shape) for part, shape in shapes.items()}).bytes()


MARKED = {f"{STEM}.weight": zeros("F32", (320,)), f"{STEM}.on_input": zeros("I64", (0,))}
TORN, IGNORED = "tensors do not fit together", "malformed and was ignored"
FOUND: dict[str, tuple[bytes, str]] = {
    "a magnitude that is one number": (bent_lora("dora_scale"), TORN),
    "an empty magnitude": (bent_lora("dora_scale", 0), TORN),
    "down of three dimensions": (bent_lora("lora_down.weight", 1, 2, 320), TORN),
    "down of one dimension": (bent_lora("lora_down.weight", 320), TORN),
    "a rank of zero": (bent_loha(w1_a=(320, 0), w1_b=(0, 320)), TORN),
    "Hadamard factors of other ranks": (bent_loha(w1_a=(320, 2)), TORN),
    "a core of three dimensions": (bent_loha(t1=(1, 3, 3), t2=(1, 3, 3)), TORN),
    "a mark of (IA)3 that is empty": (Parts(MARKED).bytes(), TORN),
    "a number of 400 digits": (told_by_peft(r=1, lora_alpha=10**400), IGNORED),
    "a number of 400 digits in a pattern": (told_by_peft(r=1, lora_alpha=1, alpha_pattern={"q": 10**400}), IGNORED),
    "an alpha that overflows": (told_by_peft(r=4, lora_alpha=1e308, use_rslora=True), IGNORED),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_once_broke_the_reader_does_no_more(name: str, file: Path) -> None:
    raw, words = FOUND[name]
    file.write_bytes(raw)
    read_all(file)
    report = inspect(file)
    assert words in " ".join([report.refusal, *report.warnings])


STRANGE: dict[str, st.SearchStrategy[bytes]] = {
    "any bytes": st.one_of(st.binary(max_size=400), framed),
    "any header": headers(),
    "a bent file": bent(),
}


def search(kind: str, file: Path, how: settings) -> None:
    """Let hypothesis look for bytes that break the reader, and make them as few as it can."""

    def read(raw: bytes) -> None:
        any_bytes(file, raw)

    how(given(STRANGE[kind])(read))()


@pytest.mark.parametrize("kind", STRANGE)
def test_whatever_a_file_holds_it_is_read_or_refused_in_words(kind: str, file: Path) -> None:
    search(kind, file, settings(QUICK, max_examples=300) if kind == "a bent file" else QUICK)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", STRANGE)
def test_many_more_strange_files(kind: str, file: Path) -> None:
    search(kind, file, LONG)
