"""What a stage prints, on the terminal and in its task's log, and how far its training is, as an artifact."""

from __future__ import annotations

import contextlib
import contextvars
import os
import re
import threading
from collections.abc import Iterator
from typing import Any

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger

from stacklm.config.params import load
from stacklm.files import read_jsonl
from stacklm.pipeline.project import Project
from stacklm.pipeline.stages import stage

BAR = re.compile(r"\d+%\|.*\||\d+[a-zA-Z]*/s\]|, .*(it|s/\w+|\w+/s)\]?$")
"""A line of tqdm: shown on the terminal, but no news for a log."""
INTERVAL = 5.0
"""Seconds between two looks at the steps of a training."""


def forward(line: str) -> None:
    """Show a line of a stage once: in the task's log, and on the terminal unless that shows Prefect's log anyway."""
    if os.environ.get("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL") == "CRITICAL":
        print(line, flush=True)
    if line.strip() and not BAR.search(line):
        get_run_logger().info(line)


@contextlib.contextmanager
def training_shown(project: Project, address: str) -> Iterator[None]:
    """Show the steps of a training as a progress artifact of its task while the body runs."""
    if not stage(address.partition("@")[0]).resumable:
        yield
        return
    ended = threading.Event()
    context = contextvars.copy_context()  # the artifact belongs to the task
    watcher = threading.Thread(target=context.run, args=(_watch, project, address, ended), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join(timeout=INTERVAL)


def _watch(project: Project, address: str, ended: threading.Event) -> None:
    steps, before = load(project.params_file).train.max_steps, _steps(project, address)
    artifact: Any = None
    while True:
        over = ended.wait(INTERVAL)
        done = _steps(project, address)
        if done is not None and done != before:
            words = f"{address}: step {done:,} of {steps:,}"
            if artifact is None:
                artifact = create_progress_artifact(100 * done / steps, re.sub(r"[^a-z0-9]+", "-", address.lower()), words)
            else:
                update_progress_artifact(artifact, 100 * done / steps, words)
            before = done
        if over:
            return


def _steps(project: Project, address: str) -> int | None:
    """The last step of the newest training in the work folders; None before the first."""
    found = (project.state / "work").glob(f"{address}-*/metrics.jsonl")
    files = [path for path in found if path.parent.name.rpartition("-")[0] == address]
    files.sort(key=lambda path: path.stat().st_mtime)
    rows = read_jsonl(files[-1]) if files else []
    return rows[-1]["step"] if rows else None
