"""The real server in a process of its own, and one page in a real browser. A missing browser is a failure."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from urllib.parse import urlparse

import pytest
from intarsia.app.settings import Home
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

sys.path.insert(0, str(Path(__file__).parent))

from browser_steps import NewPage, Server

START_LIMIT = 60.0  # seconds; the page itself is ready in under 8, a busy machine may need more
REPOSITORY = Path(__file__).parents[2]
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
expect.set_options(timeout=15_000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("browser")
            item.add_marker(pytest.mark.timeout(300))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Server]:
    """Start `intarsia ui` with an empty home; it lies in a hidden folder, as the platform's data folder does."""
    home = Home(tmp_path_factory.mktemp("studio") / ".local" / "intarsia")
    log = tmp_path_factory.mktemp("log") / "server.log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # One thread for the worker: browser and page want the other core, and threads that wait for each other crawl.
    environment = {**os.environ, "INTARSIA_HOME": str(home.root), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "intarsia.app", "ui", "--port", str(port), "--no-browser"]
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=home.root.parents[1], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        while not (found := re.search(r"http://\S+", log.read_text())):
            if process.poll() is not None or time.monotonic() - began > START_LIMIT:
                pytest.fail(f"the server did not start:\n{log.read_text()}")
            time.sleep(0.1)
        yield Server(found.group().rstrip("/"), home, time.monotonic() - began)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def chromium() -> Generator[Browser]:
    """Debian's chromium, driven by Playwright's Python package alone."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.fail("The browser tests need chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, headless=True, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def new_page(chromium: Browser, server: Server) -> Generator[NewPage]:
    """Give `new_page(width=1440, height=900, dark=False)`: a fresh browser profile with the page open.

    At the end the test fails if any of its pages had a script error, or asked any other host for anything.
    """
    troubles: list[str] = []
    contexts = []

    def local_only(route: Route) -> None:
        if urlparse(route.request.url).hostname in ("127.0.0.1", None):
            route.continue_()
        else:
            troubles.append(f"asked for {route.request.url}")
            route.abort()

    def make(width: int = 1440, height: int = 900, dark: bool = False) -> Page:
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        contexts.append(context)
        context.route("**/*", local_only)
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(f"script error: {error}"))
        page.goto(server.address)
        expect(page.locator("#stage .stage")).to_be_visible(timeout=30_000)
        return page

    yield make
    for context in contexts:
        context.close()
    assert not troubles


@pytest.fixture
def page(new_page: NewPage) -> Page:
    """One page at 1440 pixels."""
    return new_page()


@pytest.fixture(scope="session")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go: into the repository only when INTARSIA_SCREENSHOTS=1."""
    if os.environ.get("INTARSIA_SCREENSHOTS") == "1":
        folder = REPOSITORY / "assets" / "screenshots"
        folder.mkdir(exist_ok=True)
        return folder
    return tmp_path_factory.mktemp("screenshots")
