"""What a person does on the page, in words the tests use."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from intarsia.app.jobs import JobStore
from intarsia.app.settings import Home
from playwright.sync_api import Page, expect

NewPage = Callable[..., Page]


@dataclass(frozen=True)
class Server:
    """A running studio: its address, its home, and how long it took to answer."""

    address: str
    home: Home
    seconds: float

    @property
    def store(self) -> JobStore:
        return JobStore(self.home)


def open_tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def drop(page: Page, *files: Path) -> None:
    """Drop files on the page, as from a file manager."""
    data = [{"name": file.name, "body": base64.b64encode(file.read_bytes()).decode()} for file in files]
    page.evaluate(
        """(files) => {
            const data = new DataTransfer();
            for (const file of files) {
                const bytes = Uint8Array.from(atob(file.body), (letter) => letter.charCodeAt(0));
                data.items.add(new File([bytes], file.name));
            }
            for (const type of ["dragenter", "dragover", "drop"])
                document.body.dispatchEvent(
                    new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true }));
        }""",
        data,
    )


def setting(page: Page, name: str, value: object, form: str = "generate") -> None:
    """Type a value into the control of an option."""
    field = page.locator(f"#{form}-{name} :is(textarea, input:not([type=range]))").first
    field.fill(str(value))
    field.blur()


def generate(page: Page, prompt: str, **settings: object) -> None:
    """Fill in the form and press Generate."""
    open_tab(page, "Generate")
    setting(page, "prompt", prompt)
    for name, value in settings.items():
        setting(page, name, value)
    page.locator("#generate").click()


def toast(page: Page, text: str) -> None:
    """Wait for a toast with this text."""
    expect(page.locator(".toast-body", has_text=text).first).to_be_visible()


def close_toasts(page: Page) -> None:
    """Close every toast, as before a picture is taken."""
    while page.get_by_test_id("toast-close").count():
        page.get_by_test_id("toast-close").first.click()
        page.wait_for_timeout(300)
