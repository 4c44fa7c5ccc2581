"""From `intarsia ui` to a page that answers, to the first picture in it, and the memory the idle page process holds.

The real command, a home that is empty, a real chromium (started before the clock, as a person's browser is).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psutil
from playwright.sync_api import Page, sync_playwright

from .report import Row, save, say

PATIENCE = 120  # seconds until a start counts as failed
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def blank_page() -> Generator[Page]:
    """An empty page of a headless browser."""
    with sync_playwright() as playwright:
        found = next((path for name in CHROMIUMS if (path := shutil.which(name))), None)
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield browser.new_page()
        finally:
            browser.close()


@contextmanager
def server(home: Path, port: int) -> Generator[subprocess.Popen[bytes]]:
    """Run `intarsia ui`, and end it with all its children."""
    command = [sys.executable, "-P", "-m", "intarsia.app", "ui", "--no-browser", "--port", str(port)]
    with (home / "server.log").open("wb") as log:
        environment = {**os.environ, "INTARSIA_HOME": str(home)}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            yield process
        finally:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            process.terminate()
            _, alive = psutil.wait_procs(family, timeout=20)
            for one in alive:
                one.kill()


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    """Ask for the page until it comes."""
    limit = time.perf_counter() + PATIENCE
    while time.perf_counter() < limit:
        if process.poll() is not None:
            raise SystemExit(f"intarsia ui ended with code {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.02)
    raise SystemExit("intarsia ui did not answer")


def first_picture(page: Page, url: str) -> None:
    """Open the page, ask for a picture, wait until the finished one is shown."""
    page.set_default_timeout(PATIENCE * 1000)
    page.goto(url)
    page.locator("#generate-prompt textarea").fill("a red apple, twemoji style")
    page.locator("button#generate").click()
    picture = page.locator("#stage img.result")
    picture.wait_for(state="visible")
    page.wait_for_function("() => document.querySelector('#stage img.result')?.naturalWidth > 0")


def once(page: Page, port: int) -> dict[str, float]:
    """Start, measure, end; times in seconds, memory in bytes."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        began = time.perf_counter()
        with server(Path(folder), port) as process:
            url = f"http://127.0.0.1:{port}/"
            wait_until_ready(url, process)
            ready = time.perf_counter()
            first_picture(page, url)
            shown = time.perf_counter()
            page.wait_for_timeout(3000)  # idle again, with one page watching
            memory = psutil.Process(process.pid).memory_info().rss
            page.goto("about:blank")
    return {"ready": ready - began, "picture": shown - began, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=7955)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    runs: list[dict[str, float]] = []
    with blank_page() as page:
        for turn in range(arguments.repeats):
            runs.append(once(page, arguments.port + turn))
            say(", ".join(f"{name} {value:.3g}" for name, value in runs[-1].items()))
    ready, picture, memory = (statistics.median(run[name] for run in runs) for name in ("ready", "picture", "memory"))
    save(
        "startup",
        [
            Row("From `intarsia ui` to a page that answers", ready, "s", 8.0),
            Row("From `intarsia ui` to the first picture in the page", picture, "s", 20.0),
            Row("Resident memory of the page process after it", memory / 1e6, "MB", 500.0),
        ],
        {"runs": runs},
    )


if __name__ == "__main__":
    main()
