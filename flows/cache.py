"""When Prefect may call a task cached: a stage just after DVC has verified it, a trial whose record lies on the disk now.

Prefect's own policies would go on serving a result whose files have been deleted or changed since. A key also holds the place
of the files and Prefect's version, since a record made elsewhere cannot be read here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import prefect
from prefect.context import TaskRunContext

from stacklm.pipeline.freshness import Pipeline
from stacklm.pipeline.project import Project


def verified_by_dvc(project: Project, pipeline: Pipeline) -> Callable[[TaskRunContext, dict[str, Any]], str | None]:
    """What makes a key of DVC's receipt for the stage, or none, so that the task's body runs."""

    def key(context: TaskRunContext, inputs: dict[str, Any]) -> str | None:
        receipt = pipeline.receipt(inputs["address"])
        # The stage may have been made by `dvc repro`, or in this flow's body when no key was known yet. DVC's word
        # is what counts, so Prefect's record follows it.
        return _cached(context, f"{receipt} {project.root}", None) if receipt else None

    return key


def verified_by_record(context: TaskRunContext, inputs: dict[str, Any]) -> str | None:
    """A key made of the record in a trial's work folder, or none, so that the task's body runs."""
    from stacklm.pipeline.trials import finished  # with torch, which the stages do not need

    record = finished(inputs["trial"], inputs["work"])
    return _cached(context, f"{json.dumps(record)} {inputs['work']}", record) if record else None


def _cached(context: TaskRunContext, identity: str, result: Any) -> str:
    """The key of what is on the disk, under which Prefect has the result from now on."""
    key = hashlib.sha256(f"{identity} {prefect.__version__}".encode()).hexdigest()
    if not context.result_store.exists(key):
        context.result_store.write(obj=result, key=key)
    return key
