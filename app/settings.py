"""Where things are kept. Everything the studio writes lies under one folder, its home."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_data_path


@dataclass(frozen=True)
class Home:
    """The studio's folder: `INTARSIA_HOME`, or the platform's data folder."""

    root: Path

    @classmethod
    def default(cls) -> Home:
        given = os.environ.get("INTARSIA_HOME")
        return cls(Path(given).expanduser().resolve() if given else user_data_path("intarsia", appauthor=False))

    @property
    def database(self) -> Path:
        return self.root / "studio.db"

    @property
    def outputs(self) -> Path:
        """Finished pictures."""
        return self._made("outputs")

    @property
    def adapters(self) -> Path:
        """The library's files."""
        return self._made("adapters")

    @property
    def thumbnails(self) -> Path:
        """Small pictures of the library, named by their adapter's hash."""
        return self._made("thumbnails")

    @property
    def uploads(self) -> Path:
        """Pictures people gave for training, copied so that a run survives their removal."""
        return self._made("uploads")

    @property
    def evaluations(self) -> Path:
        """Records and reports of the benches."""
        return self._made("evaluations")

    @property
    def corpus(self) -> Path:
        """The captioned pictures that `intarsia corpus build` makes; there once it was run."""
        return self.root / "corpus"

    def job(self, job_id: str) -> Path:
        """Folder of one job: previews, samples, checkpoint, log."""
        return self._made(f"jobs/{job_id}")

    def _made(self, name: str) -> Path:
        path = self.root / name
        path.mkdir(parents=True, exist_ok=True)
        return path
