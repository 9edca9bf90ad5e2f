"""Everything that is published, brought up to date in MLflow, whatever was missed while it could not be reached."""

from __future__ import annotations

import sys

from filelock import FileLock

from stacklm.files import read_json, write_json
from stacklm.pipeline.project import Project
from stacklm.pipeline.stages import STAGES
from stacklm.pipeline.tracking.run import Run
from stacklm.pipeline.tracking.tracker import WAIT, store_identity, tracking_uri

SHOWN = ("tokenizer", "pretrain", "evaluate", "compare")
"""The stages whose outputs a run shows."""


def pending(project: Project) -> list[Run]:
    """The published runs that MLflow has not been given in their present state. Looks at names, sizes and times only."""
    return [run for run in Run.finished(project) if _receipt(run) != _stamp(run)]


def sync_all(project: Project) -> bool:
    """Bring MLflow up to date with what is published; tell whether it is. A failure is one warning, never an error."""
    try:
        for run in pending(project):
            sync(run)
    except Exception as error:
        warn(project, error)
        return False
    return True


def sync(run: Run) -> None:
    """Bring one published run up to date in MLflow. Raises whatever MLflow raises."""
    from stacklm.pipeline.tracking.mirror import Mirror

    with FileLock(run.note("lock"), timeout=WAIT):
        before = _stamp(run)["files"]
        Mirror(run).finish()
        write_json(run.note("receipt"), {**_stamp(run), "files": before})


def warn(project: Project, error: Exception) -> None:
    reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
    print(
        f"\nstacklm: MLflow at {tracking_uri(project)} could not be brought up to date ({reason}). Nothing is lost: "
        "results lie in files, and MLflow gets them as soon as it answers.",
        file=sys.stderr,
    )


def _receipt(run: Run) -> dict | None:
    path = run.note("receipt")
    return read_json(path) if path.exists() else None


def _stamp(run: Run) -> dict:
    """The place in MLflow, and size and time of each file that the run shows there."""
    root = run.project.root
    paths = [
        path
        for stage in STAGES
        if stage.name in SHOWN
        for path in (root / stage.record(run.model), *stage.paths(stage.writes, root, run.model).values())
    ]
    files = sorted(file for path in paths for file in ([path, *path.rglob("*")] if path.is_dir() else [path]) if file.is_file())
    return {
        "store": store_identity(run.project),
        "files": {file.relative_to(root).as_posix(): [stat.st_size, stat.st_mtime_ns] for file in files for stat in [file.stat()]},
    }
