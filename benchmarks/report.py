"""One result file per benchmark: rows with their bound, the machine, the versions. `benchmarks.readme` shows them."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import psutil

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "gradio", "intarsia")


@dataclass(frozen=True)
class Row:
    """One measured number, with what plain diffusers needs for the same work where that can be said.

    Attributes:
        what: The work, in words.
        ours: What Intarsia took or reached, in `unit`.
        unit: "s", "steps/s" or "MB".
        bound: The most (or least) that is allowed, in `unit`, or as a multiple of `plain` where `of` is "ratio".
        at_least: True where more is better.
        plain: The same number for plain diffusers, or None where there is nothing to compare with.
        of: What the bound is about.
    """

    what: str
    ours: float
    unit: Literal["s", "steps/s", "MB"]
    bound: float
    at_least: bool = False
    plain: float | None = None
    of: Literal["ours", "ratio"] = "ours"

    @property
    def ratio(self) -> float | None:
        """Ours divided by plain diffusers."""
        return None if self.plain is None else self.ours / self.plain

    @property
    def met(self) -> bool:
        value = self.ours if self.of == "ours" else self.ratio
        if value is None:
            raise ValueError(f"{self.what}: a bound on the ratio needs the plain number")
        return value >= self.bound if self.at_least else value <= self.bound

    def markdown(self, command: str) -> str:
        """Write the row as a line of the README's table."""

        def shown(value: float | None, unit: str) -> str:
            return "" if value is None else f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"

        unit = self.unit if self.of == "ours" else "x"
        asked = f"{'at least' if self.at_least else 'at most'} {self.bound:g} {unit}"
        cells = (self.what, shown(self.ours, self.unit), shown(self.plain, self.unit), shown(self.ratio, "x"))
        return f"| {' | '.join(cells)} | {asked}{'' if self.met else ' (missed)'} | `{command}` |"


def machine() -> dict[str, Any]:
    """Describe what the numbers were taken on: processor, cores this process may use, memory, versions."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def processor() -> str:
    """Name the processor as the system calls it."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def save(name: str, rows: Sequence[Row], details: dict[str, Any]) -> None:
    """Write `results/NAME.json` and print its rows.

    Args:
        name: Name of the benchmark's module.
        rows: What it measured.
        details: Everything else worth keeping: settings, every single timing.
    """
    RESULTS.mkdir(exist_ok=True)
    content = {"name": name, "rows": [asdict(row) for row in rows], "details": details, "machine": machine()}
    part = RESULTS / f"{name}.json.part"
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(RESULTS / f"{name}.json")
    for row in rows:
        print(row.markdown(f"python -m benchmarks.{name}"))


def load() -> list[tuple[str, list[Row], dict[str, Any]]]:
    """Read every result file: name, rows, machine."""
    found: list[tuple[str, list[Row], dict[str, Any]]] = []
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        found.append((content["name"], [Row(**row) for row in content["rows"]], content["machine"]))
    return found


def say(text: str) -> None:
    """Tell on the error stream what is being measured, so that the output stays a table."""
    print(text, file=sys.stderr, flush=True)
