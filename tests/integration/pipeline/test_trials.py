"""Trials in processes of their own, and how they end."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from stacklm.config.optimizer import AdamW
from stacklm.files import read_json, sha256
from stacklm.lab.experiment import Trial
from stacklm.lab.trial import run_trial
from stacklm.pipeline import trials
from stacklm.pipeline.trials import run_apart
from support.train_files import MODELS, TRAIN, write_text


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("trials") / "shards")


@pytest.fixture
def trial(shards: Path) -> Trial:
    return Trial(MODELS["dense"], replace(TRAIN, max_steps=10), data=sha256(shards / "manifest.json"), code="c")


def test_a_trial_apart_gives_the_same_bits_as_one_in_this_process(shards, trial, tmp_path):
    apart, here = run_apart(trial, shards, tmp_path / "apart"), run_trial(trial, shards, tmp_path / "here")
    assert {**apart, "seconds": 0} == {**here, "seconds": 0}
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
