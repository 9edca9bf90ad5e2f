"""Parent watchdog: a stage exits when the entry point that started it is gone, even after `kill -9`.

It is a thread, and not a signal on the parent's death, because there may be a shell between a stage and its entry point,
and because a thread works on every system.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from pathlib import Path

import psutil

FLOW_PID = "STACKLM_FLOW_PID"
"""Environment variable with the process id of the flow to which a stage belongs."""
REPRO = "stacklm.pipeline.repro"
"""The module that a flow runs for DVC's command line."""


def alive(process: psutil.Process) -> bool:
    """Whether this process (not a later one with the same id) is running; a zombie is not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def entry_point() -> psutil.Process | None:
    """The `dvc` process that started this one, or None if it was started by hand."""
    for parent in psutil.Process().parents():
        try:
            words = parent.cmdline()
        except psutil.Error:
            continue
        if any(word == REPRO or Path(word).stem == "dvc" for word in words[:3]):
            return parent
    return None


def exit_with_entry_point(interval: float = 0.3) -> None:
    """Start a thread that ends this process as soon as its entry point or flow is gone.

    `interval` is in seconds. The process exits immediately, since a stage's files are safe at any time.
    """
    watched = [found] if (found := entry_point()) else []
    if FLOW_PID in os.environ:
        try:
            watched.append(psutil.Process(int(os.environ[FLOW_PID])))
        except psutil.NoSuchProcess:
            raise SystemExit("stacklm: the flow that started this stage is gone") from None
    if "DVC_STAGE" in os.environ and not watched:
        raise SystemExit("stacklm: the dvc process that started this stage is gone")
    if watched:
        exit_with(watched, interval)


def exit_with(watched: list[psutil.Process], interval: float = 0.3) -> None:
    """Start a thread that ends this process as soon as one of the `watched` processes is gone."""

    def watch() -> None:
        while all(alive(process) for process in watched):
            time.sleep(interval)
        with contextlib.suppress(OSError, ValueError):  # the reader may be gone too
            print("stacklm: the process that started this one is gone; stopping", file=sys.stderr, flush=True)
        os._exit(143)

    threading.Thread(target=watch, daemon=True, name="watchdog").start()
