"""Looks at everything the studio needs and says what to do where something is missing."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import psutil

from .settings import Home

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "gradio", "pillow")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "firefox", "microsoft-edge")
ENOUGH_MEMORY = 3e9  # bytes: torch, Mini and a training run
ENOUGH_DISK = 2e9
PROBE_TIME = 120  # seconds

PROBE = """
import json, sys, time
from intarsia.pipelines.errors import IntarsiaError
from intarsia.pipelines.models import Resident, devices
found = {"devices": devices()}
start = time.monotonic()
try:
    model = Resident().get("mini")
    found["mini"] = f"loads in {time.monotonic() - start:.1f} s on {model.device}"
except IntarsiaError as error:
    found["problem"], found["hint"] = error.message, error.hint
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Args:
        name: What.
        state: "ok", "warning" (works with limits) or "bad".
        text: What was found.
        hint: What to do, "" when nothing.
    """

    name: str
    state: Literal["ok", "warning", "bad"]
    text: str
    hint: str = ""


def examine(home: Home) -> list[Check]:
    """Make every check; takes some seconds, for the model is loaded once in a process of its own."""
    return [_python(), *_versions(), *_engine(), _memory(), _disk(home), _writable(home), _browser()]


def _python() -> Check:
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return Check("python", "ok", text)


def _versions() -> list[Check]:
    checks: list[Check] = []
    for name in PACKAGES:
        try:
            checks.append(Check(name, "ok", version(name)))
        except PackageNotFoundError:
            checks.append(Check(name, "bad", "not installed", "Install Intarsia again: make studio, or pip install ."))
    return checks


def _engine() -> list[Check]:
    """Load Mini in a process of its own: this one stays small, and a crash is a finding."""
    fix = "Install Intarsia again: make studio, or pip install ."
    try:
        command = [sys.executable, "-P", "-c", PROBE]
        result = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIME, check=False)
    except subprocess.TimeoutExpired:
        return [Check("mini", "bad", f"did not load within {PROBE_TIME} s", "Close other programs and try again.")]
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        return [Check("mini", "bad", f"the engine does not start: {last}", fix)]
    found: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    devices: list[str] = found["devices"]
    only_cpu = all(name == "cpu" for name in devices)
    hint = "Mini is fast enough on a CPU; larger models want a GPU." if only_cpu else ""
    mini = (
        Check("mini", "ok", found["mini"]) if "mini" in found else Check("mini", "bad", found["problem"], found["hint"])
    )
    return [Check("devices", "warning" if only_cpu else "ok", ", ".join(devices), hint), mini]


def _memory() -> Check:
    memory = psutil.virtual_memory()
    text = f"{memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f} GB"
    if memory.available < ENOUGH_MEMORY:
        return Check("memory", "warning", text, "Close other programs: about 3 GB are needed.")
    return Check("memory", "ok", text)


def _disk(home: Home) -> Check:
    place = home.root
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    text = f"{free / 1e9:.1f} GB free at {place}"
    if free < ENOUGH_DISK:
        return Check("disk", "warning", text, "Make room, or set INTARSIA_HOME to a folder on a larger disk.")
    return Check("disk", "ok", text)


def _writable(home: Home) -> Check:
    try:
        home.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home.root) as file:
            file.write(b"x")
    except OSError as error:
        hint = "Set INTARSIA_HOME to a folder you may write to."
        return Check("home", "bad", f"{home.root} cannot be written: {error.strerror}", hint)
    return Check("home", "ok", str(home.root))


def _browser() -> Check:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None and platform.system() in ("Darwin", "Windows"):
        return Check("browser", "ok", "the system's own")
    if found is None:
        return Check(
            "browser", "warning", "none found", "Open the printed address from another computer or install one."
        )
    return Check("browser", "ok", found)
