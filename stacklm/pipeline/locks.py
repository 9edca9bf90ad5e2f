"""Who works on the project: locks that the system releases when their holder dies, and that know its name."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from stacklm.files import read_json, write_json
from stacklm.pipeline.lifeline import FLOW_PID, alive, door
from stacklm.pipeline.project import STATE, Project


class Busy(RuntimeError):
    """Somebody else works on the project; the message names them."""


@contextlib.contextmanager
def hold_project(project: Project, who: str, wait: bool, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold the checkout for a whole flow, or for one stage of a `dvc repro`.

    A stage that belongs to the flow that holds the lock passes through. With `wait` the call waits for the holder, and
    for the rest of the `dvc repro` whose stages come and go; otherwise it raises `Busy` with the holder's name at once.
    """
    folder = project.root / STATE
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / "project.lock"), folder / "project.holder.json"
    if os.environ.get(FLOW_PID) == str(_pid_in(holder)):
        yield
        return
    me = door() or psutil.Process()
    said = False
    while True:
        try:
            lock.acquire(timeout=0)
            other = _other(holder, me)
            if other is None:
                break
            lock.release()
        except Timeout:
            other = _describe(holder)
        if not wait:
            raise Busy(f"{other} works on this project; wait for it to end, or stop it, then try again")
        if not said:
            say(f"waiting for {other} to finish")
            said = True
        time.sleep(0.5)
    try:
        write_json(holder, {"who": who, "pid": me.pid, "started": me.create_time()})
        yield
    finally:
        if me.pid == os.getpid():
            holder.unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def hold(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold one named thing, such as the work folder of one stage, waiting for whoever has it, or else raising `Busy`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise Busy(f"{path} is held by another process") from None
    try:
        yield
    finally:
        lock.release()


def _other(holder: Path, me: psutil.Process) -> str | None:
    """The `dvc repro` between two of its stages, if there is one that is not ours."""
    try:
        entry = read_json(holder)
        process = psutil.Process(entry["pid"])
    except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
        return None
    ours = process.pid == me.pid or abs(process.create_time() - entry["started"]) > 1
    return None if ours or not alive(process) else _describe(holder)


def _describe(holder: Path) -> str:
    try:
        entry = read_json(holder)
        return f"{entry['who']} (process {entry['pid']})"
    except (FileNotFoundError, ValueError):
        return "another process"


def _pid_in(holder: Path) -> int | None:
    try:
        return read_json(holder)["pid"]
    except (FileNotFoundError, ValueError):
        return None
