"""An experiment from its file to its verdict, as run by a user."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from dataclasses import replace

import psutil
import pytest

from flows.server import Server
from stacklm.code import digest
from stacklm.config.schema import ParamsError, plain
from stacklm.pipeline.lab import Files
from stacklm.pipeline.trials import run_apart
from support import edit, wait_for
from support.checkout import Checkout
from support.lab_records import SWIGLU, TWO_HUNDRED

FAKE = """
import math, os, random, shutil, sys
from pathlib import Path
import flows.lab
from flows.run import run
from stacklm.files import write_json

def fake(trial, shards, work):
    with open("trained.txt", "a") as file:
        print(trial.identity, file=file)
    if os.path.exists("killed") and len(open("trained.txt").readlines()) > 100:
        os._exit(9)
    if trial.train.seed == 2 and trial.model.architecture.ffn == "swiglu" and os.path.exists("broken"):
        raise RuntimeError("out of luck")
    rate, seed = trial.model.optimizer.peak_lr, trial.train.seed
    gain = 0.98 if trial.model.architecture.ffn == "swiglu" else 1
    bits = gain * (2 + 0.004 * random.Random(seed).gauss(0, 1) + 0.01 * math.log2(rate / 0.02) ** 2)
    scores = {"bits_per_byte": bits, "documents": 3}
    record = {"identity": trial.identity, "valid": scores, "test": scores, "seconds": 2.0, "flops": 10**9}
    write_json(work / "trials" / trial.identity / "record.json", record)
    return record

flows.lab.run_apart = fake
"""
COURSE = """
for i in range(3):
    code = run("lab", experiment="one")
    shutil.copytree("experiments/one/records", f"records-{i}")
    print(f"--- {code}, {len(open('trained.txt').readlines())} trained ---", flush=True)
    if i == 0:
        os.remove("broken")
    if i == 1:  # these are cached, by the records that the trials left where they were trained
        for lost in sorted(Path("experiments/one/records").iterdir())[::2]:
            lost.unlink()
