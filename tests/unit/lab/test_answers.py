"""Trials of a synthetic task: scored only at the positions of answers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stacklm.config.model import Dense, Model
from stacklm.config.optimizer import AdamW
from stacklm.data.shards import Shards
from stacklm.files import sha256
from stacklm.lab.answers import LEARNT, score_answers
from stacklm.lab.findings import Findings
from stacklm.lab.probes import KHop, Probe, Recall, context_length, drawn, vocab_size, write_probe
from stacklm.lab.schedule import Planned
from stacklm.lab.text import result_text
from stacklm.lab.trial import Trial, run_trial
from stacklm.model.build import build
from support.lab_records import course, lab_of
from support.train_files import TRAIN

SMALL = Recall(pairs=2, keys=16, values=16, documents=200)
MODEL = Model(Dense(16, 2, 1, 16), AdamW(peak_lr=1e-2))


def trained(probe: Probe, model: Model, root: Path, **changes) -> dict:
    shards = root / "shards"
    write_probe(probe, shards)
    config = replace(TRAIN, context_length=context_length(probe), **changes)
    return run_trial(Trial(model, config, sha256(shards / "manifest.json"), "c"), shards, root / "work")


@pytest.mark.parametrize("batch_size", [1, 7, 600])
def test_scores_are_those_of_the_answers_alone(tmp_path, batch_size):
    write_probe(SMALL, tmp_path)
    torch.manual_seed(0)
    data, context = Shards.open(tmp_path), context_length(SMALL)
    assert len(data.split("test")) == 500 * context
    model = build(MODEL.architecture, vocab_size(SMALL), context).eval()
    found = score_answers(model, data, "test", context, batch_size)
    ids_DL, answers_L = drawn(SMALL, "test", 500)
    inputs = torch.from_numpy(ids_DL).roll(1, dims=1)  # each document after the end of the one before
    with torch.no_grad():
        logits = model(inputs)[:, answers_L].double()
    wanted = torch.from_numpy(ids_DL[:, answers_L])
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten()).item()
    assert found["answers"] == wanted.numel() == 1000
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2), rel=1e-6)
    assert found["accuracy"] == (logits.argmax(-1) == wanted).double().mean().item()


def test_a_record_says_when_the_task_was_learnt(tmp_path, monkeypatch):
    record = trained(SMALL, MODEL, tmp_path, max_steps=12, checkpoint_every=4, keep_every=4)
    assert record["learnt_at"] is None and 0 < record["test"]["accuracy"] < LEARNT
    kept = sorted(path.name for path in tmp_path.glob("work/trials/*/run/checkpoints/step-*"))
    assert kept == [f"step-{step:08d}" for step in (0, 4, 8, 12)]
    monkeypatch.setattr("stacklm.lab.trial.LEARNT", 0.0)
    assert trained(SMALL, MODEL, tmp_path / "again", max_steps=12, checkpoint_every=4, keep_every=4)["learnt_at"] == 0


def test_an_experiment_on_a_task_shows_accuracy_and_no_verdict():
    lab = lab_of(
        "{question: q, refuted_by: r, budget: parameters, margin: 0.005, seeds: {tune: [9], judge: [1, 2, 3]}, rates: 3,"
        " probe: {kind: khop, k: 2, cycles: 2, cycle_length: 5},"
        " baseline: {architecture: {kind: dense, d_model: 16, n_heads: 2, n_layers: 1, d_ff: 32}, optimizer: {peak_lr: 1e-2}},"
        " candidates: {swiglu: {change: {architecture.ffn: swiglu}}}}"
    )
    assert lab.settings.context_length == 2 * 10 + 1 + 2 * 2 + 1 and lab.settings.keep_every == lab.settings.checkpoint_every

    def record(planned: Planned) -> dict:
        rate, seed = planned.trial.model.optimizer.peak_lr, planned.trial.train.seed
        scores = {"bits_per_byte": 1 + abs(math.log2(rate / 1e-2)), "accuracy": 1 - seed / 10, "answers": 10}
        step = 100 * seed if planned.arm.name == "swiglu" and seed < 3 else None
        return {"valid": scores, "test": scores, "seconds": 1.0, "flops": 1, "learnt_at": step}

    text = result_text(Findings("one", lab, course(lab, record=record)[0]))
    assert "chance 10.0%" in text and "80.0%" in text and "verdict" not in text
    assert "never" in text and "100 (2 of 3 seeds)" in text


@pytest.mark.slow
@pytest.mark.parametrize("probe", [KHop(k=1, cycles=2, cycle_length=4), Recall(pairs=3, keys=8, values=8)], ids=["khop", "recall"])
def test_a_tiny_dense_model_learns_what_takes_one_hop(tmp_path, probe):
    model = Model(Dense(64, 2, 2, 128, ffn="swiglu"), AdamW(peak_lr=2e-3))
    steps = {"max_steps": 1200, "warmup_steps": 120, "checkpoint_every": 100, "keep_every": 100, "eval_every": 1200}
    record = trained(probe, model, tmp_path, global_batch_size=64, micro_batch_size=64, **steps)
    assert record["test"]["accuracy"] > LEARNT > 2 * probe.chance
    assert 100 <= record["learnt_at"] <= 1200
