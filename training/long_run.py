"""Mini's long run on an accelerator, in pieces: goes on from the newest weights, writes back weights, card and sheet.

Without a checkpoint in `--work` it starts from the weights in `--out`, with their tokenizer and autoencoder. Each call
stops in time, and the next goes on.

Run: python -m intarsia.training.long_run --minutes 9
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from . import base, corpus, sheet

LEFT = 1.0  # minutes kept for writing weights and sheet
SHEET = ("a red apple", "a dog", "a rocket", "a house", "a pizza", "a cat left of a pizza", "a star above a fish")


def prepare(work: Path, mini: Path) -> None:
    """Give a new run the tokenizer and autoencoder of the weights it starts from, so that they keep their meaning."""
    if (work / "state.safetensors").exists() or not (mini / "unet").exists():
        return
    for name, source in (("tokenizer", "tokenizer"), ("encoder", "vae"), ("vae", "vae")):
        shutil.rmtree(work / name, ignore_errors=True)
        shutil.copytree(mini / source, work / name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train Mini for some minutes, and leave it better.")
    parser.add_argument("--data", type=Path, default=Path("runs/corpus"))
    parser.add_argument("--work", type=Path, default=Path("runs/mini"))
    parser.add_argument("--out", type=Path, default=Path("assets/mini"))
    parser.add_argument("--sheet", type=Path, default=Path("assets/sheets/mini_long_run.png"))
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call, all told")
    given, more = parser.parse_known_args()
    if not (given.data / "captions.jsonl").exists():
        for _ in corpus.build(given.data):
            pass
    given.work.mkdir(parents=True, exist_ok=True)
    prepare(given.work, given.out)
    start = ["--start-from", str(given.out)] if (given.out / "unet").exists() else []
    where = ["--data", str(given.data), "--work", str(given.work), "--out", str(given.out)]
    sys.argv = ["base", *where, *start, "--minutes", str(given.minutes - LEFT), *more]
    base.main()
    sys.argv = ["sheet", "--model", str(given.out), "--out", str(given.sheet), "--contents", *SHEET]
    sheet.main()


if __name__ == "__main__":
    main()
