"""How well a synthetic task predicts bits per byte: the rank correlation of the two over the arms of two experiments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from stacklm.config.schema import ParamsError, listed
from stacklm.lab.findings import Findings
from stacklm.lab.statistics import ALPHA

FEWEST = 8
"""Arms from which on a rank correlation is worth a number."""
DRAWS = 2_000


@dataclass(frozen=True)
class Correlation:
    """Spearman's rho between the accuracy on a task and less bits per byte on the test set, over arms; +1: same ranking."""

    arms: tuple[str, ...]
    accuracy: NDArray[np.float64]
    """Test accuracy, [arms, seeds]."""
    bits: NDArray[np.float64]
    """Test bits per byte, [arms, seeds]; the seeds of the two need not be the same."""
    rho: float
    p: float
    """Of no association, two-sided, by permutation of the arms."""
    low: float
    high: float
    """Percentile interval by a bootstrap over arms and over the seeds of each."""


def correlate(text: Findings, probe: Findings) -> Correlation:
    """Over the arms that both have, at the largest size judged of each.

    Raises `ParamsError` for an experiment of the wrong kind, one that is not judged, or fewer than `FEWEST` arms in common.
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
    """Of scores by arm and seed. Raises `ValueError` where arms have different numbers of seeds."""
    ours, theirs = np.array(accuracy, float), np.array(bits, float)

    def rho(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
        if np.ptp(x) == 0 or np.ptp(y) == 0:  # without any difference there is no association
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


def _scores(findings: Findings, key: str) -> Mapping[str, list[float]]:
    assert findings.final
    size = findings.final.size
    names = ["baseline", *findings.candidates]
    return {name: [record["test"][key] for record in findings.judged(name, size)] for name in names}
