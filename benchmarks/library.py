"""The library at its full size: 1,000 files imported, 10,000 listed in place, found, scanned; memory of large files.

Files carry real names: kohya's for SD 1.5 (264 layers) where they are imported, one layer each where ten thousand lie
in a folder. Memory is the peak that Python and numpy hold at once while a file is read.

Run: python -m benchmarks.library
"""

from __future__ import annotations

import argparse
import json
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from intarsia.app.settings import Home
from intarsia.app.shelf import Change, Query, Shelf
from intarsia.pipelines.architectures import reference, sgm_spelling

from .report import Row, save, say

TAGS = [f"{kind}-{number}" for kind in ("style", "subject", "light", "paper") for number in range(10)]
QUERIES = {
    "newest": Query(),
    "one word": Query("ink"),
    "three words": Query("a ink 7"),
    "a word of one letter, by name": Query("n", sort="name"),
    "family and tag": Query(family="sd15", tag="style-3", sort="size"),
    "favourites": Query(favourite=True),
    "the last page by name": Query(sort="name", offset=9_900),
    "nothing": Query("zebra"),
}
WORDS = ("ink", "oil", "amber", "paper", "neon")
PROBE = """
import sys, time, tracemalloc
from pathlib import Path
from intarsia.pipelines.errors import AdapterError
from intarsia.pipelines.identify import inspect

def look():
    try:
        inspect(Path(sys.argv[2]))
    except AdapterError as error:
        return error.message
    return ""

inspect(Path(sys.argv[1]))
began = time.perf_counter()
look()
print(time.perf_counter() - began)
tracemalloc.start()
said = look()
print(tracemalloc.get_traced_memory()[1], said, sep="\\n")
"""


def layers(family: str, kohya: bool) -> dict[str, tuple[int, int]]:
    """Names, and widths out and in, of the linear layers that trainers adapt."""
    shapes = {path: shape for path, shape in reference(family).shapes.items() if len(shape) > 1}
    inner = [path.removeprefix("unet.") for path in shapes if path.startswith("unet.")]
    found: dict[str, tuple[int, int]] = {}
    for path, shape in shapes.items():
        component, _, rest = path.partition(".")
        if component == "unet" and ".attentions." not in rest:
            continue
        if component.startswith("text_encoder") and ".layers." not in rest:
            continue
        prefix = {"unet": "lora_unet_", "text_encoder_2": "lora_te2_"}.get(component)
        prefix = prefix or ("lora_te1_" if family == "sdxl" else "lora_te_")
        spelling = sgm_spelling(rest, 2, inner) if family == "sdxl" and component == "unet" and kohya else None
        found[prefix + (spelling or rest.replace(".", "_"))] = (shape[0], shape[1])
    return found


