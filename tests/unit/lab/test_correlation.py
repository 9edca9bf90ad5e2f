"""The rank correlation of a synthetic task with bits per byte: known results, and refused input."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from ruamel.yaml import YAML
from scipy import stats

from stacklm.config.schema import ParamsError, read
from stacklm.lab.diagnostics import FEWEST, correlate, rank_correlation
from stacklm.lab.experiment import Experiment
from stacklm.lab.findings import Findings
from stacklm.lab.schedule import Planned
from stacklm.report.lab.page import write_ranks
from support.lab_records import course, lab_of

NAMES = [f"arm{i}" for i in range(10)]


def drawn(generator: np.random.Generator, agreement: float) -> tuple[np.ndarray, np.ndarray]:
    """Accuracies and bits of ten arms and three seeds whose underlying ranks agree so far."""
    quality = generator.standard_normal(10)
    other = agreement * quality + (1 - agreement**2) ** 0.5 * generator.standard_normal(10)
    noise = 0.05 * generator.standard_normal((2, 10, 3))
    return 0.5 + 0.1 * quality[:, None] + 0.1 * noise[0], 2 - 0.1 * other[:, None] + 0.1 * noise[1]


def test_the_same_ranking_is_one_and_the_opposite_minus_one():
    accuracy = [[0.1 * i, 0.1 * i + 0.01] for i in range(10)]
    same = rank_correlation(NAMES, accuracy, [[2 - 0.01 * i**2] * 2 for i in range(10)])
    assert same.rho == pytest.approx(1) and same.p < 0.01 and same.high == pytest.approx(1)
    assert rank_correlation(NAMES, accuracy, [[2 + 0.01 * i] * 2 for i in range(10)]).rho == pytest.approx(-1)


def test_it_is_the_correlation_of_means_with_a_p_value_of_its_own_distribution():
    accuracy, bits = drawn(np.random.default_rng(3), 0.6)
    found = rank_correlation(NAMES, accuracy, bits)
    expected = stats.spearmanr(accuracy.mean(axis=1), -bits.mean(axis=1))
    assert found.rho == pytest.approx(expected[0])
    assert found.p == pytest.approx(expected[1], abs=0.05)  # the other is an approximation for ten arms
    assert found.low <= found.rho <= found.high


def test_arms_that_do_not_differ_are_associated_with_nothing():
    found = rank_correlation(NAMES, [[0.5, 0.5]] * 10, [[2 - 0.01 * i] * 2 for i in range(10)])
    assert (found.rho, found.low, found.high) == (0, 0, 0) and found.p == 1


def test_without_association_it_is_rarely_found():
    """At a level of 5%, in 60 simulated pairs of experiments: at most what four standard errors allow."""
    generator = np.random.default_rng(0)
    wins = sum(rank_correlation(NAMES, *drawn(generator, 0.0), draws=150).p < 0.05 for _ in range(60))
    assert wins <= 60 * (0.05 + 4 * (0.05 * 0.95 / 60) ** 0.5)


EXPERIMENT = """
question: q
refuted_by: r
budget: tokens
margin: 0.01
baseline: {architecture: {kind: dense, d_model: 16, n_heads: 2, n_layers: 1, d_ff: 32}}
seeds: {tune: [9], judge: [1, 2, 3]}
rates: 3
"""


def findings(name: str, candidates: int, probe: bool) -> Findings:
    """Judged, with scores that rank the arms by their width."""
    tree = YAML(typ="safe").load(EXPERIMENT) | ({"probe": {"kind": "recall"}} if probe else {})
    tree["candidates"] = {f"wide{i}": {"change": {"architecture.d_ff": 32 + i}} for i in range(1, candidates + 1)}
    lab = lab_of(read(Experiment, tree))

    def record(planned: Planned) -> dict:
        width, rate = planned.arm.model.architecture.d_ff, planned.trial.model.optimizer.peak_lr
        scores = {"bits_per_byte": 2 - 0.01 * width + abs(np.log2(rate / 2e-3)), "accuracy": width / 100}
        return {"valid": scores, "test": scores}

    return Findings(name, lab, course(lab, record=record)[0])


def test_arms_of_two_experiments_meet_by_name_and_the_report_ranks_them(tmp_path: Path):
    found = correlate(findings("text", 9, probe=False), findings("task", 8, probe=True))
    assert found.arms == ("baseline", *(f"wide{i}" for i in range(1, 9))) and found.rho == pytest.approx(1)
    write_ranks(found, "text", "task", tmp_path / "ranks")
    markdown = (tmp_path / "ranks" / "ranks.md").read_text(encoding="utf-8")
    assert str(found).capitalize() in markdown
    assert re.findall(r"^\| (\w+) \| \d", markdown, re.MULTILINE) == [*reversed(found.arms)]
    assert "data:image/svg" in (tmp_path / "ranks" / "index.html").read_text(encoding="utf-8")


def test_what_cannot_be_correlated_is_refused_with_the_numbers():
    text, task = findings("text", 3, probe=False), findings("task", 3, probe=True)
    with pytest.raises(ParamsError, match=rf"text and task share 4 arms .*needs {FEWEST}"):
        correlate(text, task)
    with pytest.raises(ParamsError, match="the first experiment must be on text"):
        correlate(task, text)
    with pytest.raises(ParamsError, match="task: not judged yet"):
        correlate(text, Findings("task", task.lab, {}))
