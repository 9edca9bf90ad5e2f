"""Update MLflow with everything that is published, and with a run in progress.

Published files are compared with receipts, so updates missed while MLflow was not reachable are made later.

A separate process follows a training run, every two seconds, because MLflow in the training process would use memory, time and
the GIL, all of which are measured there. That process lives as long as its standard input is open: when training ends in any
way, `kill -9` included, the pipe closes, the last rows and the status are logged, and the process exits within seconds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock

import stacklm
from stacklm.files import read_json, sha256, write_json
from stacklm.pipeline.project import Project
from stacklm.pipeline.stages import STAGES, Instance, stage
from stacklm.pipeline.tracking.lab import sync_labs
from stacklm.pipeline.tracking.mirror import Mirror
from stacklm.pipeline.tracking.run import Pretraining
from stacklm.pipeline.tracking.store import WAIT, matches, shown_uri, store_identity
from stacklm.pipeline.tracking.weights import register

SHOWN = ("tokenizer", "pretrain", "evaluate", "compare")
"""Stages whose outputs are logged in a run."""

INTERVAL = 2.0
"""Seconds between two reads of the files."""
LAST_WORDS = 3.0
"""Seconds until the process must exit after training has ended."""
FINISHED = "FINISHED"


def pending(project: Project) -> list[Pretraining]:
    """Return the published runs whose present state is not in MLflow, judged by names, sizes and times of files only."""
    return [run for run in Pretraining.finished(project) if not matches(run.note("receipt"), _stamp(run))]


def sync_all(project: Project, experiments: Collection[str] | None = None) -> bool:
    """Update MLflow with what is published and with these experiments (default: all); return whether it is up to date.

    A failure is one warning, never an error.
    """
    try:
        for run in pending(project):
            sync(run)
        _register(project)
        sync_labs(project, experiments)
    except Exception as error:
        warn(project, error)
        return False
    return True


def sync(run: Pretraining) -> None:
    """Update one published run in MLflow. Raises whatever MLflow raises."""
    with FileLock(run.note("lock"), timeout=WAIT):
        before = _stamp(run)["files"]
        Mirror(run).finish()
        write_json(run.note("receipt"), {**_stamp(run), "files": before})


def _register(project: Project) -> None:
    """Update the registered model to the last comparison; its receipt has the comparison's hash."""
    comparison, receipt = project.root / stage("compare").writes["comparison"], project.state / "tracking" / "registry.receipt"
    if not comparison.exists():
        return
    wanted = [*store_identity(project)[:2], sha256(comparison)]
    if not matches(receipt, wanted):
        register(project, read_json(comparison))
        write_json(receipt, wanted)


def warn(project: Project, error: Exception) -> None:
    reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
    print(
        f"\nstacklm: MLflow at {shown_uri(project)} could not be brought up to date ({reason}). Nothing is lost: "
        "results are in files, and are logged in MLflow as soon as it responds.",
        file=sys.stderr,
    )


def _stamp(run: Pretraining) -> dict:
    """The MLflow store, and size and time of each file that is logged there for the run."""
    root = run.project.root
    shown = [replace(run.item, stage=stage) if stage.per else Instance(stage) for stage in STAGES if stage.name in SHOWN]
    paths = [path for item in shown for path in (root / item.record, *item.made(root).values())]
    files = sorted(file for path in paths for file in (path, *path.rglob("*")) if file.is_file())
    return {
        "store": store_identity(run.project),
        "files": {file.relative_to(root).as_posix(): [stat.st_size, stat.st_mtime_ns] for file in files for stat in [file.stat()]},
    }


class Follower:
    """`with Follower(project, item, record, work): train()` logs the training run in MLflow while it runs.

    `record` is the stage runner's record of the stage; `work` is the folder to which `metrics.jsonl` and `timing.jsonl` are
    written. Training is not affected if MLflow is down, hangs or is killed.
    """

    def __init__(self, project: Project, item: Instance, record: Mapping[str, Any], work: Path) -> None:
        self._record = record
        self._run = Pretraining.growing(project, item, record["fingerprint"], work)
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Follower:
        try:
            self._run.begin(self._record)
            self._process = _start(self._run)
        except Exception as error:
            warn(self._run.project, error)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process is None:
            return
        interrupted = kind is not None and not issubclass(kind, Exception)
        word = FINISHED if kind is None else "KILLED" if interrupted else "FAILED"
        try:
            self._process.communicate(word, timeout=LAST_WORDS + 1)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()


def _start(run: Pretraining) -> subprocess.Popen:
    package = str(Path(stacklm.__file__).parent.parent)
    words = [run.project.root, run.project.state, run.item.model, run.item.seed, run.fingerprint, run.metrics.parent]
    return subprocess.Popen(
        [sys.executable, "-m", __name__, *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=run.project.root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])},
    )


def _main(root: str, state: str, model: str, seed: str, fingerprint: str, work: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; training handles it
    if hasattr(os, "nice"):
        os.nice(5)
    item = Instance(stage("pretrain"), model, int(seed))
    _Shadow(Pretraining.growing(Project(Path(root), Path(state)), item, fingerprint, Path(work))).follow()
    os._exit(0)  # do not wait for threads started by MLflow


class _Shadow:
    """Runs in the process that follows training."""

    def __init__(self, run: Pretraining) -> None:
        self._run = run
        self._mirror: Mirror | None = None
        self._warned = False
        self._word = ""
        self._ended = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def follow(self) -> None:
        """Read the files until training has ended."""
        pause = 0.0
        with FileLock(self._run.note("lock")):
            while not self._ended.wait(pause):
                started = time.monotonic()
                self._try(lambda mirror: mirror.grow())
                pause = max(INTERVAL, 5 * (time.monotonic() - started))
            self._try(lambda mirror: mirror.end(self._word))

    def _try(self, step: Callable[[Mirror], None]) -> None:
        try:
            self._mirror = self._mirror or Mirror(self._run)
            step(self._mirror)
        except Exception as error:
            self._mirror = None  # the state in MLflow is unknown now: query it again
            if not self._warned:
                warn(self._run.project, error)
            self._warned = True

    def _listen(self) -> None:
        """Wait for training to end, then exit after `LAST_WORDS`; at once if it finished normally and MLflow has no run yet."""
        self._word = sys.stdin.read() or "KILLED"
        self._ended.set()
        if self._mirror or self._word != FINISHED:
            time.sleep(LAST_WORDS)
        os._exit(0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