def adapter(shapes: Mapping[str, tuple[int, int]], rank: int) -> bytearray:
    """Make a LoRA file in F16; all values are 0.5."""
    table: dict[str, Any] = {}
    at = 0
    for name, (out, inside) in shapes.items():
        for part, shape in (("lora_down.weight", [rank, inside]), ("lora_up.weight", [out, rank]), ("alpha", [])):
            length = 2 * (shape[0] * shape[1] if shape else 1)
            table[f"{name}.{part}"] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at + length]}
            at += length
    raw = json.dumps(table).encode()
    return bytearray(struct.pack("<Q", len(raw)) + raw + struct.pack("<e", 0.5) * (at // 2))


def copies(content: bytearray, number: int, folder: Path) -> Iterator[Path]:
    """Write copies that differ in their last value but one, in folders of a hundred."""
    for index in range(number):
        path = folder / f"{index // 100:03}" / f"{WORDS[index % 5]}-a{index // 5 % 7}-n{index}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        content[-8:-4] = struct.pack("<ee", 0.25 + index % 97 / 1024, 0.25 + index // 97 / 1024)
        path.write_bytes(content)
        yield path


@dataclass(frozen=True)
class Time:
    """Seconds by the clock, and of a processor: others may be at work on the machine."""

    clock: float
    processor: float


def timed(work: Callable[[], object]) -> Time:
    began, before = time.perf_counter(), time.process_time()
    work()
    return Time(time.perf_counter() - began, time.process_time() - before)


def importing(content: bytearray, number: int) -> dict[str, Any]:
    """Import a folder of files into an empty library; `bytes` are those of one file."""
    with tempfile.TemporaryDirectory() as place:
        files = list(copies(content, number, Path(place, "files")))
        shelf = Shelf(Home(Path(place, "home")))
        taken = timed(lambda: list(shelf.add_all([Path(place, "files")])))
        if len(shelf.entries()) != len(files):
            raise SystemExit("not every file was imported")
    return {"files": number, "bytes": len(content), "taken": asdict(taken)}


def listing(number: int, repeats: int) -> dict[str, Any]:
    """List small files in place, find them and scan again."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "files")
        one = dict(list(layers("sd15", kohya=True).items())[:1])
        list(copies(adapter(one, 1), number, folder))
        shelf = Shelf(Home(Path(place, "home")))
        shelf.add_folder(folder)
        first = timed(shelf.scan)
        names = [entry.name for entry in shelf.entries()]
        if len(names) != number:
            raise SystemExit(f"{len(names)} of {number} files were listed")
        say(f"listed {number} in {first.clock:.1f} s")
        for index, name in enumerate(names[::4]):
            tags = (TAGS[index % len(TAGS)], TAGS[index * 7 % len(TAGS)])
            shelf.edit(name, Change(tag=tags, notes="soft light", favourite=index % 10 == 0))
        times = {
            what: [timed(lambda q=query: shelf.page(q)) for _ in range(repeats)] for what, query in QUERIES.items()
        }
        return {
            "files": number,
            "first": asdict(first),
            "scan": [asdict(timed(shelf.scan)) for _ in range(5)],
            "entries": asdict(timed(shelf.entries)),
            "find": asdict(timed(lambda: shelf.find(names[-1]))),
            "page": {what: [asdict(one) for one in several] for what, several in times.items()},
            "found": {what: shelf.page(query).total for what, query in QUERIES.items()},
            "database_bytes": Path(place, "home", "studio.db").stat().st_size,
        }


def probe(small: Path, path: Path) -> dict[str, Any]:
    """Inspect a file in a process of its own."""
    command = [sys.executable, "-P", "-c", PROBE, str(small), str(path)]
    seconds, peak, said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[:3]
    return {"bytes": path.stat().st_size, "seconds": float(seconds), "peak": int(peak), "said": said}


def memory() -> dict[str, Any]:
    """Inspect a large file, a header of 100 MB, and one of the largest size that is read, full of empty tensors."""
    shapes = layers("sd15", kohya=True)
    with tempfile.TemporaryDirectory() as place:
        small, large, long, full = (Path(place, f"{name}.safetensors") for name in ("small", "large", "long", "full"))
        small.write_bytes(adapter(shapes, 1))
        large.write_bytes(adapter(shapes, round(200e6 / len(adapter(shapes, 8)) * 8)))
        long.write_bytes(struct.pack("<Q", 10**8) + b'{"' + b"x" * (10**8 - 2))
        empty = '"dtype":"F16","shape":[0],"data_offsets":[0,0]'
        raw = ("{" + ",".join(f'"{index}":{{{empty}}}' for index in range(300_000)))[: 16 * 2**20]
        raw = raw[: raw.rindex("}") + 1] + "}"
        full.write_bytes(struct.pack("<Q", len(raw)) + raw.encode())
        return {path.stem: probe(small, path) for path in (large, long, full)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--imports", type=int, default=1000)
    parser.add_argument("--entries", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=20)
    given = parser.parse_args()
    many = importing(adapter(layers("sd15", kohya=True), 4), given.imports)
    say(f"imported {many}")
    wide = importing(adapter(layers("sdxl", kohya=True), 1), given.imports // 10)
    say(f"imported {wide}")
    listed = listing(given.entries, given.repeats)
    pages = [one["clock"] for several in listed["page"].values() for one in several]
    held = memory()
    large, long = held["large"], held["long"]
    rows = [
        Row(f"{given.imports:,} files of {many['bytes'] / 1e6:.1f} MB imported", many["taken"]["clock"], "s", 60.0),
        Row(f"A page of {given.entries:,}, median", statistics.median(pages), "s", 0.2),
        Row(f"A page of {given.entries:,}, slowest", max(pages), "s", 0.2),
        Row(f"A scan of {given.entries:,} unchanged files", max(one["clock"] for one in listed["scan"]), "s", 2.0),
        Row("Memory to inspect a file of 200 MB", large["peak"] / 1e6, "MB", 1.2 * large["bytes"] / 1e6),
        Row("A header of 100 MB refused", long["seconds"], "s", 0.1),
        Row("Memory to refuse a header of 100 MB", long["peak"] / 1e6, "MB", 20.0),
    ]
    details = {"import": many, "import_sdxl": wide, "listing": listed, "memory": held}
    save("library", rows, details)


if __name__ == "__main__":
    main()
