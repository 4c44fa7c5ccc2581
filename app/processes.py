"""Who owns a job: a process, named so that any process on any machine can tell whether it still lives."""

from __future__ import annotations

import os
import platform
from functools import cache

import psutil


@cache
def this_process() -> str:
    """Name this process: host, process id and start time (ids are reused, the pair is not)."""
    return _name(psutil.Process(os.getpid()))


def is_alive(owner: str) -> bool | None:
    """Say whether the process called `owner` lives.

    Returns:
        None when it runs on another host, where only its heartbeat can tell.
    """
    host, pid, _ = owner.rsplit("|", 2)
    if host != platform.node():
        return None
    try:
        process = psutil.Process(int(pid))
        return _name(process) == owner and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def pid_of(owner: str) -> int:
    return int(owner.rsplit("|", 2)[1])


def _name(process: psutil.Process) -> str:
    return f"{platform.node()}|{process.pid}|{process.create_time():.2f}"