"""


@pytest.fixture
def project(checkout: Checkout) -> Checkout:
    (checkout.root / "experiments" / "one.yaml").write_text(SWIGLU)
    return checkout


def records(project: Checkout, folder: str = "experiments/one/records") -> dict[str, dict]:
    files = (project.root / folder).glob("*.json")
    return {path.stem: json.loads(path.read_text()) for path in files}


def test_the_course_of_an_experiment_with_made_up_scores(project):
    """All but training: a failed trial is tried twice and stops no other; the next run trains that one alone; then nothing."""
    (project.root / "broken").touch()
    printed = project.run(sys.executable, "-c", FAKE + COURSE)
    first, first_end, second, second_end, again, end, _ = re.split(r"^--- (.*) ---$", printed, flags=re.MULTILINE)
    *trained, last = (project.root / "trained.txt").read_text().split()
    (failed,) = {identity for identity in trained if trained.count(identity) == 2}
    assert first_end == f"1, {len(trained)} trained"
    assert len({*trained}) == len(trained) - 1 == len(records(project, "records-0")) + 1
    assert "1 trial failed; the same command tries them again" in printed and "out of luck" in first
    assert "not judged yet" in first and ": better" not in first

    assert last == failed and second_end == end == f"0, {len(trained) + 1} trained"
    assert "swiglu: 2.0" in second and ": better" in second

    assert records(project, "records-1") == records(project) and ": better" in again
    assert project.cli("lab", "show", "one") in again.replace("\r", "")
    assert "**swiglu: 2.0" in (project.root / "experiments" / "one" / "report" / "report.md").read_text()
    assert (project.project.state / "tracking" / "lab-one.receipt").exists()  # MLflow has it
    assert "to run now: 0" in project.cli("lab", "status", "one")
    assert "sd over seeds" in project.cli("lab", "plan", "one")


@pytest.mark.slow
def test_two_hundred_trials_that_are_killed_in_between(project):
    """And one of them twice at most: what was under way when the flow was killed is all that is lost."""
    (project.root / "experiments" / "one.yaml").write_text(TWO_HUNDRED)
    run = FAKE + 'sys.exit(run("lab", experiment="one"))'
    (project.root / "killed").touch()
    project.run(sys.executable, "-c", run, code=None)
    killed = records(project)
    assert 90 <= len(killed) < 110
    (project.root / "killed").unlink()

    printed = project.run(sys.executable, "-c", run)
    trained = (project.root / "trained.txt").read_text().split()
    found = records(project)
    assert len(found) == 200 and found.keys() == {*trained}
    assert killed.items() <= found.items() and not [identity for identity in killed if trained.count(identity) > 1]
    assert len(trained) - len({*trained}) <= os.cpu_count()
    assert printed.count("10 seeds") >= 2 and printed.count(": better") == 2
    assert "to run now: 0" in project.cli("lab", "status", "one")


def test_other_code_or_tokens_are_not_mixed_with_the_trials_there(project):
    files = Files(project.project, "one")
    files.begin()
    origin = json.loads(files.origin.read_text())
    assert files.begin().code == files.lab().code  # the same once more
    for other, why in (
        ({**origin, "code": {**origin["code"], "stacklm/train/trainer.py train_step": "0" * 16}}, r"train_step changed"),
        ({**origin, "data": "0" * 64}, "its tokens changed"),
    ):
        files.origin.write_text(json.dumps(other))
        with pytest.raises(ParamsError, match=rf"one: 0 trials were made before .*{why}.* remove experiments/one/ to start over"):
            files.begin()


def test_an_experiment_keeps_the_settings_that_it_began_with(project):
    """Another value in params.yaml hides no record, and begins no trials that must not be compared with those there."""
    before = Files(project.project, "one").begin()
    wanted = [planned.trial.identity for planned in before.pending({})]
    project.set("train.eval_tokens=512", "train.max_grad_norm=0.5")
    after = Files(project.project, "one")
    assert [planned.trial.identity for planned in after.lab().pending({})] == wanted
    with pytest.raises(ParamsError, match=r"before train.max_grad_norm, train.eval_tokens changed"):
        after.begin()


def test_speeds_are_measured_once_so_that_trials_stay_the_same(project):
    edit(project.root / "experiments" / "one.yaml", "budget: parameters", "budget: seconds")
    first = Files(project.project, "one").begin()
    steps = {arm.key: arm.train.max_steps for arm in first.arms}
    assert len({*steps}) == 2 and steps["baseline 1"] == first.settings.max_steps
    again = Files(project.project, "one").begin()
    assert [planned.trial.identity for planned in again.pending({})] == [planned.trial.identity for planned in first.pending({})]


def test_a_trial_is_verified_by_training_it_again(project):
    files = Files(project.project, "one")
    trial = files.begin().pending({})[0].trial
    record = run_apart(trial, files.shards, files.work)
    files.save(record)
    assert "must agree bit for bit" in project.cli("verify", "one", trial.identity[:6])
    files.save({**record, "weights": "0" * 64})
    assert "the record is NOT reproduced" in project.cli("verify", "one", trial.identity, code=1)
    assert not any((files.work / "verify").iterdir())
    assert "no trial with a record begins with 'zz'" in project.cli("verify", "one", "zz", code=2)


def test_an_experiment_goes_on_with_other_code_that_gives_the_same_weights(project):
    files = Files(project.project, "one")
    trials = {planned.arm.key: planned.trial for planned in files.begin().pending({})}
    records = [run_apart(trial, files.shards, files.work) for trial in trials.values()]
    for record in records:
        files.save(record)
    assert "its code has not changed" in project.cli("lab", "accept", "one", "--reason", "none", code=2)
    origin = json.loads(files.origin.read_text())
    before = {**origin, "code": {**origin["code"], "stacklm/train/trainer.py train_step": "0" * 16}}
    files.origin.write_text(json.dumps(before))
    others = [replace(trial, code=digest(before["code"])) for trial in trials.values()]
    as_before = [{**record, **plain(other), "identity": other.identity} for record, other in zip(records, others, strict=True)]
    for record in as_before:  # as they would have been made with that code
        files.save(record)
    with pytest.raises(ParamsError, match="train_step changed"):
        files.begin()
    printed = project.cli("lab", "accept", "one", "--reason", "a comment")
    assert printed.count("the same weights") == len(trials)
    assert files.begin().code == digest(before["code"])  # so the trials there count, and new ones join them
    (note,) = json.loads(files.origin.read_text())["accepted"]
    assert note["reason"] == "a comment" and note["changed"] == 1 and len(note["trials"]) == len(trials)
    assert "its code has not changed" in project.cli("lab", "accept", "one", "--reason", "again", code=2)

    files.origin.write_text(json.dumps(before))
    files.save({**as_before[0], "weights": "0" * 64})
    assert "not accepted" in project.cli("lab", "accept", "one", "--reason", "no", code=2)
    assert "accepted" not in json.loads(files.origin.read_text())


def test_an_experiment_that_cannot_run_is_refused_before_a_server_starts(project):
    assert "no experiment 'two' (experiments/two.yaml)" in project.cli("run-flow", "lab", "two", code=2)
    file = project.root / "experiments" / "one.yaml"
    file.write_text(SWIGLU.replace("judge: [1, 2, 3]", "judge: [1]"))
    assert "at least 3 are needed" in project.cli("run-flow", "lab", "one", code=2)
    file.write_text(SWIGLU.replace("d_ff: 32}", "d_ff: 32, d_f: 1}"))
    assert "did you mean `d_ff`" in project.cli("lab", "plan", "one", code=2)
    assert "only the flow lab takes one" in project.cli("run-flow", "pretrain", "one", code=2)
    assert "only the flow lab takes one" in project.cli("run-flow", "pretrain", "--dask", "local", code=2)


def weights(project: Checkout) -> dict[str, str]:
    """The hash of what each trial has trained."""
    return {identity: record["weights"] for identity, record in records(project).items()}


@pytest.fixture(scope="module")
def undisturbed(finished: Checkout, prefect_server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The weights of the experiment where nothing happens to it."""
    whole = finished.copy(tmp_path_factory.mktemp("lab") / "whole")
    (whole.root / "experiments" / "one.yaml").write_text(SWIGLU)
    assert "verdict" in whole.stacklm("run-flow", "lab", "one", PREFECT_API_URL=prefect_server.url)
    return weights(whole)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="there is no kill -9 on Windows")
