"""Read a PyTorch pickle in a process of its own that may do little, and write its tensors as a safetensors file.

PyTorch's weights-only reader makes tensors and plain containers alone and refuses every other object; this process is
the second wall: whatever gets past the first has little memory, little time, and nothing of the parent's environment.
Started by `pickles.py` as `python -m intarsia.pipelines.pickle_child FILE OUT REPORT SECONDS`.
"""

from __future__ import annotations

import json
import pickle
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import Tensor

WRAPPERS = ("state_dict", "model_state_dict", "lora_state_dict", "network")
NUMBERED = ("unet", "text_encoder")  # whose layers lora_diffusion keeps as a list: up, down, up, down, ...
TEXT_WIDTH = 768
DEPTH = 4  # of tables in tables
MAX_ENTRIES = 100_000  # a table may hold itself, a thousand times
GRACE = 5  # seconds between the limit's signal and its end
SPARE = 2**28  # bytes of memory besides what the file itself needs
GROWTH = 4  # times the file: what all tensors together may take, as parts of one storage are written apart
GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
SYSTEM = re.compile(r"os error (\d+)")


class Refused(Exception):  # noqa: N818 - a verdict, passed on to the parent in its report
    """The file is not read: `code` says why to the parent, `detail` what was found."""

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(code, detail)
        self.code, self.detail = code, detail


def main() -> None:
    """Read, write, and leave a report for the parent."""
    source, out, report, seconds = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    confine(source.stat().st_size, seconds)
    try:
        found, dropped = tensors_of(load(source), source.stat().st_size)
        save_file(found, out, {"format": "pt"})
        told: dict[str, Any] = {"dropped": dropped}
    except Refused as refused:
        told = {"code": refused.code, "detail": refused.detail}
    except pickle.UnpicklingError as error:
        name = GLOBAL.search(str(error))
        told = {"code": "objects" if name else "broken", "detail": name[1] if name else ""}
    except (MemoryError, torch.OutOfMemoryError):
        told = {"code": "memory"}
    except SafetensorError as error:
        number = SYSTEM.search(str(error))
        told = {"code": "disk", "detail": number[1] if number else ""}
    except RuntimeError as error:
        told = {"code": "memory" if "allocate" in str(error) or "mmap" in str(error) else "broken"}
    except OSError as error:
        told = {"code": "disk", "detail": str(error.errno)}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, EOFError, AssertionError):
        told = {"code": "broken"}  # what the reader trips over in bytes nobody wrote
    report.write_text(json.dumps(told), "utf-8")


def confine(size: int, seconds: int) -> None:
    """Limit memory (Linux), time of work and length of files; Windows knows none of these, the parent's clock stays.

    Args:
        size: Of the file in bytes.
        seconds: Of work from here on.
    """
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    limits = {
        resource.RLIMIT_CPU: int(used.ru_utime + used.ru_stime) + seconds,
        resource.RLIMIT_FSIZE: GROWTH * size + SPARE,
        resource.RLIMIT_CORE: 0,
    }
    statm = Path("/proc/self/statm")
    if statm.is_file():  # what is taken already, torch above all, does not count
        limits[resource.RLIMIT_DATA] = (
            int(statm.read_text().split()[5]) * resource.getpagesize() + (GROWTH + 2) * size + SPARE
        )
    for kind, limit in limits.items():
        before = resource.getrlimit(kind)[1]
        most = limit + GRACE if kind == resource.RLIMIT_CPU else limit
        hard = most if before == resource.RLIM_INFINITY else min(most, before)
        resource.setrlimit(kind, (min(limit, hard), hard))


def load(path: Path) -> object:
    """Unpickle tensors and plain containers; everything else is refused."""
    import torch

    packed = zipfile.is_zipfile(path)
    if packed:
        try:
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(info.file_size for info in archive.infolist())
        except (zipfile.BadZipFile, NotImplementedError):
            raise Refused("broken") from None
        if unpacked > path.stat().st_size:  # PyTorch never packs
            raise Refused("bomb", f"{unpacked:,}")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=packed)


def tensors_of(found: object, size: int) -> tuple[dict[str, Tensor], list[str]]:
    """Take the tensors out of what was unpickled, each in memory of its own.

    Args:
        found: Anything.
        size: Of the file in bytes.

    Returns:
        Tensors by name, and names of what was left out.
    """
    import torch

    kept: dict[str, Tensor] = {}
    dropped: list[str] = []
    total = 0
    for number, (name, value) in enumerate(flat(found)):
        if number == MAX_ENTRIES:
            raise Refused("crowd", f"{MAX_ENTRIES:,}")
        if isinstance(value, int | float) and name.endswith(".alpha"):
            value = torch.tensor(float(value))
        if not isinstance(value, torch.Tensor) or value.is_sparse or value.is_quantized or value.is_complex():
            dropped.append(name[:200])
            continue
        total += value.numel() * value.element_size()
        if total > GROWTH * size:  # a few bytes may claim to be as large as they like
            raise Refused("bomb", f"{total:,}")
        kept[name] = value.detach().contiguous().clone()
    if not kept:
        raise Refused("empty")
    return kept, dropped


def flat(found: object, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, object]]:
    """Name everything in tables of tables; a list of up, down, up, down, ... becomes numbered layers."""
    if isinstance(found, Mapping) and depth < DEPTH:
        table = cast(Mapping[object, object], found)
        inner = next((key for key in WRAPPERS if not prefix and isinstance(table.get(key), Mapping)), None)
        for key, value in table.items():
            if key == inner:
                yield from flat(value, "", depth + 1)
            else:
                yield from flat(value, f"{prefix}.{key}" if prefix else str(key), depth + 1)
    elif isinstance(found, list | tuple) and depth < DEPTH:
        rows = cast("list[object] | tuple[object, ...]", found)
        named = prefix in NUMBERED or not prefix
        component = prefix or _component(rows)
        for number, value in enumerate(rows):
            if named:
                yield from flat(value, f"{component}:{number // 2}:{('up', 'down')[number % 2]}", depth + 1)
            else:
                yield from flat(value, f"{prefix}.{number}", depth + 1)
    else:
        yield prefix or "(the whole file)", found


def _component(rows: list[object] | tuple[object, ...]) -> str:
    """A list without a name is a text encoder's if every pair goes from 768 to 768, else a UNet's."""
    import torch

    shapes = [tuple(row.shape) for row in rows if isinstance(row, torch.Tensor)]
    text = bool(shapes) and all(len(shape) == 2 and max(shape) == TEXT_WIDTH for shape in shapes)
    return "text_encoder" if text else "unet"


if __name__ == "__main__":
    main()
