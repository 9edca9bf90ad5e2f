"""Decoding times are shown beside the budgets of the arms, each relative to the baseline of its size."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from stacklm.config.model import Dense, Model
from stacklm.config.optimizer import Muon
from stacklm.config.schema import ParamsError, plain, read
from stacklm.lab.experiment import arms
from stacklm.lab.schedule import Lab
from stacklm.lab.speed import Latency, decode_latency, seconds_per_step
from stacklm.lab.text import arms_table
from support.checkout import PARAMS
from support.custom_models import MODELS
from support.lab_records import lab_of, timed

EXPERIMENT = """
question: q
refuted_by: r
budget: parameters
margin: 0.01
baseline: {architecture: {kind: dense, d_model: 16, n_heads: 2, n_layers: 1, d_ff: 32}}
candidates: {deeper: {change: {architecture.n_layers: 2}}}
seeds: {tune: [9], judge: [1, 2, 3]}
sizes: [1, 2]
"""


@pytest.fixture(scope="module")
def lab() -> Lab:
    return lab_of(EXPERIMENT)


def test_each_arm_is_timed_and_the_threads_stay_as_they_were(lab):
    before = torch.get_num_threads()
    latency = decode_latency(lab.arms, vocab_size=300, context=16, rounds=3)
    for arm in lab.arms:
        timing = latency.of(arm)
        assert timing is not None and 0 < timing.low <= timing.median <= timing.high < 1
    assert torch.get_num_threads() == before
    assert read(Latency, json.loads(json.dumps(plain(latency)))) == latency


def test_figures_of_another_shape_are_not_those_of_an_arm(lab):
    latency, (small, deeper, *_) = timed(lab.arms, [1e-3] * 4), lab.arms
    assert latency.of(small) == pytest.approx((1e-3, 0.9e-3, 1.2e-3))
    assert latency.of(replace(small, model=deeper.model)) is None and latency.of(replace(small, name="other")) is None


def test_steps_are_timed_by_arm(lab):
    speeds = seconds_per_step(lab.arms, vocab_size=300, rounds=2)
    assert [*speeds] == ["baseline 1", "deeper 1", "baseline 2", "deeper 2"] and min(speeds.values()) > 0


def test_a_step_is_timed_with_the_optimizer_of_its_arm(lab):
    adamw = replace(lab.arms[0], model=Model(Dense(64, 2, 4, 256)))
    muon = replace(adamw, name="muon", model=replace(adamw.model, optimizer=Muon(ns_steps=20)))
    speeds = seconds_per_step([adamw, muon], vocab_size=300, rounds=5)
    assert speeds["muon 1"] > 1.5 * speeds["baseline 1"]


def test_with_equal_seconds_steps_follow_from_the_speeds_and_shapes_stay(lab):
    experiment = lab_of(EXPERIMENT.replace("budget: parameters", "budget: seconds")).experiment
    speeds = {"baseline 1": 1.0, "deeper 1": 1.5, "baseline 2": 2.0, "deeper 2": 2.0}
    small, deeper, large, larger = arms(experiment, PARAMS, speeds)
    assert [arm.train.max_steps for arm in (small, deeper, large, larger)] == [12, 8, 12, 12]
    assert deeper.model.architecture.d_ff == small.model.architecture.d_ff
    assert deeper.cost.tokens == small.cost.tokens * 8 // 12
    assert deeper.mismatch == {"seconds": 0.0} and deeper.warning is None
    assert Lab(experiment, [small, deeper], small.train, "", "").trial(deeper, 1e-3, 1).train.max_steps == 8
    slower = arms(experiment, PARAMS, {**speeds, "deeper 1": 1.7})[1]
    assert slower.train.max_steps == 7 and slower.mismatch["seconds"] == pytest.approx(7 * 1.7 / 12 - 1)
    with pytest.raises(ParamsError, match=r"candidates.deeper: in the time of the baseline's 12 steps it takes 1"):
        arms(experiment, PARAMS, {**speeds, "deeper 1": 12.0})
    assert {arm.train.max_steps for arm in arms(experiment, PARAMS)} == {12}  # before anything is measured


def test_the_table_shows_the_distance_to_the_baseline_of_the_same_size_on_every_axis(lab):
    small, deeper, large, larger = lab.arms
    lines = arms_table(lab, timed(lab.arms, [1e-3, 3e-3, 2e-3, 2e-3])).splitlines()[2:]
    assert [line.split()[0] for line in lines] == ["baseline", "deeper", "baseline", "deeper"]
    for line, arm, baseline in ((lines[1], deeper, small), (lines[3], larger, large)):
        assert f"{arm.cost.training_flops / baseline.cost.training_flops - 1:+.2%}" in line
        assert "2 (+100.00%)" in line and f"{arm.cost.kv_bytes:,} (+100.00%)" in line
    assert "3.00 [2.70, 3.60] ms (+200%)" in lines[1] and "2.00 [1.80, 2.40] ms (+0%)" in lines[3]
    assert "%" not in lines[0] and "decoding" not in arms_table(lab)


def test_a_model_of_the_users_is_timed_whether_it_has_a_cache_or_not(lab):
    own = [replace(lab.arms[0], name=name, model=Model(MODELS[name])) for name in ("gpt", "lstm")]
    latency = decode_latency(own, vocab_size=300, context=16, rounds=2)
    assert all(latency.of(arm) for arm in own)
