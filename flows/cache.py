"""When Prefect may call a task cached: a stage just after DVC has verified it, a trial whose record lies on the disk now."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prefect
from prefect.cache_policies import CachePolicy
from prefect.context import TaskRunContext

from stacklm.pipeline.freshness import Pipeline
from stacklm.pipeline.project import Project


@dataclass(kw_only=True)
class VerifiedByDVC(CachePolicy):
    """A key made of DVC's receipt for the stage, or none, so that the task's body runs.

    Prefect's own policies would go on serving a result whose files have been deleted or changed since. The key
    also holds the project's location and Prefect's version, since a record made elsewhere cannot be read here.
    """

    project: Project
    pipeline: Pipeline

    def compute_key(self, task_ctx: TaskRunContext, inputs: dict[str, Any], *_: Any, **__: Any) -> str | None:
        receipt = self.pipeline.receipt(inputs["address"])
        if receipt is None:
            return None
        # The stage may have been made by `dvc repro`, or in this flow's body when no key was known yet. DVC's word
        # is what counts, so Prefect's record follows it.
        return _cached(task_ctx, f"{receipt} {self.project.root}", None)


@dataclass(kw_only=True)
class VerifiedByRecord(CachePolicy):
    """A key made of the record in a trial's work folder, or none, so that the task's body runs."""

    def compute_key(self, task_ctx: TaskRunContext, inputs: dict[str, Any], *_: Any, **__: Any) -> str | None:
        from stacklm.pipeline.trials import finished  # with torch, which the stages do not need

        work: Path = inputs["work"]
        record = finished(inputs["trial"], work)
        if record is None:
            return None
        return _cached(task_ctx, f"{json.dumps(record)} {work}", record)


def _cached(task_ctx: TaskRunContext, identity: str, result: Any) -> str:
    """The key of what is on the disk, under which Prefect has the result from now on."""
    key = hashlib.sha256(f"{identity} {prefect.__version__}".encode()).hexdigest()
    if not task_ctx.result_store.exists(key):
        task_ctx.result_store.write(obj=result, key=key)
    return key
