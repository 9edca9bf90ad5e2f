"""What a flow run shows in Prefect beside its tasks: what its stages print, how far it is, and how the models compare."""

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
"""A line of tqdm: shown on the terminal, but no news for a log."""
INTERVAL = 5.0
"""Seconds between two looks at the steps of a training."""


class Progress:
    """A bar of `total` stages."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        # In a task or flow that is not async, Prefect's own functions are not coroutines.
        self._artifact: Any = create_progress_artifact(progress=0, key="stages", description=f"0 of {total} stages")

    def advance(self) -> None:
        self._done += 1
        update_progress_artifact(self._artifact, 100 * self._done / self._total, f"{self._done} of {self._total} stages")


def name_run(name: str, chosen: Sequence[Instance]) -> None:
    """Let name and tags of this flow run say what it runs, and tell its stages which run they belong to."""
    models = list(dict.fromkeys(item.model for item in chosen if item.model))
    number = flow_run.name  # Prefect's own, such as `amber-fox`
    title = f"{' '.join([name, *models])} · {number}"
    get_client(sync_client=True).update_flow_run(flow_run.id, name=title, tags=sorted({"stacklm", name, *models}))
    os.environ.update({FLOW_RUN: title, FLOW_RUN_ID: str(flow_run.id)})


def link_trainings(project: Project, trainings: Sequence[Instance]) -> None:
    """A link to each training's run in MLflow, as far as MLflow was reached."""
    for run in Pretraining.finished(project):
        page = run.page() if run.item in trainings else None
        if page:
            key = re.sub(r"[^a-z0-9]+", "-", f"mlflow-{run.item.run}".lower())
            create_link_artifact(
                page, link_text=f"{run.item.run} in MLflow", key=key, description="`stacklm ui` serves local pages."
            )


def show_comparison(project: Project) -> None:
    """The comparison's figures as a table, and its report without the pictures, which lie beside it on the disk."""
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
