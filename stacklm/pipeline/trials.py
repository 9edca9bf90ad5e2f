"""Running trials, each in a process of its own: one that crashes takes no other with it, and each starts at once from a
process that has torch imported already, where the system can fork."""

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
"""Exit code of a trial whose loss became NaN or Inf: a result, which another try would not change."""
TRIES = 2
"""How often a trial is begun whose process ends without a result, such as one that was killed."""
LAST_LINES = 5
NAME = "trial "
"""What the names of child processes begin with."""

Outcome = Callable[[], dict[str, Any] | BaseException]
"""Asked once a trial has ended: its record, or why it has none."""

Say = Callable[[Planned, Records, int, int], None]
"""Called after each trial with all records so far, and how many trials of the experiment are done and how many are known to
come, those under way included."""


def say_shown(planned: Planned, records: Records, done: int, left: int) -> None:
    """Print a line about a trial that has ended."""
    print(shown(planned, records[planned.trial.identity], done, left), flush=True)


def run_trials(
    lab: Lab, files: Files, start: Callable[[Planned, Callable[[Outcome], None]], Any], at_once: int, say: Say = say_shown
) -> dict[str, str]:
    """Run what the experiment needs until nothing is left; why trials failed, by their identity.

    `start(planned, ended)` begins a trial, in any thread, process or machine, and calls `ended` when it is over. After
    each trial the experiment is asked again what to do next, since learning rates depend on what was found. At the end
    the experiment's folder holds the records of all its trials, of those as well that another experiment has made.
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
            say(planned, records, len(lab.done(records)), len(lab.pending(records)))
        else:
            broken[identity] = f"{planned.name}: {found}"
            print(broken[identity], flush=True)
    for planned in lab.trials(known):
        if (identity := planned.trial.identity) in records and not files.record(identity).exists():
            files.save(records[identity])
    return broken


def failures(broken: Mapping[str, str]) -> str:
    """What is said of trials that failed for good, by why each of them did."""
    return "\n".join([f"{plural(len(broken), 'trial')} failed; the same command tries them again", *broken.values()])


def run_here(lab: Lab, files: Files, at_once: int, say: Say = say_shown) -> dict[str, str]:
    """`run_trials` in child processes of this one; Ctrl-C or an error ends them."""
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
    """The record of a trial, which is trained in a child process; what it prints goes to `log.txt` in its folder.

    A trial that diverged has a record as well, with `failed`. Raises `RuntimeError` with the end of its log where the
    child ended otherwise.
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
    """The child processes of trials in this process."""
    pids = [child.pid for child in multiprocessing.active_children() if child.name.startswith(NAME)]
    return [psutil.Process(pid) for pid in pids if pid and psutil.pid_exists(pid)]


def finished(trial: Trial, work: Path) -> dict[str, Any] | None:
    """The record of a trial that has been run with that work folder."""
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
