"""Runs that do not end by themselves: children of an interrupted flow, and records of a killed one."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator

import psutil
from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.states import Crashed, StateType

from stacklm.pipeline.project import Project

PLACE = "stacklm.project"


def claim_run(project: Project) -> None:
    """Write on this flow run which project it has locked, and mark what a killed holder of the lock left running.

    To be called with the project's lock held: nobody else can then be running here, whatever Prefect still shows.
    """
    place = f"{platform.node()}:{project.root}"
    client = get_client(sync_client=True)
    running = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING])))
    stale = [run.id for run in client.read_flow_runs(flow_run_filter=running) if run.labels.get(PLACE) == place]
    crashed = Crashed(message="The process of this run was killed.")
    if stale:
        tasks = client.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=stale)),
            task_run_filter=TaskRunFilter(
                state=TaskRunFilterState(type=TaskRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING]))
            ),
        )
        for run in tasks:
            client.set_task_run_state(run.id, crashed, force=True)
        for flow_run_id in stale:
            client.set_flow_run_state(flow_run_id, crashed, force=True)
    client.update_flow_run_labels(runtime.flow_run.id, {PLACE: place})


@contextlib.contextmanager
def stop_children_on_error(grace: float = 5) -> Iterator[None]:
    """End the `dvc repro` children when the body is interrupted, since the threads that wait for them cannot be.

    In a terminal, Ctrl-C has reached the children as well: they have `grace` seconds to end by themselves.
    """
    try:
        yield
    except BaseException:
        for child in psutil.wait_procs(_dvc_children(), timeout=grace)[1]:
            child.terminate()
        raise


def _dvc_children() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it may just have ended
            found += [child] if "dvc" in child.cmdline() else []
    return found
