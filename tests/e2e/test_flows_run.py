"""Flows run from the command line: their output and their states in Prefect."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
from pathlib import Path

import psutil
import pytest

from support import ROOT, edit, wait_for
from support.flows_project import EVERYTHING, ask, flow, flow_runs, make_project, ran, start_hanging_flow, task_states


@pytest.fixture(scope="module")
def made(prefect_server, tmp_path_factory):
    """A project after its first flow, whose output is in log.txt. Tests that change it leave it up to date."""
    project = make_project(tmp_path_factory.mktemp("flows") / "made")
    if (os.cpu_count() or 1) > 1:
        project.set("train.device=cpu")
        (project.root / "meet").touch()  # each training waits for the other one to begin
    (project.root / "log.txt").write_text(flow(project, prefect_server))
    return project


def test_everything_runs_once_in_order_and_is_cached_in_the_next_process(made, prefect_server):
    for address in EVERYTHING:
        assert re.search(rf"^{address} +ran in \d+ s$", (made.root / "log.txt").read_text(), re.MULTILINE)
    first = ran(made)
    assert sorted(first) == sorted(EVERYTHING[1:])
    assert first[:3] == EVERYTHING[1:4] and first[-1] == "compare"

    printed = flow(made, prefect_server)
    assert ran(made) == first
    assert len(re.findall(r"^\S+ +up to date$", printed, re.MULTILINE)) == len(EVERYTHING) - 1
    run, again = flow_runs(made, prefect_server)[:2]
    assert task_states(prefect_server, run) == dict.fromkeys(EVERYTHING, "Completed")
    assert task_states(prefect_server, again) == {**dict.fromkeys(EVERYTHING, "Cached"), "inputs": "Completed"}
    assert (again["state_name"], again["state"]["message"]) == ("Completed", "11 stages up to date")
    artifacts = {a["key"]: a for a in ask(prefect_server, "artifacts/filter", flow_runs={"id": {"any_": [again["id"]]}})}
    assert [artifacts["stages"][key] for key in ("type", "data", "description")] == ["progress", 100, "11 of 11 stages"]
    assert artifacts["comparison"]["description"] == "dense is the best"
    assert '"test bits per byte": 1.5' in artifacts["comparison"]["data"]
    assert artifacts["report"]["data"] == "# Report\n\nThe end.\n"


@pytest.fixture(scope="module")
def failed(made, prefect_server, tmp_path_factory):
    """A copy, after a flow that found two outputs damaged and in which a training failed. Its output is in log.txt."""
    project = made.copy(tmp_path_factory.mktemp("flows") / "failed")
    damaged, changed = (project.root / "out" / name / "report.md" for name in ("tokenizer", "shards"))
    damaged.unlink()
    changed.unlink()  # it may be a link to DVC's own copy
    changed.write_bytes(b"changed")
    edit(project.root / "dvc.yaml", "work.py pretrain", "work.py  pretrain")  # so that both run again
    (project.root / "fail").write_text("pretrain@stacked-1")
    (project.root / "log.txt").write_text(flow(project, prefect_server, code=1))
    return project


def test_a_damaged_output_is_never_served_from_the_cache(failed, made, prefect_server):
    for name in ("tokenizer", "shards"):
        path = Path("out", name, "report.md")
        assert (failed.root / path).read_bytes() == (made.root / path).read_bytes()
    assert ran(failed) == [*ran(made), "pretrain@dense-1"]  # DVC kept copies of what was damaged
    states = task_states(prefect_server, flow_runs(failed, prefect_server)[-1])
    assert [states[name] for name in EVERYTHING[1:5]] == ["Cached", "Completed", "Completed", "Cached"]


def test_a_failure_stops_only_what_needs_it_and_is_told_in_the_words_of_the_stage(failed, prefect_server):
    printed = (failed.root / "log.txt").read_text()
    assert "pretrain@stacked-1 found a loss that is not finite" in printed
    assert "stacklm: pretrain@stacked-1: " in printed
    assert "compare             not run: pretrain@stacked-1 failed" in printed
    assert "Traceback" not in printed
    run = flow_runs(failed, prefect_server)[-1]
    states = task_states(prefect_server, run)
    assert run["state_name"] == "Failed"
    assert [states[address] for address in EVERYTHING[6:]] == ["Failed", "Completed", "NotReady", "Cached", "NotReady"]


def test_a_flow_says_what_runs_and_logs_what_stages_print(made, prefect_server):
    assert (made.root / "log.txt").read_text().count("pretrain@dense-1 at work") == 1
    run = flow_runs(made, prefect_server)[0]
    assert run["name"].startswith("pretrain stacked dense · ") and run["tags"] == ["dense", "pretrain", "stacked", "stacklm"]
    of_this = {"flow_runs": {"id": {"any_": [run["id"]]}}}
    tasks = {task["id"]: task for task in ask(prefect_server, "task_runs/filter", **of_this)}
    assert not any(task["tags"] for task in tasks.values()), "each set of them costs a question to the server, or seconds"

    def lines() -> list[tuple[str, str]]:
        logs = ask(prefect_server, "logs/filter", logs={"flow_run_id": {"any_": [run["id"]]}}, limit=200)
        return [(tasks[log["task_run_id"]]["name"], log["message"]) for log in logs if log["task_run_id"]]

    wait_for(lambda: ("compare", "compare at work") in lines())
    assert lines().count(("pretrain@dense-1", "pretrain@dense-1 at work")) == 1
    assert not [message for _, message in lines() if "%|" in message]
    artifacts = {a["key"]: a for a in ask(prefect_server, "artifacts/filter", **of_this)}
    shown = artifacts["pretrain-dense-1"]
    assert (shown["type"], shown["data"], shown["description"]) == ("progress", 50, "pretrain@dense-1: step 6 of 12")
    assert tasks[shown["task_run_id"]]["name"] == "pretrain@dense-1"


@pytest.mark.slow
def test_a_worker_runs_what_prefect_yaml_deploys(prefect_server, prefect_home, tmp_path):
    """With its parameters, and in the project that it was deployed from."""
    project = make_project(tmp_path / "project")
    for name in ("prefect.yaml", "flows"):
        (project.root / name).symlink_to(ROOT / name)

    def prefect(*words: str) -> str:
        return project.run("prefect", *words, PREFECT_API_URL=prefect_server.url, PREFECT_HOME=str(prefect_home))

    prefect("work-pool", "create", "local", "--type", "process")
    prefect("--no-prompt", "deploy", "--all")
    deployed = {d["entrypoint"].partition(":")[2] for d in ask(prefect_server, "deployments/filter")}
    assert deployed == {"pretrain", "download", "tokenizer", "shards", "audit", "evaluate", "compare"}
    prefect("deployment", "run", "pretrain/local", "--param", "stage=audit", "--param", 'models=["dense"]')
    prefect("worker", "start", "--pool", "local", "--run-once")
    assert ran(project) == ["download", "tokenizer", "shards", "audit@dense"]


def test_settings_that_change_while_a_flow_runs_are_refused(prefect_server, tmp_path):
    """DVC reads them again for every stage; undone, the same command goes on."""
    project, running = start_hanging_flow(tmp_path / "project", "tokenizer", PREFECT_API_URL=prefect_server.url)
    edit(project.root / "params.yaml", "steps: 12", "steps: 13")
    (project.root / "hang").unlink()
    assert running.wait(timeout=120) == 1
    assert "the settings changed while this run used them (train.max_steps: 12 -> 13)" in (project.root / "log.txt").read_text()
    with pytest.raises(FileNotFoundError):
        (project.root / "out/documents").stat()


def test_a_server_of_the_user_that_does_not_answer_is_named(made):
    printed = made.stacklm("run-flow", "tokenizer", PREFECT_API_URL="http://127.0.0.1:9/api", code=1)
    assert "stacklm: Failed to reach API at http://127.0.0.1:9/api" in printed
    assert "Traceback" not in printed


def test_without_a_server_of_the_user_the_history_is_kept_in_the_project(made):
    made.stacklm("run-flow", "tokenizer", PREFECT_PROFILES_PATH=os.devnull)
    with sqlite3.connect(made.root / ".stacklm" / "prefect" / "prefect.db") as database:
        assert database.execute("select state_name from flow_run").fetchall() == [("Completed",)]
        states = dict(database.execute("select name, state_name from task_run").fetchall())
    assert states == {"inputs": "Completed", "download": "Cached", "tokenizer": "Cached"}


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="there is no kill -9 on Windows")
def test_the_run_of_a_killed_flow_is_marked_as_crashed_by_the_next(prefect_server, tmp_path):
    project, killed = start_hanging_flow(tmp_path / "project", PREFECT_API_URL=prefect_server.url)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert flow_runs(project, prefect_server)[-1]["state_name"] == "Running"
    (project.root / "hang").unlink()
    flow(project, prefect_server, "tokenizer")
    crashed, completed = flow_runs(project, prefect_server)
    assert (crashed["state_name"], completed["state_name"]) == ("Crashed", "Completed")
    assert task_states(prefect_server, crashed)["inputs"] == "Crashed"


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])
def test_ctrl_c_ends_the_flow_and_its_children(shell, prefect_server, tmp_path):
    """Whether the shell that DVC starts for a stage stays between the two (dash) or becomes the stage (bash)."""
    project, running = start_hanging_flow(tmp_path / "project", PREFECT_API_URL=prefect_server.url, SHELL=shell)
    os.kill(running.pid, signal.SIGINT)
    assert running.wait(timeout=120) == 130
    assert "interrupted" in (project.root / "log.txt").read_text()
    assert flow_runs(project, prefect_server)[-1]["state_name"] == "Crashed"
    with pytest.raises(FileNotFoundError):
        ran(project)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_a_flow_in_the_background_is_not_for_ctrl_c(prefect_server, tmp_path):
    """As a shell starts it there: with SIGINT ignored. SIGTERM ends it as it ends any flow."""
    ignoring = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]
    project, running = start_hanging_flow(tmp_path / "project", launcher=ignoring, PREFECT_API_URL=prefect_server.url)
    os.kill(running.pid, signal.SIGINT)
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait(timeout=120) == -signal.SIGTERM
    assert "interrupted" not in (project.root / "log.txt").read_text()
    assert flow_runs(project, prefect_server)[-1]["state_name"] == "Crashed"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="there is no kill -9 on Windows")
def test_the_death_of_the_server_ends_the_flow_with_one_line_and_leaves_nobody(tmp_path):
    project, running = start_hanging_flow(tmp_path / "project", PREFECT_PROFILES_PATH=os.devnull)
    children = psutil.Process(running.pid).children(recursive=True)
    (server,) = (child for child in children if any(word.endswith("server.py") for word in child.cmdline()))
    server.kill()
    assert running.wait(timeout=60) == 1
    assert not psutil.wait_procs(children, timeout=60)[1]
    log = (project.root / "log.txt").read_text()
    assert log.count("stacklm: Prefect's server died") == 1 and "Traceback" not in log
