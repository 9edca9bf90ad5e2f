"""A run of the pipeline is a parent run in MLflow, with the models that it trained as children."""

from __future__ import annotations

import getpass
import json
import subprocess
import sys

import pytest

from stacklm.pipeline.tracking.mirror import Mirror
from stacklm.pipeline.tracking.run import Pretraining
from stacklm.pipeline.tracking.sync import sync_all
from support.tracking_project import (
    all_runs,
    client,
    pretraining,
    publish_evaluation,
    publish_model,
    record,
    runs,
    timing,
    write_rows,
)

STAGES = """
import json, os, subprocess, sys
code = "import json; from stacklm.pipeline.tracking.run import pipeline_run; print(json.dumps(pipeline_run()))"
for extra in json.loads(sys.argv[1]):
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **extra}, check=True)
"""


@pytest.fixture
def dvc(tmp_path):
    """What stages learn that are started one after the other by a process called dvc, with these variables."""
    script = tmp_path / "dvc"
    script.write_text(STAGES)

    def stages(*extra: dict[str, str]) -> list[dict]:
        done = subprocess.run([sys.executable, script, json.dumps(extra)], capture_output=True, text=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    return stages


def test_stages_of_one_dvc_process_or_flow_belong_together(dvc):
    exp = {"DVC_EXP_NAME": "fat-newt", "DVC_EXP_BASELINE_REV": "abc"}
    flow = {"STACKLM_FLOW_RUN": "pretrain amber-fox", "STACKLM_FLOW_RUN_ID": "7"}
    first, second, named, in_flow = dvc({}, {}, exp, flow)
    other, same_flow = dvc({}, flow)
    assert first == second and first["name"].startswith("dvc repro · 20")
    assert (named["name"], named["tags"]) == (
        "dvc exp run · fat-newt",
        {"dvc.experiment": "fat-newt", "dvc.experiment.baseline": "abc"},
    )
    assert in_flow["name"] == "stacklm run-flow · pretrain amber-fox"
    assert in_flow["identity"] == same_flow["identity"]
    assert len({first["identity"], named["identity"], in_flow["identity"], other["identity"]}) == 4


def begin(project, monkeypatch, model: str, identity: str, seed: int = 1, **tags: str) -> Pretraining:
    """A training of `model` begins in the pipeline run of that identity."""
    pipeline = {"identity": identity, "name": f"dvc repro · {identity}", "command": "dvc repro", "started": 100.0, "tags": tags}
    monkeypatch.setattr("stacklm.pipeline.tracking.run.pipeline_run", lambda: pipeline)
    work = project.state / "work" / model
    write_rows(work / "timing.jsonl", timing(20))
    noted = record(project, model, seed)
    run = Pretraining.growing(project, pretraining(model, seed), noted["fingerprint"], work)
    run.begin(noted)
    return run


def parents(project) -> list:
    return [run for run in all_runs(project) if "stacklm.pipeline_run" in run.data.tags]


def families(project) -> dict[str, tuple[str, list[str]]]:
    """Name of each parent: its status and its children's models."""
    found = {}
    for parent in parents(project):
        children = [run for run in runs(project) if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        found[parent.info.run_name] = parent.info.status, sorted(child.data.tags["model"] for child in children)
    return found


def test_models_of_one_pipeline_run_are_children_of_one_parent_whose_status_follows_theirs(project, monkeypatch):
    stacked = Mirror(begin(project, monkeypatch, "stacked", "a"))
    assert families(project) == {"dvc repro · a": ("RUNNING", ["stacked"])}
    stacked.end("FINISHED")
    assert families(project) == {"dvc repro · a": ("FINISHED", ["stacked"])}
    dense = Mirror(begin(project, monkeypatch, "dense", "a"))
    assert families(project) == {"dvc repro · a": ("RUNNING", ["dense", "stacked"])}
    dense.end("KILLED")
    assert families(project) == {"dvc repro · a": ("KILLED", ["dense", "stacked"])}
    again = Mirror(begin(project, monkeypatch, "dense", "b"))  # resumed by another run of the pipeline
    again.grow()
    assert families(project) == {"dvc repro · a": ("RUNNING", ["dense", "stacked"])}
    again.end("FINISHED")
    (parent,) = parents(project)
    assert parent.info.status == "FINISHED"
    assert parent.info.end_time == max(run.info.end_time for run in runs(project))
    assert parent.data.tags["mlflow.user"] == runs(project)[0].data.tags["mlflow.user"] == getpass.getuser()


def test_the_name_of_a_dvc_experiment_is_in_the_run_and_its_parent(project, monkeypatch):
    Mirror(begin(project, monkeypatch, "stacked", "x", **{"dvc.experiment": "fat-newt"}))
    (run,) = runs(project)
    assert run.info.run_name.startswith("stacked-1 · ") and run.info.run_name.endswith(" · fat-newt")
    assert all(found.data.tags["dvc.experiment"] == "fat-newt" for found in all_runs(project))


def test_a_parent_shows_the_mean_over_the_seeds_of_a_model(project, monkeypatch):
    for seed, loss in ((1, 1.5), (2, 1.7)):
        begin(project, monkeypatch, "stacked", "a", seed)
        publish_model(project, "stacked", seed=seed)
        publish_evaluation(project, "stacked", loss, seed)
    assert sync_all(project)
    (parent,) = parents(project)
    scores = {run.data.tags["seed"]: run.data.metrics["bits_per_byte/test"] for run in runs(project)}
    assert sorted(scores) == ["1", "2"]
    assert parent.data.metrics == {"bits_per_byte_test/stacked": pytest.approx((scores["1"] + scores["2"]) / 2)}


def test_a_deleted_parent_and_results_from_elsewhere_are_no_obstacle(project, monkeypatch):
    publish_model(project, "dense")  # as pulled by DVC: nobody here saw it begin
    begin(project, monkeypatch, "stacked", "a")
    publish_model(project, "stacked")
    publish_evaluation(project, "stacked")
    assert sync_all(project)
    (parent,) = parents(project)
    assert {run.data.tags["model"]: run.data.tags.get("mlflow.parentRunId") for run in runs(project)} == {
        "dense": None,
        "stacked": parent.info.run_id,
    }
    test = next(run for run in runs(project) if run.data.tags["model"] == "stacked").data.metrics["bits_per_byte/test"]
    assert parent.data.metrics == {"bits_per_byte_test/stacked": test}
    client(project).delete_run(parent.info.run_id)
    Mirror(next(run for run in Pretraining.finished(project) if run.item.model == "stacked")).end("FINISHED")
