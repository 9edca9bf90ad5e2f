"""Cache keys of Prefect tasks: a stage is cached once DVC has verified it, a trial if its record is on disk.

Prefect's own policies would keep serving a result whose files have been deleted or changed since. A key also contains the
location of the files and Prefect's version, since a record written elsewhere cannot be read here.
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
    """Return a cache key function: a key from DVC's receipt for the stage, or None, so that the task runs."""

    def key(context: TaskRunContext, inputs: dict[str, Any]) -> str | None:
        receipt = pipeline.receipt(inputs["address"])
        # The stage may have been run by `dvc repro`, or in this flow before there was a key. DVC decides, so Prefect's
        # record is updated to match.
        return _cached(context, f"{receipt} {project.root}", None) if receipt else None

    return key


def verified_by_record(context: TaskRunContext, inputs: dict[str, Any]) -> str | None:
    """Return a key from the record in a trial's work folder, or None, so that the task runs."""
    from stacklm.pipeline.trials import finished  # imports torch, which the stages do not need

    record = finished(inputs["trial"], inputs["work"])
    return _cached(context, f"{json.dumps(record)} {inputs['work']}", record) if record else None


def _cached(context: TaskRunContext, identity: str, result: Any) -> str:
    """Return the cache key for `identity`, after storing the result under it in Prefect's result store."""
    key = hashlib.sha256(f"{identity} {prefect.__version__}".encode()).hexdigest()
    if not context.result_store.exists(key):
        context.result_store.write(obj=result, key=key)
    return key
