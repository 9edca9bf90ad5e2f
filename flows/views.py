"""What a flow run shows in Prefect beside its tasks: how far it is, and how the models compare."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from stacklm.files import read_json
from stacklm.pipeline.project import Project
from stacklm.pipeline.stages import Instance, stage
from stacklm.pipeline.tracking.run import FLOW_RUN, FLOW_RUN_ID, Pretraining


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
