"""Serving the page: where it listens, what it may show of the disk, when it ends."""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from importlib.resources import as_file, files

import gradio as gr

from ...pipelines.errors import InputError
from ..studio import Studio
from .page import build
from .theme import head, styles, theme

FIRST_PORT = 7860
PORTS_TRIED = 100
UPLOAD_LIMIT = "2gb"

log = logging.getLogger(__name__)


def launch(
    studio: Studio,
    host: str = "127.0.0.1",
    port: int | None = None,
    open_browser: bool = True,
    announce: Callable[[str], object] = log.info,
) -> None:
    """Serve the page until the process is asked to end.

    Args:
        studio: Started already.
        host: Address to listen on; anything but the loopback address shows the studio to the network.
        port: Port to listen on; None takes 7860 or the next free one.
        open_browser: Open the page in the person's browser, where there is a display.
        announce: Called with the page's address once it answers.

    Raises:
        InputError: The port is taken.
    """
    page, address = serve(studio, host, port, open_browser)
    announce(address)
    try:
        threading.Event().wait()  # until Ctrl-C or a signal raises here
    finally:
        page.close(verbose=False)


def serve(
    studio: Studio, host: str = "127.0.0.1", port: int | None = None, open_browser: bool = False
) -> tuple[gr.Blocks, str]:
    """Start the server without blocking; same arguments and errors as `launch`.

    Returns:
        The running page, to be closed, and its address.
    """
    home = studio.home
    cache = home.root / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(cache)  # uploads beside everything else, not in a shared folder
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    chosen = free_port(host, port)
    with as_file(files("intarsia.assets") / "favicon.png") as favicon:
        page = build(studio).queue(max_size=64, default_concurrency_limit=8)
        _, address, _ = page.launch(
            server_name=host,
            server_port=chosen,
            inbrowser=open_browser and has_display(),
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            allowed_paths=[str(home.outputs), str(home.root / "jobs"), str(home.thumbnails)],
            max_file_size=UPLOAD_LIMIT,
            ssr_mode=False,
            strict_cors=True,
            enable_monitoring=False,
            run_history=False,
            show_error=False,
            footer_links=[],
            pwa=False,
            mcp_server=False,
            favicon_path=str(favicon),
            theme=theme(),
            css=styles(),
            head=head(),
        )
    return page, address


def free_port(host: str, port: int | None) -> int:
    """Find a port to listen on: the given one, or the first free from 7860.

    Raises:
        InputError: The given port, or every one tried, is taken.
    """
    for candidate in range(FIRST_PORT, FIRST_PORT + PORTS_TRIED) if port is None else (port,):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind((host, candidate))
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise InputError(
                        f"The page cannot listen on {host}: {error.strerror}.",
                        "Leave --host out, or give an address of this computer.",
                    ) from None
                continue
        return candidate
    if port is None:
        last = FIRST_PORT + PORTS_TRIED - 1
        raise InputError(f"Ports {FIRST_PORT} to {last} are all taken.", "Give a free one with --port.")
    raise InputError(f"Port {port} is taken or not allowed.", "Give another one with --port, or leave it out.")


def has_display() -> bool:
    """Say whether a browser window could open here."""
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
