"""When Prefect may call a stage cached: only just after DVC has verified it, on disk, now."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
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
        key = hashlib.sha256(f"{receipt} {self.project.root} {prefect.__version__}".encode()).hexdigest()
        # The stage may have been made by `dvc repro`, or in this flow's body when no key was known yet. DVC's word
        # is what counts, so Prefect's record follows it.
        if not task_ctx.result_store.exists(key):
            task_ctx.result_store.write(obj=None, key=key)
        return key
