"""Locks on a project: the operating system releases them when their holder dies, and they record who holds them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from stacklm.config.params import load
from stacklm.config.schema import ParamsError, flatten, plain
from stacklm.files import read_json, sha256, write_json
from stacklm.pipeline.project import STATE, Project
from stacklm.pipeline.watchdog import FLOW_PID, alive, entry_point

HOLDER = "project.holder.json"


class Busy(RuntimeError):
    """Another process works on the project; the message names it."""


@contextlib.contextmanager
def hold_project(project: Project, who: str, wait: bool, say: Callable[[str], None] = print) -> Iterator[None]:
    """Lock the checkout for a whole flow, or for one stage of a `dvc repro`, and store the settings at its start.

    A stage of the flow that holds the lock proceeds without it. With `wait` the call waits for the holder, and also between
    the stages of another `dvc repro`; otherwise it raises `Busy` with the holder's name immediately.
    """
    folder = project.root / STATE
    lock, holder = FileLock(folder / "project.lock"), folder / HOLDER
    if os.environ.get(FLOW_PID) == str(_entry(holder).get("pid")):
        yield
        return
    me = entry_point() or psutil.Process()
    said = False
    while True:
        try:
            lock.acquire(timeout=0)
            entry = _entry(holder)
            if not _another_repro(entry, me):
                break
            lock.release()
        except Timeout:
            entry = _entry(holder)
        other = f"{entry['who']} (process {entry['pid']})" if entry else "another process"
        if not wait:
            raise Busy(f"{other} works on this project; wait for it to end, or stop it, then try again")
        if not said:
            say(f"waiting for {other} to finish")
            said = True
        time.sleep(0.5)
    try:
        if not _is(me, entry):  # else this is a later stage of the same `dvc repro`
            write_json(holder, {"who": who, "pid": me.pid, "started": me.create_time(), "settings": _settings(project)})
        yield
    finally:
        if me.pid == os.getpid():
            holder.unlink(missing_ok=True)
        lock.release()


def check_settings(project: Project) -> None:
    """Raise `ParamsError` if params.yaml or dvc.yaml has changed since the current holder locked the project.

    DVC reads both again for every stage, and records their content when the stage has ended.
    """
    before, now = read_json(project.root / STATE / HOLDER)["settings"], _settings(project)
    if before == now:
        return
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    changes = ", ".join(f"{key}: {before.get(key, 'absent')} -> {now.get(key, 'absent')}" for key in keys[:3])
    raise ParamsError(
        f"the settings changed while this run used them ({changes}{', ...' if len(keys) > 3 else ''}). Stages with different "
        "settings must not be mixed: start the run again. Stages finished before the change are kept"
    )


def _settings(project: Project) -> dict[str, Any]:
    """Every value of params.yaml by its dotted key, and a hash of dvc.yaml."""
    return {**flatten(plain(load(project.params_file))), "dvc.yaml": sha256(project.root / "dvc.yaml")[:16]}


def _entry(holder: Path) -> dict[str, Any]:
    """What the holder has written about itself; empty if there is no holder, or its file cannot be read."""
    try:
        return read_json(holder)
    except (FileNotFoundError, ValueError):
        return {}


def _is(process: psutil.Process, entry: Mapping[str, Any]) -> bool:
    """Whether the holder is this process, and not an earlier one with the same id."""
    return entry.get("pid") == process.pid and abs(process.create_time() - entry["started"]) <= 1


def _another_repro(entry: Mapping[str, Any], me: psutil.Process) -> bool:
    """Whether the holder is another `dvc repro` that is between two stages."""
    try:
        process = psutil.Process(entry["pid"])
    except (KeyError, psutil.NoSuchProcess):
        return False
    return process.pid != me.pid and _is(process, entry) and alive(process)
