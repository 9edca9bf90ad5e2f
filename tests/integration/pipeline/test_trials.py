"""Trials in separate processes, and how they end."""

from __future__ import annotations

import math
import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from stacklm.config.optimizer import AdamW
from stacklm.files import read_json, sha256
from stacklm.lab.trial import Trial, run_trial
from stacklm.pipeline import trials
from stacklm.pipeline.lab import Files
from stacklm.pipeline.trials import run_apart, run_here, run_trials
from support.checkout import write_project
from support.lab_records import TWO_HUNDRED
from support.train_files import MODELS, TRAIN, write_text


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("trials") / "shards")


@pytest.fixture
def trial(shards: Path) -> Trial:
    return Trial(MODELS["dense"], replace(TRAIN, max_steps=10), data=sha256(shards / "manifest.json"), code="c")


def test_a_trial_apart_gives_the_same_bits_as_one_in_this_process(shards, trial, tmp_path):
    apart, here = run_apart(trial, shards, tmp_path / "apart"), run_trial(trial, shards, tmp_path / "here")
    assert {**apart, "seconds": 0, "began": ""} == {**here, "seconds": 0, "began": ""}
    assert "pretrain dense" in (tmp_path / "apart" / "trials" / trial.identity / "log.txt").read_text()
    assert trials.running() == []


def test_a_trial_that_diverges_has_a_record(shards, trial, tmp_path):
    wild = replace(trial, model=replace(trial.model, optimizer=AdamW(peak_lr=100, weight_decay=0)))
    wild = replace(wild, train=replace(wild.train, max_steps=200, max_grad_norm=None, warmup_steps=0, precision="bf16"))
    record = run_apart(wild, shards, tmp_path)
    if "failed" not in record:
        pytest.skip("this model bears any learning rate on this machine")
    assert record["failed"].startswith("diverged: ") and record["identity"] == wild.identity
    assert read_json(tmp_path / "trials" / wild.identity / "record.json") == record


@pytest.mark.skipif(os.name == "nt", reason="there is no kill -9 on Windows")
def test_a_killed_trial_is_an_error_with_its_code_and_resumes_to_the_same_bits(shards, trial, tmp_path):
    long = replace(trial, train=replace(trial.train, max_steps=200, checkpoint_every=5, eval_every=200))
    checkpoints = tmp_path / "trials" / long.identity / "run" / "checkpoints"

    def kill() -> None:
        while not list(checkpoints.glob("step-*")):
            ended.wait(0.05)
        for child in trials.running():
            child.send_signal(signal.SIGKILL)

    ended = threading.Event()
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(RuntimeError, match=rf"trial {long.identity} ended with code -9"):
        run_apart(long, shards, tmp_path)
    killer.join()
    short = run_apart(long, shards, tmp_path)
    assert "resuming after step" in (tmp_path / "trials" / long.identity / "log.txt").read_text()
    assert short["weights"] == run_trial(long, shards, tmp_path / "whole")["weights"]
    assert trials.running() == []


def test_two_hundred_trials_with_made_up_scores_are_begun_once_each_and_serve_another_experiment_too(tmp_path, capsys):
    write_text(tmp_path / "out" / "shards")
    project = write_project(tmp_path, one=TWO_HUNDRED, two=TWO_HUNDRED)
    begun = []

    def start(planned, ended):
        begun.append(planned.trial.identity)
        bits = 2 + abs(math.log2(planned.trial.model.optimizer.peak_lr / 0.02)) / 100
        scores = {"bits_per_byte": bits + planned.trial.train.seed / 10_000}
        record = {"identity": begun[-1], "valid": scores, "test": scores, "seconds": 2.0, "flops": 10**9}
        threading.Thread(target=ended, args=(lambda: record,)).start()

    found = {}
    for name in ("one", "two"):
        files = Files(project, name)
        assert run_trials(files.begin(), files, start, at_once=7) == {}
        found[name] = {path.name: path.read_bytes() for path in (tmp_path / "experiments" / name / "records").iterdir()}
    assert len(begun) == len({*begun}) == len(found["one"]) == 200
    assert found["two"] == found["one"]
    assert capsys.readouterr().out.count("bits per byte") == 200


ALONE = """\
{question: q, refuted_by: r, budget: parameters, margin: 0.005, candidates: {}, seeds: {tune: [], judge: [1, 2, 3]},
 baseline: {architecture: {kind: dense, d_model: 16, n_heads: 2, n_layers: 1, d_ff: 32}, optimizer: {peak_lr: 1e-2}}}
"""


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """An experiment of a baseline alone, with tokens to train on."""
    write_text(tmp_path / "out" / "shards")
    return Files(write_project(tmp_path, alone=ALONE), "alone")


def test_a_record_made_before_a_setting_existed_is_of_a_trial_with_its_default(files):
    trial = files.begin().pending({})[0].trial
    before, other = trial.facts, trial.facts
    del before["model"]["architecture"]["conv_size"], before["train"]["precision"]
    other["model"]["architecture"]["gone"] = 1
    for name, facts in {"before": before, "other": other, "damaged": trial.facts | {"train": None}}.items():
        files.save({"identity": name, **facts})
    found = {identity: record["identity"] for identity, record in files.records().items()}
    assert found == {trial.identity: "before", "other": "other", "damaged": "damaged"}


def test_a_record_is_read_once_and_again_when_its_file_changes(files, monkeypatch):
    files.save({"identity": "one", "seconds": 1})
    assert files.records()["one"]["seconds"] == 1
    with monkeypatch.context() as patched:
        patched.setattr("stacklm.pipeline.lab.read_json", lambda path: pytest.fail(f"{path} was read again"))
        assert files.records()["one"]["seconds"] == 1
    files.save({"identity": "one", "seconds": 2})
    assert files.records()["one"]["seconds"] == 2


def test_trials_run_without_prefect_and_one_that_fails_is_tried_twice(files, monkeypatch, capsys):
    replace(files, name="other").save({"identity": "other"})
    lab = files.begin()
    unlucky = lab.pending({})[1].trial
    tries = []

    def apart(trial, shards, work):
        tries.append(trial.identity)
        if trial == unlucky:
            raise RuntimeError("out of luck")
        return run_apart(trial, shards, work)

    monkeypatch.setattr(trials, "run_apart", apart)
    broken = run_here(lab, files, at_once=2)
    assert {*broken} == {unlucky.identity} and broken[unlucky.identity].endswith("seed 2: out of luck")
    assert len(tries) == 4 and tries.count(unlucky.identity) == 2
    before = files.records()
    monkeypatch.undo()
    assert run_here(lab, files, at_once=2) == {}
    assert len(files.records()) == 4 and before.items() <= files.records().items()
    assert re.findall(r"\((.*) done, (.*) pending\)", capsys.readouterr().out) == [("1", "2"), ("2", "1"), ("3", "0")]


def test_an_interruption_ends_the_trials_under_way_and_tries_none_again(files, monkeypatch):
    tries = []

    def apart(trial, shards, work):
        tries.append(trial.train.seed)
        if trial.train.seed == 1:
            return {"identity": trial.identity, "test": {"bits_per_byte": 2.0}, "seconds": 1.0}
        time.sleep(0.3)
        raise RuntimeError("terminated")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trials, "run_apart", apart)
    with pytest.raises(KeyboardInterrupt):
        run_here(files.begin(), files, at_once=2, say=interrupt)
    assert sorted(tries) == [1, 2]
