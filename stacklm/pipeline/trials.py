"""Running trials, each in its own process: a crash stops no other trial, and where the system can fork, each starts
immediately from a process that has already imported torch."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import psutil

from stacklm.files import read_json, write_json
from stacklm.lab.schedule import Lab, Planned, Records
from stacklm.lab.text import shown
from stacklm.lab.trial import RECORD, Trial, run_trial
from stacklm.pipeline.lab import Files
from stacklm.pipeline.watchdog import exit_with
from stacklm.train import NonFiniteError
from stacklm.train.distributed import start_method
from stacklm.units import plural

DIVERGED = 3
"""Exit code of a trial whose loss became NaN or Inf: a result that a retry would not change."""
TRIES = 2
"""How often a trial is started if its process ends without a result, for instance because it was killed."""
LAST_LINES = 5
NAME = "trial "
"""Prefix of the names of child processes."""

Outcome = Callable[[], dict[str, Any] | BaseException]
"""Called after a trial has ended: returns its record, or why it has none."""

Say = Callable[[Planned, Records, int, int], None]
"""Called after each trial with all records so far, the number of finished trials of the experiment, and the number of trials
known to remain, including running ones."""


def say_shown(planned: Planned, records: Records, done: int, left: int) -> None:
    """Print a line about a finished trial."""
    print(shown(planned, records[planned.trial.identity], done, left), flush=True)


def run_trials(
    lab: Lab, files: Files, start: Callable[[Planned, Callable[[Outcome], None]], Any], at_once: int, say: Say = say_shown
) -> dict[str, str]:
    """Run all pending trials of the experiment; return the reasons of failed trials, by identity.

    `start(planned, ended)` starts a trial, in any thread, process or machine, and calls `ended` when it is over. After
    each trial the pending trials are computed again, since learning rates depend on earlier results. At the end the
    experiment's folder contains the records of all its trials, including those that another experiment has run.
    """
    records = files.records()
    broken: dict[str, str] = {}
    under_way: dict[str, Planned] = {}
    over: SimpleQueue[tuple[str, Outcome]] = SimpleQueue()
    while True:
        known = records | {identity: {"failed": why} for identity, why in broken.items()}
        wanted = [planned for planned in lab.pending(known) if planned.trial.identity not in under_way]
        for planned in wanted[: at_once - len(under_way)]:
            identity = planned.trial.identity
            under_way[identity] = planned
            start(planned, lambda outcome, identity=identity: over.put((identity, outcome)))
        if not under_way:
            break
        identity, outcome = over.get()
        planned, found = under_way.pop(identity), outcome()
        if isinstance(found, dict):
            records[identity] = found
            files.save(found)
            needed = [one.trial.identity for one in lab.trials(records)]
            left = sum(one not in records for one in needed)
            say(planned, records, len(needed) - left, left)
        else:
            broken[identity] = f"{planned.name}: {found}"
            print(broken[identity], flush=True)
    for planned in lab.trials(known):
        if (identity := planned.trial.identity) in records and not files.record(identity).exists():
            files.save(records[identity])
    return broken


def failures(broken: Mapping[str, str]) -> str:
    """The message about trials that failed after all tries, with their reasons."""
    return "\n".join([f"{plural(len(broken), 'trial')} failed; the same command tries them again", *broken.values()])


def run_here(lab: Lab, files: Files, at_once: int, say: Say = say_shown) -> dict[str, str]:
    """`run_trials` in child processes, which are terminated after Ctrl-C or an error."""
    stopping = threading.Event()
    with ThreadPoolExecutor(at_once) as pool:

        def start(planned: Planned, ended: Callable[[Outcome], None]) -> None:
            future = pool.submit(_tried, planned.trial, files.shards, files.work, stopping)
            future.add_done_callback(lambda future: ended(lambda: future.exception() or future.result()))

        try:
            return run_trials(lab, files, start, at_once, say)
        except BaseException:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for child in running():
                child.terminate()
            raise


def _tried(trial: Trial, shards: Path, work: Path, stopping: threading.Event, tries: int = TRIES) -> dict[str, Any]:
    try:
        return run_apart(trial, shards, work)
    except RuntimeError:
        if tries == 1 or stopping.is_set():
            raise
        return _tried(trial, shards, work, stopping, tries - 1)


def run_apart(trial: Trial, shards: Path, work: Path) -> dict[str, Any]:
    """Train a trial in a child process, with its output in `log.txt` in its folder, and return its record.

    A diverged trial also has a record, with `failed`. Raises `RuntimeError` with the end of its log if the child ended in
    any other way.
    """
    folder = work / "trials" / trial.identity
    folder.mkdir(parents=True, exist_ok=True)
    context: Any = multiprocessing.get_context(start_method("stacklm.lab.trial"))
    child = context.Process(target=_child, args=(trial, shards, work, os.getpid()), name=f"{NAME}{trial.identity}")
    child.start()
    child.join()
    if child.exitcode in (0, DIVERGED):
        return read_json(folder / RECORD)
    lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
    raise RuntimeError(f"trial {trial.identity} ended with code {child.exitcode}: " + "\n".join(lines))


def running() -> list[psutil.Process]:
    """The child processes of this process that run trials."""
    pids = [child.pid for child in multiprocessing.active_children() if child.name.startswith(NAME)]
    return [psutil.Process(pid) for pid in pids if pid and psutil.pid_exists(pid)]


def finished(trial: Trial, work: Path) -> dict[str, Any] | None:
    """The record of a trial in this work folder; None if it has not finished there."""
    path = work / "trials" / trial.identity / RECORD
    return read_json(path) if path.exists() else None


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
