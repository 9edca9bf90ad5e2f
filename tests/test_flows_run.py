"""Flows from the command line, as Prefect and the user see them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3

import pytest
from flows_project import EVERYTHING, ask, flow, flow_runs, make_project, ran, start_flow, task_states, wait_for


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project after its first `dvc repro`. Tests may change it, as long as they leave it up to date."""
    project = make_project(tmp_path_factory.mktemp("flows") / "made")
    project.repro()
    return project


def test_everything_runs_once_in_order_and_is_cached_in_the_next_process(prefect_server, tmp_path):
    project = make_project(tmp_path / "project")
    printed = flow(project, prefect_server)
    for address in EVERYTHING:
        assert re.search(rf"^{address} +done in \d+ s$", printed, re.MULTILINE)
    first = ran(project)
    assert sorted(first) == sorted(EVERYTHING[1:])
    assert first[:3] == EVERYTHING[1:4] and first[-1] == "compare"

    printed = flow(project, prefect_server)
    assert ran(project) == first
    assert len(re.findall(r"^\S+ +cached$", printed, re.MULTILINE)) == len(EVERYTHING) - 1
    made, cached = (task_states(prefect_server, run) for run in flow_runs(project, prefect_server))
    assert made == dict.fromkeys(EVERYTHING, "Completed")
    assert cached == {**dict.fromkeys(EVERYTHING, "Cached"), "inputs": "Completed"}


def test_what_dvc_repro_has_made_is_cached_for_the_flow(made, prefect_server):
    shutil.rmtree(made.root / ".stacklm" / "prefect", ignore_errors=True)
    assert "compare           cached" in flow(made, prefect_server)


def test_a_damaged_output_is_never_served_from_the_cache(made, prefect_server):
    flow(made, prefect_server)  # now Prefect has a record of every stage
    deleted, changed = (made.root / "out" / name / "report.md" for name in ("tokenizer", "shards"))
    whole, before = deleted.read_bytes(), ran(made)
    deleted.unlink()
    changed.unlink()  # it may be a link to DVC's own copy
    changed.write_bytes(b"changed")
    flow(made, prefect_server)
    assert deleted.read_bytes() == changed.read_bytes() == whole
    assert ran(made) == before  # DVC kept copies
    states = task_states(prefect_server, flow_runs(made, prefect_server)[-1])
    assert [states[name] for name in EVERYTHING[1:5]] == ["Cached", "Completed", "Completed", "Cached"]


def test_a_failure_stops_only_what_needs_it_and_is_told_in_the_words_of_the_stage(prefect_server, tmp_path):
    project = make_project(tmp_path / "project")
    (project.root / "fail").write_text("pretrain@stacked")
    with pytest.raises(AssertionError) as error:
        flow(project, prefect_server)
    printed = str(error.value)
    assert "pretrain@stacked found a loss that is not finite" in printed
    assert "stacklm: pretrain@stacked: " in printed
    assert "compare           not run" in printed
    assert "Traceback" not in printed
    run = flow_runs(project, prefect_server)[-1]
    states = task_states(prefect_server, run)
    assert run["state_name"] == "Failed"
    assert [states[a] for a in EVERYTHING[6:]] == ["Failed", "Completed", "NotReady", "Completed", "NotReady"]


def test_a_flow_shows_its_progress_and_the_comparison(made, prefect_server):
    flow(made, prefect_server)
    run = flow_runs(made, prefect_server)[-1]
    assert (run["state_name"], run["state"]["message"]) == ("Completed", "11 stages up to date")
    artifacts = {a["key"]: a for a in ask(prefect_server, "artifacts/filter", flow_runs={"id": {"any_": [run["id"]]}})}
    assert [artifacts["stages"][key] for key in ("type", "data", "description")] == ["progress", 100, "11 of 11 stages"]
    assert artifacts["comparison"]["description"] == "dense is the best"
    assert '"test bits per byte": 1.5' in artifacts["comparison"]["data"]
    assert artifacts["report"]["data"] == "# Report\n\nThe end.\n"


def test_the_models_train_side_by_side(prefect_server, tmp_path):
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs two processors")
    project = make_project(tmp_path / "project")
    (project.root / "meet").touch()  # each training waits for the other one to begin
    project.set("train.device=cpu")
    flow(project, prefect_server)
    assert ran(project)[-1] == "compare"


def test_a_stage_flow_runs_that_stage_and_what_it_needs(prefect_server, tmp_path):
    project = make_project(tmp_path / "project")
    flow(project, prefect_server, "tokenizer")
    assert ran(project) == ["download", "tokenizer"]


def test_an_unknown_flow_is_refused_with_the_known_names(made, prefect_server):
    printed = flow(made, prefect_server, "pretrian", check=False)
    assert "no flow 'pretrian'; the flows are audit, compare, download, " in printed


def test_a_server_of_the_user_that_does_not_answer_is_named(made):
    printed = made.stacklm("run-flow", "tokenizer", PREFECT_API_URL="http://127.0.0.1:9/api", check=False)
    assert "stacklm: Failed to reach API at http://127.0.0.1:9/api" in printed
    assert "Traceback" not in printed


def test_without_a_server_of_the_user_the_history_is_kept_in_the_project(made):
    made.stacklm("run-flow", "tokenizer", PREFECT_PROFILES_PATH=os.devnull)
    with sqlite3.connect(made.root / ".stacklm" / "prefect" / "prefect.db") as database:
        assert database.execute("select state_name from flow_run").fetchall() == [("Completed",)]
        states = dict(database.execute("select name, state_name from task_run").fetchall())
    assert states == {"inputs": "Completed", "download": "Cached", "tokenizer": "Cached"}


@pytest.mark.skipif(os.name == "nt", reason="there is no kill -9 on Windows")
def test_the_run_of_a_killed_flow_is_marked_as_crashed_by_the_next(prefect_server, tmp_path):
    project = make_project(tmp_path / "project")
    (project.root / "hang").touch()
    killed = start_flow(project, prefect_server)
    wait_for((project.root / "began-inputs").exists)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert flow_runs(project, prefect_server)[-1]["state_name"] == "Running"
    (project.root / "hang").unlink()
    flow(project, prefect_server, "tokenizer")
    crashed, completed = flow_runs(project, prefect_server)
    assert (crashed["state_name"], completed["state_name"]) == ("Crashed", "Completed")
    assert task_states(prefect_server, crashed)["inputs"] == "Crashed"


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_ctrl_c_ends_the_flow_and_its_children(prefect_server, tmp_path):
    project = make_project(tmp_path / "project")
    (project.root / "hang").touch()
    running = start_flow(project, prefect_server)
    wait_for((project.root / "began-inputs").exists)
    os.kill(running.pid, signal.SIGINT)
    assert running.wait(timeout=30) == 130
    assert "interrupted" in (project.root / "log.txt").read_text()
    assert flow_runs(project, prefect_server)[-1]["state_name"] == "Crashed"
    with pytest.raises(FileNotFoundError):
        ran(project)
