"""The pipeline as Prefect flows: `pretrain` brings everything up to date, the others one stage and what it needs.

A flow has one task per stage and model, ordered by the table of stages. A task asks DVC to bring its stage up to
date, and is cached where DVC finds that it is. Everything a run needs (the lock, the waiting, the settings) is
taken care of here, so that a Prefect worker may run these flows as well as the command line:

    prefect work-pool create local --type process
    prefect deploy flows/pretrain.py:pretrain --name local --pool local
"""

from __future__ import annotations

import os
import platform
import shutil
import time

from prefect import Flow, State, flow, task
from prefect.futures import PrefectFuture, as_completed
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.cache import VerifiedByDVC
from flows.views import Progress, show_comparison
from flows.watch import claim_run, stop_children_on_error
from stacklm.config.params import load
from stacklm.config.train import Train
from stacklm.pipeline.dvc import reproduce
from stacklm.pipeline.freshness import Pipeline
from stacklm.pipeline.locks import hold_project
from stacklm.pipeline.project import Project
from stacklm.pipeline.stages import STAGES, Stage, instances, stage, upstream


@task(task_run_name="{address}")
def bring_up_to_date(address: str) -> State:
    """Let DVC skip, restore or run one stage. What it makes lies on the disk; nothing is handed on in memory."""
    begin = time.monotonic()
    reproduce(Project.find(), address)
    return Completed(message=f"done in {time.monotonic() - begin:.0f} s")


def run_stages(name: str, wanted: list[Stage]) -> State:
    """Bring the wanted stages up to date, for every model, and say how each one went.

    A stage that fails stops those behind it, and no others. Returns the state for the flow run to end in.
    """
    project = Project.find()
    with hold_project(project, f"flow {name}", wait=True):
        claim_run(project)
        params = load(project.params_file)
        cached = bring_up_to_date.with_options(
            cache_policy=VerifiedByDVC(project=project, pipeline=Pipeline(project)),
            result_storage=project.state / "prefect" / "results",
        )
        futures: dict[tuple[str, str | None], PrefectFuture] = {}
        with ThreadPoolTaskRunner(max_workers=models_at_once(params.train)) as runner, stop_children_on_error():
            for item, model in instances(params.models):
                if item in wanted:
                    needs = [f for (n, m), f in futures.items() if n in upstream(item) and (m is None or model in (None, m))]
                    one = cached.with_options(name=item.name)
                    futures[item.name, model] = runner.submit(one, {"address": item.address(model)}, wait_for=needs)
            progress = Progress(len(futures))
            for future in as_completed(list(futures.values())):
                future.wait()  # without it `state` asks the server, which may not know yet
                progress.advance()
        states = {stage(n).address(m): future.state for (n, m), future in futures.items()}
        failed = [address for address, state in states.items() if state.is_failed() or state.is_crashed()]
        print(summary(states))
        if failed:
            return Failed(message="\n".join(str(states[address].result(raise_on_failure=False)) for address in failed))
        if stage("compare") in wanted:
            show_comparison(project)
        return Completed(message=f"{len(states)} stages up to date")


def summary(states: dict[str, State]) -> str:
    """One line per stage: cached, done in so many seconds, failed, or not run."""
    width = max(map(len, states))
    return "\n".join(f"{address:<{width}}  {_in_words(state)}" for address, state in states.items())


def models_at_once(train: Train) -> int:
    """How many models to train side by side: as many as have a processor for each of their threads, but one on an accelerator."""
    accelerated = bool(shutil.which("nvidia-smi")) or platform.system() == "Darwin"
    if train.device in ("cuda", "mps") or (train.device == "auto" and accelerated):
        return 1
    return max(1, (os.cpu_count() or 1) // (train.threads * train.processes))


def _in_words(state: State) -> str:
    if state.name == "Cached":
        return "cached"
    if state.is_completed():
        return state.message
    return "not run: what it needs failed" if state.is_pending() else "failed"


def _with_upstream(name: str) -> list[Stage]:
    """A stage and everything it needs, in order."""
    names = {name}
    for item in reversed(STAGES):
        if item.name in names:
            names |= upstream(item)
    return [item for item in STAGES if item.name in names]


def _flow(name: str, wanted: list[Stage]) -> Flow:
    @flow(name=name, description="Brings up to date: " + ", ".join(item.name for item in wanted))
    def run() -> State:
        return run_stages(name, wanted)

    return run


FLOWS = {item.name: _flow(item.name, _with_upstream(item.name)) for item in STAGES} | {"pretrain": _flow("pretrain", list(STAGES))}

pretrain, download, tokenizer, shards = FLOWS["pretrain"], FLOWS["download"], FLOWS["tokenizer"], FLOWS["shards"]
audit, evaluate, compare = FLOWS["audit"], FLOWS["evaluate"], FLOWS["compare"]
