"""The flow of an experiment: one task per trial, as many at once as there are processors for, until its verdict."""

from __future__ import annotations

from pathlib import Path
from queue import SimpleQueue
from typing import Any

from prefect import State, flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.futures import PrefectFuture
from prefect.states import Completed, Failed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.pretrain import run_stages, with_upstream
from flows.watch import claim_run, stoppable
from stacklm.config.schema import ParamsError
from stacklm.lab.experiment import Trial
from stacklm.lab.schedule import Lab, Planned
from stacklm.lab.text import result_text, shown
from stacklm.pipeline.lab import Files
from stacklm.pipeline.locks import hold_project
from stacklm.pipeline.project import Project, trainings_at_once
from stacklm.pipeline.tracking.sync import sync_all
from stacklm.pipeline.trials import run_apart, running

TRIES = 2
"""How often a trial is begun whose process ends without a result, such as one that was killed."""


@task(task_run_name="{name}", retries=TRIES - 1)
def run_trial(name: str, trial: Trial, shards: Path, work: Path) -> dict[str, Any]:
    """One training with its scores; what is on the disk already is not done again."""
    return run_apart(trial, shards, work)


@flow(name="lab", description="Runs the trials of an experiment and says what they found.", validate_parameters=False)
def lab(experiment: str, workers: int | None = None) -> State:
    """The trials of `experiments/EXPERIMENT.yaml`, `workers` at once (by default as `trainings_at_once` has it)."""
    shards = run_stages("lab", with_upstream("shards"))
    if not shards.is_completed():
        return shards
    project = Project.find()
    files = Files(project, experiment)
    with hold_project(project, f"flow lab {experiment}", wait=True):
        claim_run(project)
        try:
            found = files.begin()
        except ParamsError as error:
            return Failed(message=str(error))
        at_once = workers or trainings_at_once(found.settings)
        broken = run_trials(found, files, ThreadPoolTaskRunner(max_workers=at_once), at_once)
        result = result_text(found, files.records())
        print(f"\n{result}\n\nread the report: {files.write_report()}")
        sync_all(project)
        create_markdown_artifact(f"```\n{result}\n```", key=f"lab-{experiment}".lower().replace("_", "-"), description=experiment)
        if broken:
            return Failed(message="\n".join([f"{len(broken)} trials failed; the same command tries them again", *broken.values()]))
        return Completed(message=f"{experiment}: all trials are done")


def run_trials(found: Lab, files: Files, runner: TaskRunner, at_once: int) -> dict[str, str]:
    """Run what the experiment needs until nothing is left; why trials failed, by their identity.

    After each trial it is asked again what to do next, since learning rates depend on what was found.
    """
    records = files.records()
    broken: dict[str, str] = {}
    under_way: dict[str, Planned] = {}
    ended: SimpleQueue[tuple[str, PrefectFuture]] = SimpleQueue()
    with stoppable(runner, children=running):
        while True:
            known = records | {identity: {"failed": why} for identity, why in broken.items()}
            wanted = [planned for planned in found.pending(known) if planned.trial.identity not in under_way]
            for planned in wanted[: at_once - len(under_way)]:
                identity = planned.trial.identity
                arguments = {"name": planned.name, "trial": planned.trial, "shards": files.shards, "work": files.work}
                future = runner.submit(run_trial, arguments)
                under_way[identity] = planned
                future.add_done_callback(lambda future, identity=identity: ended.put((identity, future)))
            if not under_way:
                return broken
            identity, future = ended.get()
            planned = under_way.pop(identity)
            future.wait()
            outcome = future.state.result(raise_on_failure=False)
            if isinstance(outcome, dict):
                records[identity] = outcome
                files.save(outcome)
                print(shown(planned, outcome, len(records), len(wanted)), flush=True)
            else:
                broken[identity] = f"{planned.name}: {outcome}"
                print(broken[identity], flush=True)
