"""An experiment of the lab in MLflow, read with its client."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from stacklm.files import write_json, write_text
from stacklm.lab.schedule import Lab
from stacklm.pipeline.lab import Files
from stacklm.pipeline.project import Project
from stacklm.pipeline.tracking import lab as tracking
from stacklm.pipeline.tracking.store import connect
from stacklm.pipeline.tracking.sync import sync_all
from support.checkout import write_project
from support.lab_records import FILE, course, recorded

ONE = FILE.replace("[1, 2, 3, 4, 5, 6, 7, 8]", "[1, 2, 3]").replace("[101, 102]", "[101]").replace("sizes: [1, 2]", "rates: 3")
ONE = "\n".join(line for line in ONE.splitlines() if "equal:" not in line and "worse:" not in line)
"""Two arms are enough: a run takes MLflow some hundredths of a second."""


@pytest.fixture
def files(project: Project) -> Files:
    """An experiment of one size that has begun."""
    write_project(project.root, one=ONE)
    files = Files(project, "one")
    write_json(files.origin, {"data": files.present()["data"], "code": {"here": "c0de"}})
    return files


def whole(lab: Lab) -> Mapping[str, dict]:
    return course(lab, record=recorded)[0]


def save(files: Files, records: Mapping[str, dict]) -> None:
    for identity, record in records.items():
        files.save({**record, "identity": identity})


def runs(project: Project, name: str = "lab/one") -> tuple[dict, dict]:
    """Summaries by arm, and trials by identity."""
    client, experiment = connect(project, name)
    found = list(client.search_runs([experiment], max_results=1000))
    parents = {run.data.tags[tracking.KEY]: run for run in found if "mlflow.parentRunId" not in run.data.tags}
    return parents, {run.data.tags[tracking.KEY].split()[1]: run for run in found if "mlflow.parentRunId" in run.data.tags}


def test_a_summary_of_each_arm_has_the_interval_and_the_verdict_with_its_trials_below(project, files):
    records = whole(files.lab())
    save(files, records)
    assert sync_all(project, experiments=["another"]) and runs(project) == ({}, {})
    assert sync_all(project)
    summaries, trials = runs(project)
    assert {*summaries} == {"baseline", "better"} and trials.keys() == records.keys()
    verdict = files.findings().results[1.0].verdicts["better"]
    run = summaries["better"]
    assert run.info.run_name == "better · better" and run.data.tags["verdict"] == "better" and run.info.status == "FINISHED"
    ends = {"mean": verdict.mean, "low": verdict.low, "high": verdict.high, "margin": 0.005}
    for end, value in ends.items():
        assert run.data.metrics[end] == pytest.approx(100 * value)
    assert run.data.metrics["n"] == 3 and run.data.params["architecture.ffn"] == "swiglu"
    assert summaries["baseline"].data.params["architecture.ffn"] == "relu2"
    assert "mean" not in summaries["baseline"].data.metrics
    client, _ = connect(project)
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"intervals.svg", "report"}
    assert [file.path for file in client.list_artifacts(run.info.run_id, "report")] == ["report/index.html"]
    assert {used.tags[0].value for used in run.inputs.dataset_inputs} == {"training", "validation", "test"}
    assert run.inputs.dataset_inputs[0].dataset.name == "stdlib-train"
    for identity, trial in trials.items():
        arm = next(one for one in summaries.values() if one.info.run_id == trial.data.tags["mlflow.parentRunId"])
        assert trial.info.run_name.startswith(arm.data.tags[tracking.KEY])
        assert trial.data.metrics["bits_per_byte/test"] == records[identity]["test"]["bits_per_byte"]
        assert trial.info.end_time - trial.info.start_time == pytest.approx(1000 * records[identity]["seconds"], abs=1)


def test_again_changes_nothing_and_more_seeds_update_what_is_there(project, files, monkeypatch):
    records = whole(files.lab())
    last = {one.trial.identity for one in files.lab().trials(records) if one.trial.train.seed == 3}
    save(files, {identity: record for identity, record in records.items() if identity not in last})
    assert sync_all(project)
    before, _ = runs(project)
    assert before["better"].info.run_name == "better" and before["better"].info.status == "RUNNING"

    save(files, records)
    assert sync_all(project)
    after, trials = runs(project)
    assert after["better"].info.run_id == before["better"].info.run_id and after["better"].info.run_name == "better · better"
    assert after["better"].info.status == "FINISHED" and trials.keys() == records.keys()

    tracking.sync_lab(project, "one")
    again, same = runs(project)
    for one, other in ((after, again), (trials, same)):
        assert {key: run.to_dictionary() for key, run in one.items()} == {key: run.to_dictionary() for key, run in other.items()}
    client, _ = connect(project)
    assert len(client.get_metric_history(after["better"].info.run_id, "mean")) == 1
    monkeypatch.setattr(tracking, "sync_lab", None)
    assert sync_all(project)  # by the receipt alone


def test_sizes_are_steps_and_a_trial_that_failed_is_shown_as_such(project, files):
    write_text(files.file, ONE.replace("rates: 3", "rates: 3\nsizes: [1, 2]"))
    files = Files(project, "one")
    lab = files.lab()
    records = dict(whole(lab))
    broken = next(one.trial.identity for one in lab.trials(records) if one.purpose == "tune")
    records[broken] = {"identity": broken, "failed": "diverged: NaN"}
    save(files, records)
    assert sync_all(project)
    summaries, trials = runs(project)
    tracking.sync_lab(project, "one")
    assert runs(project)[1][broken].to_dictionary() == trials[broken].to_dictionary()  # though nothing says when it was
    assert trials[broken].info.status == "FAILED" and trials[broken].data.tags["failed"] == "diverged: NaN"
    client, _ = connect(project)
    history = client.get_metric_history(summaries["better"].info.run_id, "model/parameters")
    assert [metric.step for metric in history] == [metric.value for metric in history]
    assert len({*(metric.step for metric in history)}) == len(files.findings().results) > 0


def test_other_tokens_than_those_of_the_trials_are_named_by_their_hash_alone(project, files):
    write_json(files.origin, {"data": "ab" * 32, "code": {"here": "c0de"}})
    save(files, whole(files.lab()))
    assert sync_all(project)
    (name,) = {used.dataset.name for used in runs(project)[0]["better"].inputs.dataset_inputs}
    assert name == "tokens"
