"""Trials in processes of their own: one that crashes takes no other with it, and each starts at once from a process that has
torch imported already, where the system can fork."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from stacklm.files import read_json, write_json
from stacklm.lab.experiment import Trial
from stacklm.lab.trial import RECORD, run_trial
from stacklm.pipeline.watchdog import exit_with
from stacklm.train import NonFiniteError
from stacklm.train.distributed import start_method

DIVERGED = 3
"""Exit code of a trial whose loss became NaN or Inf: a result, which another try would not change."""
LAST_LINES = 5

_running: set[BaseProcess] = set()


def run_apart(trial: Trial, shards: Path, work: Path) -> dict[str, Any]:
    """The record of a trial, which is trained in a child process; what it prints goes to `log.txt` in its folder.

    A trial that diverged has a record as well, with `failed`. Raises `RuntimeError` with the end of its log where the
    child ended otherwise.
    """
    folder = work / "trials" / trial.identity
    folder.mkdir(parents=True, exist_ok=True)
    context: Any = multiprocessing.get_context(start_method("stacklm.lab.trial"))
    child = context.Process(target=_child, args=(trial, shards, work, os.getpid()), name=f"trial {trial.identity}")
    child.start()
    _running.add(child)
    try:
        child.join()
    finally:
        _running.discard(child)
    if child.exitcode in (0, DIVERGED):
        return read_json(folder / RECORD)
    lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
    raise RuntimeError(f"trial {trial.identity} ended with code {child.exitcode}: " + "\n".join(lines))


def running() -> list[psutil.Process]:
    """The child processes of trials in this process."""
    pids = [child.pid for child in list(_running) if child.is_alive() and child.pid]
    return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]


def _child(trial: Trial, shards: Path, work: Path, parent: int) -> None:
    folder = work / "trials" / trial.identity
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    try:
        exit_with([psutil.Process(parent)])
    except psutil.NoSuchProcess:
        sys.exit(143)
    try:
        run_trial(trial, shards, work)
    except NonFiniteError as error:
        write_json(folder / RECORD, {"identity": trial.identity, "failed": f"diverged: {error}"})
        sys.exit(DIVERGED)