def test_a_real_experiment_that_is_killed_ends_in_the_same_records(project, undisturbed):
    running = project.start(sys.executable, "-m", "stacklm", "run-flow", "lab", "one")
    wait_for(lambda: len(records(project)) >= 2, seconds=300)
    children = psutil.Process(running.pid).children(recursive=True)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    project.stacklm("run-flow", "lab", "one")
    assert weights(project) == undisturbed
    assert "Traceback" not in (project.root / "log.txt").read_text()


@pytest.mark.slow
def test_an_experiment_is_a_stage_of_dvc_that_repeats_nothing(project):
    stages = project.root / "experiments" / "dvc.yaml"
    stages.write_text(re.sub(r"(?s)experiment:\s+\[.*?\]", "experiment: [one]", stages.read_text()))
    assert "lab" not in project.repro()  # the main job runs no experiment
    assert "Running stage 'experiments/dvc.yaml:lab@one'" in project.repro("experiments/dvc.yaml:lab@one")
    folder = project.root / "experiments" / "one" / "records"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(before) >= 12 and "verdict" in project.cli("lab", "show", "one")
    assert "didn't change, skipping" in project.repro("experiments/dvc.yaml:lab@one").rpartition("lab@one")[2]

    # a fresh clone has the records, but neither DVC's notes nor work folders
    shutil.rmtree(project.root / ".stacklm" / "lab")
    (project.root / "experiments" / "dvc.lock").unlink()
    assert "bits per byte, " not in project.repro("experiments/dvc.yaml:lab@one")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    edit(project.root / "params.yaml", "max_bytes: 400", "max_bytes: 200")
    assert "its tokens changed" in project.repro("experiments/dvc.yaml:lab@one", code=None)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["local", "address"])
def test_trials_on_two_workers_of_dask_end_in_the_same_records(project, undisturbed, scheduler):
    processes = []
    if scheduler == "address":
        processes = [project.start("dask", "scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", "scheduler.json")]
        wait_for((project.root / "scheduler.json").exists)
        address = json.loads((project.root / "scheduler.json").read_text())["address"]
        worker = ["dask", "worker", address, "--nworkers", "2", "--nthreads", "1", "--no-dashboard"]
        processes.append(project.start(*worker, DASK_DISTRIBUTED__WORKER__DAEMON="False"))
    try:
        printed = project.stacklm("run-flow", "lab", "one", "--dask", address if processes else "local")
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait()
    assert "3 seeds" in printed
    assert weights(project) == undisturbed
