"""Results of experiments on synthetic tasks: accuracy, steps to learn a task, and how well it predicts bits per byte on text.

No verdict is based on these.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from stacklm.config.schema import ParamsError, listed
from stacklm.console import table
from stacklm.lab.answers import LEARNT
from stacklm.lab.findings import Findings
from stacklm.lab.statistics import ALPHA, interval
from stacklm.units import interval as span

FEWEST = 8
"""Minimum number of arms for a rank correlation."""
DRAWS = 2_000


def diagnostics(findings: Findings, size: float) -> str:
    """A table with one row per arm: test accuracy, its interval over seeds, and the median step at which it had learnt the task."""
    result, probe, rows = findings.results[size], findings.lab.experiment.probe, []
    assert probe
    for name, rate in result.rates.items():
        found = findings.judged(name, size)
        accuracies = [record["test"]["accuracy"] for record in found]
        low, high = np.clip(interval(accuracies), 0, 1)
        learnt = sorted(record["learnt_at"] for record in found if record["learnt_at"] is not None)
        steps = f"{statistics.median_low(learnt):,} ({len(learnt)} of {len(found)} seeds)" if learnt else "never"
        rows.append((name, f"{rate:.2e}", f"{statistics.mean(accuracies):.1%}", span(low, high, ".1%"), steps))
    columns = ("arm", "learning rate", "test accuracy", "interval", f"steps to {LEARNT:.0%}")
    about = f"size {size:g}: {len(result.seeds)} seeds, {1 - 2 * ALPHA:.0%} intervals, chance {probe.chance:.1%}"
    return f"{about}\n{table(columns, rows)}"


@dataclass(frozen=True)
class Correlation:
    """Spearman's rho over arms between accuracy on a task and negative bits per byte on the test set; +1: same ranking."""

    arms: tuple[str, ...]
    accuracy: NDArray[np.float64]
    """Test accuracy, [arms, seeds]."""
    bits: NDArray[np.float64]
    """Test bits per byte, [arms, seeds]; the seeds may differ from those of `accuracy`."""
    rho: float
    p: float
    """Two-sided p value of no association, by permutation of the arms."""
    low: float
    high: float
    """Percentile interval from a bootstrap over arms and over the seeds of each."""

    def __str__(self) -> str:
        ends = span(self.low, self.high, ".2f")
        return f"rank correlation over {len(self.arms)} arms: rho = {self.rho:.2f} ({ends}; p = {self.p:.2g})"


def correlate(text: Findings, probe: Findings) -> Correlation:
    """The rank correlation over the arms of both experiments, at the largest size judged of each.

    Raises `ParamsError` for an experiment of the wrong kind, one that is not judged, or fewer than `FEWEST` common arms.
    """
    if text.lab.experiment.probe or not probe.lab.experiment.probe:
        raise ParamsError("the first experiment must be on text, and the second on a synthetic task (`probe`)")
    for findings in (text, probe):
        if findings.final is None:
            raise ParamsError(f"{findings.name}: not judged yet; at least 3 seeds of all arms are needed")
    bits, accuracy = _scores(text, "bits_per_byte"), _scores(probe, "accuracy")
    names = tuple(name for name in bits if name in accuracy)
    if len(names) < FEWEST:
        raise ParamsError(
            f"{text.name} and {probe.name} share {len(names)} arms ({listed(names) or 'none'}); a rank correlation needs {FEWEST}"
        )
    return rank_correlation(names, [accuracy[name] for name in names], [bits[name] for name in names])


def rank_correlation(
    names: Sequence[str], accuracy: Sequence[Sequence[float]], bits: Sequence[Sequence[float]], draws: int = DRAWS
) -> Correlation:
    """The rank correlation of scores by arm and seed. Raises `ValueError` if arms have different numbers of seeds."""
    ours, theirs = np.array(accuracy, float), np.array(bits, float)

    def rho(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
        if np.ptp(x) == 0 or np.ptp(y) == 0:  # no association if one of them is constant
            return 0.0
        return float(np.clip(np.asarray(stats.spearmanr(x, -y))[0], -1, 1))

    def permuted(x: NDArray[np.float64]) -> float:
        return rho(x, theirs.mean(axis=1))

    generator = np.random.default_rng(0)
    test = stats.permutation_test((ours.mean(axis=1),), permuted, permutation_type="pairings", n_resamples=draws, rng=generator)
    found = []
    for _ in range(draws):
        arms = generator.integers(len(names), size=len(names))
        both = (one[arms][:, generator.integers(one.shape[1], size=one.shape[1])].mean(axis=1) for one in (ours, theirs))
        found.append(rho(*both))
    low, high = np.quantile(found, [ALPHA, 1 - ALPHA])
    return Correlation(tuple(names), ours, theirs, permuted(ours.mean(axis=1)), float(test.pvalue), float(low), float(high))


def _scores(findings: Findings, key: str) -> dict[str, list[float]]:
    """Test scores by arm and seed."""
    assert findings.final
    return {name: [record["test"][key] for record in findings.judged(name, findings.final.size)] for name in findings.names}
