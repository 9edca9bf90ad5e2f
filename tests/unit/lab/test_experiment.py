"""Experiment files: their meaning, and errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stacklm.config.schema import ParamsError
from stacklm.lab.experiment import Experiment, arms, changed, load_experiment, settings
from stacklm.lab.trial import Trial
from support.checkout import PARAMS

FILE = """\
question: Does a short convolution help, and do two stacks match the dense twin?
refuted_by: the interval stays above the margin with ten seeds
budget: parameters
margin: 0.005
baseline:
  architecture: {kind: dense, d_model: 16, n_heads: 2, n_layers: 2, d_ff: 64}
  optimizer: {peak_lr: 2e-3}
candidates:
  swiglu: {change: {architecture.ffn: swiglu}}
  stacked:
    model:
      architecture: {kind: stacked, d_model: 16, n_heads: 2, stacks: [{layers: 2, features: 8, d_ff: 16}]}
      optimizer: {peak_lr: 4e-3}
seeds: {tune: [101], judge: [1, 2, 3]}
sizes: [1, 2]
train: {max_steps: 20}
"""


def experiment(tmp_path: Path, *changes: tuple[str, str]) -> Experiment:
    text = FILE
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "one.yaml").write_text(text)
    return load_experiment(tmp_path / "one.yaml")


def test_every_arm_meets_the_budget_of_its_size(tmp_path):
    found = arms(experiment(tmp_path), PARAMS)
    assert [(arm.name, arm.size) for arm in found] == [
        (name, size) for size in (1, 2) for name in ("baseline", "swiglu", "stacked")
    ]
    for baseline, *others in (found[:3], found[3:]):
        for arm in others:
            assert arm.mismatch["parameters"] == arm.cost.parameters / baseline.cost.parameters - 1
            assert abs(arm.mismatch["parameters"]) < 0.03
            assert (arm.warning is None) == (abs(arm.mismatch["parameters"]) <= 0.01)
    assert found[3].model.architecture.d_model == 32
    assert {*found[1].changed} == {"architecture.ffn", "architecture.d_ff"}
    assert found[1].changed["architecture.ffn"] == ("relu2", "swiglu")
    assert found[2].changed["architecture.kind"] == ("dense", "stacked")
    assert found[0].changed == {}


def test_the_experiments_settings_take_the_place_of_the_projects(tmp_path):
    assert settings(experiment(tmp_path), PARAMS) == replace(PARAMS.train, max_steps=20)
    with pytest.raises(ParamsError, match=r"train.max_step: unknown key.*did you mean `max_steps`"):
        settings(experiment(tmp_path, ("max_steps: 20", "max_step: 20")), PARAMS)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("judge: [1, 2, 3]", "judge: [1, 2]", r"one.yaml: seeds: judge: 2 seeds are too few for a verdict; at least 3 are needed"),
        ("judge: [1, 2, 3]", "judge: [1, 2, 3], looks: [3, 4]", r"one.yaml: seeds: looks: 3, 4 must increase .* in `judge`, 3"),
        ("judge: [1, 2, 3]", "judge: [1, 2, 3], looks: [2, 3]", r"one.yaml: seeds.looks\[0\]: 2"),
        ("judge: [1, 2, 3]", "judge: [1, 2, 3, 101]", r"one.yaml: seeds: tune and judge share 101"),
        ("judge: [1, 2, 3]", "judge: [1, 2, 3, 3]", r"one.yaml: seeds: judge: repeated seeds 3"),
        ("tune: [101]", "tune: []", r"one.yaml: seeds.tune: \[\] is not allowed"),
        ("margin: 0.005", "margin: 0", r"one.yaml: margin: 0 is not allowed; it must be > 0"),
        ("budget: parameters", "budget: params", r"one.yaml: budget: 'params' is not allowed.*did you mean `parameters`"),
        ("sizes: [1, 2]", "sizes: [1, 1.0]", r"one.yaml: sizes: 1.0, 1.0 must be different"),
        ("  swiglu: {change", "  baseline: {change", r"one.yaml: candidates.baseline: this name is reserved"),
        ("{change: {architecture.ffn: swiglu}}", "{}", r"one.yaml: candidates.swiglu: write either `change`"),
        ("question: ", "questions: ", r"one.yaml: questions: unknown key.*did you mean `question`"),
        ("margin: 0.005", "margin: [", r"one.yaml: line \d+, column \d+: not valid YAML"),
        ("architecture.ffn: swiglu", "architecture.fnn: swiglu", r"candidates.swiglu.change: no key 'architecture.fnn'"),
        ("architecture.ffn: swiglu", "architecture.ffn: gelu", r"candidates.swiglu.change.architecture.ffn: 'gelu' is not allowed"),
        (
            "{peak_lr: 4e-3}",
            "{peak_lr: 4e-3, beta2: 0.99}",
            r"candidates.stacked: differs from the baseline in optimizer.beta2 \(0.99",
        ),
        ("sizes: [1, 2]", "sizes: [0.3]", r"size 0.3: d_model 16 \* 0.3 = 4.8 is not a whole number"),
        ("stacks: [{layers: 2, features: 8", "stacks: [{layers: 16, features: 8", r"candidates.stacked cannot meet the budget: "),
    ],
)
def test_what_cannot_lead_to_a_verdict_or_would_not_be_a_fair_comparison_is_refused(tmp_path, old, new, message):
    with pytest.raises(ParamsError, match=message):
        arms(experiment(tmp_path, (old, new)), PARAMS)


def test_a_change_may_be_inside_a_list(tmp_path):
    model = experiment(tmp_path).candidates["stacked"].model
    assert changed(model, {"architecture.stacks.0.d_ff": 24}, "here").architecture.stacks[0].d_ff == 24
    with pytest.raises(ParamsError, match=r"here: no key 'architecture.stacks.1.d_ff' in the baseline; .*stacks.0.d_ff"):
        changed(model, {"architecture.stacks.1.d_ff": 24}, "here")


def test_a_declared_difference_is_allowed(tmp_path):
    changes = [
        ("{peak_lr: 4e-3}", "{peak_lr: 4e-3, beta2: 0.99}"),
        ("  stacked:\n", "  stacked:\n    differs: [architecture, optimizer]\n"),
    ]
    assert arms(experiment(tmp_path, *changes), PARAMS)[2].changed["optimizer.beta2"] == (0.95, 0.99)


def test_equal_trials_have_one_identity_and_any_difference_another(tmp_path):
    one = experiment(tmp_path)
    first = Trial(one.baseline, settings(one, PARAMS), data="d", code="c")
    assert first.identity == replace(first).identity
    others = [
        replace(first, data="e"),
        replace(first, code="d"),
        replace(first, train=replace(first.train, seed=2)),
        replace(first, model=replace(first.model, optimizer=replace(first.model.optimizer, peak_lr=1e-3))),
    ]
    assert len({first.identity, *(other.identity for other in others)}) == 5
