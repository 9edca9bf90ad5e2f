"""The pipeline as Prefect flows: `pretrain` brings everything up to date, each other flow one stage and its upstream stages.

A flow has one task per stage and model, in the order of the stage definitions. A task asks DVC to bring its stage up to
date, and is cached if it already is. Flows take the project's lock and check the settings themselves, so that a Prefect
worker can run them as well as the command line:

    prefect work-pool create local --type process
    prefect deploy --all
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

from prefect import Flow, State, flow, task
from prefect.futures import PrefectFuture, as_completed
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.cache import verified_by_dvc
from flows.views import Progress, forward, link_trainings, name_run, show_comparison, training_shown
from flows.watch import claim_run, stoppable
from stacklm.config.params import Params, load
from stacklm.config.schema import ParamsError, listed, nearest
from stacklm.console import table
from stacklm.pipeline.dvc import reproduce
from stacklm.pipeline.freshness import Pipeline
from stacklm.pipeline.locks import check_settings, hold_project
from stacklm.pipeline.project import Project, trainings_at_once
from stacklm.pipeline.stages import STAGES, Instance, Stage, inputs_of, instances, upstream

NAMES = tuple(item.name for item in STAGES)


@task(task_run_name="{address}")
def bring_up_to_date(address: str) -> State:
    """Let DVC skip, restore or run one stage. Its outputs are files; nothing is passed on in memory."""
    begin = time.monotonic()
    project = Project.find()
    check_settings(project)
    with training_shown(project, address):
        outcome = reproduce(project, address, show=forward)
    check_settings(project)
    return Completed(message=f"ran in {time.monotonic() - begin:.0f} s" if outcome == "ran" else outcome)


def run_stages(name: str, wanted: list[Stage], models: Sequence[str] | None = None) -> State:
    """Bring the wanted stages up to date, for the named models or all, and print the outcome of each.

    A stage that needs every model, such as `compare`, is skipped if only some are named. A failed stage stops the stages
    downstream of it, and no others. Returns the final state of the flow run.
    """
    project = Project.find()
    with hold_project(project, f"flow {name}", wait=True):
        claim_run(project)
        try:
            params = load(project.params_file)
            chosen = selection(wanted, params, models)
        except ParamsError as error:
            return Failed(message=str(error))
        name_run(name, chosen)
        cached = bring_up_to_date.with_options(
            cache_key_fn=verified_by_dvc(project, Pipeline(project)),
            result_storage=project.state / "prefect" / "results",
        )
        futures: dict[str, PrefectFuture] = {}
        runner = ThreadPoolTaskRunner(max_workers=trainings_at_once(params.train))
        with stoppable(runner):
            for item in chosen:
                needs = [futures[one.address] for one in inputs_of(item, params)]
                # No tags: for each set of tags Prefect asks the server for a concurrency limit, which takes seconds if it is busy.
                one = cached.with_options(name=item.stage.name)
                futures[item.address] = runner.submit(one, {"address": item.address}, wait_for=needs)
            progress = Progress(len(futures))
            for future in as_completed(list(futures.values())):
                future.wait()  # otherwise `state` asks the server, which may not know it yet
                progress.advance()
        states = {address: future.state for address, future in futures.items()}
        failed = [address for address, state in states.items() if _failed(state)]
        link_trainings(project, [item for item in chosen if item.stage.name == "pretrain"])
        print(summary(states, params))
        for item in wanted:
            if item not in {one.stage for one in chosen}:
                print(f"{item.name}: skipped, since it needs every model")
        if failed:
            errors = [str(states[address].result(raise_on_failure=False)) for address in failed]
            return Failed(message="\n".join(dict.fromkeys(errors)))
        try:
            check_settings(project)  # DVC may have found a stage up to date under other settings
        except ParamsError as error:
            return Failed(message=str(error))
        if "compare" in futures:
            show_comparison(project)
        return Completed(message=f"{len(states)} stages up to date")


def selection(wanted: list[Stage], params: Params, models: Sequence[str] | None) -> list[Instance]:
    """Return the wanted stages for the named models or all, without those that read outputs of models not named.

    Raises `ParamsError` for a model that is not in params.yaml.
    """
    for name in models or ():
        if name not in params.models:
            raise ParamsError(f"no model {name!r}; the models are {listed(params.models)}{nearest(name, params.models)}")
    names = list(params.models) if models is None else models
    picked = [item for item in instances(params) if item.stage in wanted and item.model in (None, *names)]
    return [item for item in picked if {*inputs_of(item, params)} <= {*picked}]


def summary(states: dict[str, State], params: Params) -> str:
    """Return one line per stage: up to date, restored, ran with its seconds, failed, or not run with the stages that failed."""
    failed = {address for address, state in states.items() if _failed(state)}
    lines = {address: _in_words(state) for address, state in states.items()}
    for item in instances(params):
        if item.address in states and states[item.address].is_pending():
            lines[item.address] = f"not run: {', '.join(sorted(_all_upstream(item, params) & failed))} failed"
    return table(["", ""], lines.items(), left=2)


def _in_words(state: State) -> str:
    if state.name == "Cached":
        return "up to date"
    return state.message or "done" if state.is_completed() else "failed"


def _failed(state: State) -> bool:
    return state.is_failed() or state.is_crashed()


def _all_upstream(item: Instance, params: Params) -> set[str]:
    """Return the addresses of all stage instances upstream of `item`, directly or not."""
    direct = list(inputs_of(item, params))
    return {one.address for one in direct}.union(*(_all_upstream(one, params) for one in direct))


def with_upstream(name: str) -> list[Stage]:
    """Return a stage and all stages upstream of it, in order."""
    names = {name}
    for item in reversed(STAGES):
        if item.name in names:
            names |= upstream(item)
    return [item for item in STAGES if item.name in names]


def _flow(name: str) -> Flow:
    wanted = with_upstream(name)

    @flow(name=name, description="Brings up to date: " + ", ".join(item.name for item in wanted))
    def run(models: list[str] | None = None) -> State:
        return run_stages(name, wanted, models)

    return run


@flow(name="pretrain", description="Brings up to date: " + ", ".join(item.name for item in STAGES))
def pretrain(
    stage: Literal[*NAMES] = NAMES[-1],  # pyright: ignore[reportInvalidTypeForm] (Prefect reads the names at run time)
    models: list[str] | None = None,
) -> State:
    """Run all stages, or only those up to `stage` and for the named `models`. Settings are in params.yaml."""
    return run_stages("pretrain", with_upstream(stage), models)


FLOWS = {"pretrain": pretrain} | {item.name: _flow(item.name) for item in STAGES if item.name != "pretrain"}

download, tokenizer, shards = FLOWS["download"], FLOWS["tokenizer"], FLOWS["shards"]
audit, evaluate, compare = FLOWS["audit"], FLOWS["evaluate"], FLOWS["compare"]
