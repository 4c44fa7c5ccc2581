"""Fixtures for every test: tiny models written once per run, and a studio home that is thrown away."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the hub must fail here as on a machine without network
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
sys.path.insert(0, str(Path(__file__).parent))

from intarsia.app.settings import Home

Tiny = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Give `tiny("sdxl")`: the folder of a tiny random pipeline of the family, written once per run.

    Also `tiny("sdxl", seed=1)`, `tiny("sdxl", variant="vpred")`; see `fakes.tiny_pipeline`. Do not write into it.
    """
    made: dict[tuple[str, int, str], Path] = {}

    def make(family: str, seed: int = 0, variant: str = "") -> Path:
        from fakes import tiny_pipeline  # torch only when a test asks for a model

        key = (family, seed, variant)
        if key not in made:
            made[key] = tiny_pipeline(family, tmp_path_factory.mktemp(f"{family}{variant}"), seed, variant)
        return made[key]

    return make


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """An empty studio home; `Home.default()` finds it too."""
    monkeypatch.setenv("INTARSIA_HOME", str(tmp_path / "home"))
    return Home.default()
