"""Clean-up of flow runs: terminate the children of an interrupted flow, and mark killed runs as crashed."""

from __future__ import annotations

import contextlib
import platform
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import psutil
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
from prefect.runtime import flow_run
from prefect.states import Crashed
from prefect.task_runners import TaskRunner

from stacklm.pipeline.project import Project
from stacklm.pipeline.watchdog import REPRO

PLACE = "stacklm.project"


def claim_run(project: Project) -> None:
    """Label this flow run with its project, and mark runs of this project that are still shown as running as crashed.

    Call this with the project's lock held: no other flow can then be running here, whatever Prefect still shows.
    """
    place = f"{platform.node()}:{project.root}"
    client = get_client(sync_client=True)
    running = FlowRunFilter.model_validate({"state": {"type": {"any_": ["RUNNING"]}}})
    stale = [run.id for run in client.read_flow_runs(flow_run_filter=running) if run.labels.get(PLACE) == place]
    crashed = Crashed(message="The process of this run was killed.")
    if stale:
        theirs = FlowRunFilter.model_validate({"id": {"any_": stale}})
        unfinished = TaskRunFilter.model_validate({"state": {"type": {"any_": ["PENDING", "RUNNING"]}}})
        for run in client.read_task_runs(flow_run_filter=theirs, task_run_filter=unfinished):
            client.set_task_run_state(run.id, crashed, force=True)
        for flow_run_id in stale:
            client.set_flow_run_state(flow_run_id, crashed, force=True)
    client.update_flow_run_labels(flow_run.id, {PLACE: place})


def dvc_children() -> list[psutil.Process]:
    """Return the `dvc repro` child processes of this process."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it may have ended already
            if child.is_running() and REPRO in child.cmdline():
                found.append(child)
    return found


@contextlib.contextmanager
def stoppable(runner: TaskRunner, children: Callable[[], list[psutil.Process]] = dvc_children, grace: float = 5) -> Iterator[None]:
    """Run tasks in the body; an error or Ctrl-C ends their `children`, since the threads that wait for them cannot be stopped.

    In a terminal, Ctrl-C also reaches the children: they have `grace` seconds to end by themselves. If some code swallows
    the `KeyboardInterrupt` (Python only prints one that is raised in a destructor), it is raised again at the end of the body.
    """
    stopping, ended = threading.Event(), threading.Event()

    def stop() -> None:
        psutil.wait_procs(children(), timeout=grace)
        while not ended.is_set():  # a task may be about to start its child
            for child in children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.terminate()
            ended.wait(0.2)

    def begin_to_stop() -> None:
        if not stopping.is_set():
            stopping.set()
            threading.Thread(target=stop, daemon=True, name="stop children").start()

    interrupted = False

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        begin_to_stop()
        signal.default_int_handler(number, frame)

    # Nothing is changed if SIGINT is ignored, as for a background job, or if a worker has its own handler.
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, on_interrupt)
    try:
        with runner:
            try:
                yield
            except BaseException:
                begin_to_stop()
                raise
    finally:
        ended.set()
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupted:
        raise KeyboardInterrupt
