"""Options every bench has; a bench adds its own by inheriting. Read by the command line, so nothing heavy here."""

from __future__ import annotations

from ...pipelines.options import Options, option
from ...pipelines.requests import MAX_SEED


class EvaluationOptions(Options):
    """What is measured, how much of it, and with which seed."""

    model: str = option("mini", label="Model", help="mini, a folder, a .safetensors file or a hub id.")
    quick: bool = option(False, label="Quick", help="A small sample: minutes on two cores, with wider errors.")
    seed: int = option(0, label="Seed", help="Draws the sample and starts every picture.", low=0, high=MAX_SEED)
    corpus: str = option(
        "",
        label="Corpus",
        help="Folder of real pictures. Empty: the studio's own if it was built, else the small one that comes along.",
    )
