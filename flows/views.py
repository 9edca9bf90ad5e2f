"""What a flow run shows in Prefect beside its tasks: output of stages, progress, and the comparison of models."""

from __future__ import annotations

import contextlib
import contextvars
import os
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from stacklm.config.params import load
from stacklm.files import read_json, read_jsonl
from stacklm.pipeline.project import Project
from stacklm.pipeline.stages import Instance, stage
from stacklm.pipeline.tracking.run import FLOW_RUN, FLOW_RUN_ID, Pretraining

BAR = re.compile(r"\d+%\|.*\||\d+[a-zA-Z]*/s\]|, .*(it|s/\w+|\w+/s)\]?$")
"""A progress line of tqdm, which is shown on the terminal but not logged."""
INTERVAL = 5.0
"""Seconds between updates of a training run's progress."""


class Progress:
    """A progress bar over `total` stages, as a Prefect artifact."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        # In a task or flow that is not async, Prefect's own functions are not coroutines.
        self._artifact: Any = create_progress_artifact(progress=0, key="stages", description=f"0 of {total} stages")

    def advance(self) -> None:
        self._done += 1
        update_progress_artifact(self._artifact, 100 * self._done / self._total, f"{self._done} of {self._total} stages")


def name_run(name: str, chosen: Sequence[Instance]) -> None:
    """Set name and tags of this flow run to its flow and models, and pass its name and ID to its stages in the environment."""
    models = list(dict.fromkeys(item.model for item in chosen if item.model))
    number = flow_run.name  # Prefect's name, such as `amber-fox`
    title = f"{' '.join([name, *models])} · {number}"
    get_client(sync_client=True).update_flow_run(flow_run.id, name=title, tags=sorted({"stacklm", name, *models}))
    os.environ.update({FLOW_RUN: title, FLOW_RUN_ID: str(flow_run.id)})


def link_trainings(project: Project, trainings: Sequence[Instance]) -> None:
    """Add a link artifact to each training's run in MLflow, if MLflow was reachable."""
    for run in Pretraining.finished(project):
        page = run.page() if run.item in trainings else None
        if page:
            key = re.sub(r"[^a-z0-9]+", "-", f"mlflow-{run.item.run}".lower())
            create_link_artifact(
                page, link_text=f"{run.item.run} in MLflow", key=key, description="`stacklm ui` serves local pages."
            )


def show_comparison(project: Project) -> None:
    """Show the figures of the comparison as a table, and its report without images, which are separate files on disk."""
    files = Instance(stage("compare")).made(project.root)
    comparison = read_json(files["comparison"])
    table = [
        {
            "model": name,
            "parameters": facts["total_parameters"],
            "training tokens": facts["tokens"],
            "training FLOPs": facts["training_flops"],
            "valid loss": facts["valid"]["loss"],
            "test loss": facts["test"]["loss"],
            "test bits per byte": facts["test"]["bits_per_byte"],
            "seeds": len(facts["seeds"]),
        }
        for name, facts in comparison["models"].items()
    ]
    create_table_artifact(table, key="comparison", description=comparison["finding"])
    report = (files["report"] / "report.md").read_text(encoding="utf-8")
    create_markdown_artifact(re.sub(r"!\[[^\]]*\]\([^)]*\)\n*", "", report), key="report", description="Report of the comparison")


def forward(line: str) -> None:
    """Show a line of a stage in the task's log, and on the terminal unless that already shows Prefect's log."""
    if os.environ.get("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL") == "CRITICAL":
        print(line, flush=True)
    if line.strip() and not BAR.search(line):
        get_run_logger().info(line)


@contextlib.contextmanager
def training_shown(project: Project, address: str) -> Iterator[None]:
    """Show a training's steps as a progress artifact of its task while the body runs."""
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
    """Return the last step of the newest training run in the work folders; None before its first step."""
    found = (project.state / "work").glob(f"{address}-*/metrics.jsonl")
    files = [path for path in found if path.parent.name.rpartition("-")[0] == address]
    files.sort(key=lambda path: path.stat().st_mtime)
    rows = read_jsonl(files[-1]) if files else []
    return rows[-1]["step"] if rows else None
