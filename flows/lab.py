"""The flow of an experiment: one task per trial, as many in parallel as the processors allow, until its verdict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import State, flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.futures import PrefectFuture
from prefect.states import Completed, Failed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.cache import verified_by_record
from flows.pretrain import run_stages, with_upstream
from flows.watch import claim_run, stoppable
from stacklm.config.schema import ParamsError
from stacklm.lab.schedule import Planned
from stacklm.lab.text import result_text
from stacklm.lab.trial import Trial
from stacklm.pipeline.lab import Files
from stacklm.pipeline.locks import hold_project
from stacklm.pipeline.project import Project
from stacklm.pipeline.tracking.sync import sync_all
from stacklm.pipeline.trials import TRIES, Outcome, failures, run_apart, run_trials, running


@task(task_run_name="{name}", retries=TRIES - 1)
def run_trial(name: str, trial: Trial, shards: Path, work: Path) -> dict[str, Any]:
    """Run one trial, training and scoring; cached if its record is already on disk."""
    return run_apart(trial, shards, work)


@flow(name="lab", description="Runs the trials of an experiment and reports its verdicts.", validate_parameters=False)
def lab(experiment: str, workers: int | None = None, dask: str | None = None) -> State:
    """Run the trials of `experiments/EXPERIMENT.yaml`, `workers` in parallel; the default is that of `task_runner`."""
    project = Project.find()
    files = Files(project, experiment)
    if files.experiment.probe is None:
        shards = run_stages("lab", with_upstream("shards"))
        if not shards.is_completed():
            return shards
    with hold_project(project, f"flow lab {experiment}", wait=True):
        claim_run(project)
        try:
            found = files.begin()
        except ParamsError as error:
            return Failed(message=str(error))
        runner, at_once = task_runner(workers, files.at_once(found), dask)
        with stoppable(runner, children=running):
            broken = run_trials(found, files, tasks(files, runner), at_once)
        findings = files.findings()
        result = result_text(findings)
        print(f"\n{result}")
        if (page := files.write_report(findings)).exists():
            print(f"\nread the report: {page}")
        sync_all(project, experiments=[experiment])
        create_markdown_artifact(f"```\n{result}\n```", key=f"lab-{experiment}".lower().replace("_", "-"), description=experiment)
        if broken:
            return Failed(message=failures(broken))
        return Completed(message=f"{experiment}: all trials are done")


def task_runner(workers: int | None, here: int, dask: str | None) -> tuple[TaskRunner, int]:
    """Return the task runner for trials and the number of parallel trials: by default `here` threads of this process, or Dask.

    `dask` is the address of a scheduler, each of whose workers' threads runs one trial, or `local` for local worker processes.
    """
    at_once = workers or here
    if dask is None:
        return ThreadPoolTaskRunner(max_workers=at_once), at_once
    from dask import config
    from distributed import Client
    from prefect_dask.task_runners import DaskTaskRunner

    if dask != "local":
        with Client(dask) as client:
            threads: Any = client.nthreads()
            return DaskTaskRunner(address=dask), workers or sum(threads.values())
    config.set({"distributed.worker.daemon": False})  # a daemon may not start child processes, and each trial is one
    return DaskTaskRunner(cluster_kwargs={"n_workers": at_once, "threads_per_worker": 1, "dashboard_address": None}), at_once


def tasks(files: Files, runner: TaskRunner) -> Callable[[Planned, Callable[[Outcome], None]], None]:
    """Return a function that starts a trial as a task of the runner."""
    cached = run_trial.with_options(cache_key_fn=verified_by_record, result_storage=files.project.state / "prefect" / "results")

    def start(planned: Planned, ended: Callable[[Outcome], None]) -> None:
        arguments = {"name": planned.name, "trial": planned.trial, "shards": files.shards, "work": files.work}
        future = runner.submit(cached, arguments)
        future.add_done_callback(lambda future: ended(lambda: _outcome(future)))

    return start


def _outcome(future: PrefectFuture) -> Any:
    try:
        return future.result(raise_on_failure=False)
    except Exception as error:  # from Dask: a worker that ended, or lacks a package or file
        return error
