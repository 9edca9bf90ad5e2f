"""Statistics over seeds: paired intervals, tests against a margin, power, and sequential looks.

The unit is the seed. A candidate and the baseline are trained with the same seeds; the statistic is the relative difference of
each pair, `candidate / baseline - 1`, of a score for which lower is better (bits per byte). Distributions and power come from
scipy and statsmodels.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from statsmodels.stats.power import TTestPower

Outcome = Literal["better", "not worse", "worse", "no verdict"]

ALPHA = 0.025
"""One-sided error rate of an experiment: the chance that any candidate is wrongly called better, or not worse."""
POWER = 0.8
MOST_SEEDS = 1_000
"""Above this, the number of seeds needed is not stated."""


@dataclass(frozen=True)
class Verdict:
    """The verdict on one candidate against the baseline; differences are relative, lower is better."""

    outcome: Outcome
    mean: float
    low: float
    high: float
    """The interval whose two ends each have the error rate `level`."""
    sd: float
    """Standard deviation of the paired differences."""
    seeds: int
    level: float
    margin: float

    @property
    def more_seeds(self) -> int | None:
        """More seeds needed to decide with 80% power, given the observed mean and sd; None if decided or above `MOST_SEEDS`."""
        if self.outcome != "no verdict":
            return None
        # For the verdict that the mean makes likely: worse if it is above the margin, else not worse.
        distance = self.mean if self.mean > self.margin else self.margin - self.mean
        needed = seeds_needed(distance, self.sd, self.level)
        return max(1, needed - self.seeds) if needed else None


def relative_differences(candidate: ArrayLike, baseline: ArrayLike) -> NDArray[np.float64]:
    """`candidate / baseline - 1`, seed by seed. Raises `ValueError` unless both have the same number of finite, positive scores."""
    ours, theirs = np.asarray(candidate, float), np.asarray(baseline, float)
    if ours.shape != theirs.shape or ours.ndim != 1:
        raise ValueError(f"{ours.shape} scores of the candidate cannot be paired with {theirs.shape} of the baseline")
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all() and (ours > 0).all() and (theirs > 0).all()):
        raise ValueError("scores must be finite and positive")
    return ours / theirs - 1


def interval(differences: ArrayLike, level: float = ALPHA) -> tuple[float, float]:
    """The t interval of the mean; each end has the error rate `level`. Raises `ValueError` for fewer than two values."""
    values = np.asarray(differences, float)
    if values.size < 2:
        raise ValueError(f"{values.size} seeds give no interval; at least 2 are needed")
    half = stats.t.isf(level, values.size - 1) * values.std(ddof=1) / np.sqrt(values.size)
    return float(values.mean() - half), float(values.mean() + half)


def verdicts(differences: Mapping[str, ArrayLike], margin: float, alpha: float = ALPHA) -> dict[str, Verdict]:
    """A verdict for each candidate; the chance of any wrong claim over all of them is at most `alpha` in each direction.

    Superiority is tested by Holm's method over the candidates; those that are not superior are tested for
    non-inferiority at the level that Holm's method has reached. This is a graphical procedure (Bretz et al. 2009,
    doi:10.1002/sim.3495): each candidate's two hypotheses are nested, and its level is passed on only if both are rejected.
    """
    if not margin > 0:
        raise ValueError(f"the margin must be above 0, not {margin}")
    values = {name: np.asarray(value, float) for name, value in differences.items()}
    p = [t_test(value, 0) for value in values.values()]
    order = sorted(range(len(p)), key=p.__getitem__)
    won = next((place for place, i in enumerate(order) if p[i] > alpha / (len(p) - place)), len(p))
    levels = {i: alpha / (len(p) - min(place, won)) for place, i in enumerate(order)}
    return {name: judge(value, margin, levels[i]) for i, (name, value) in enumerate(values.items())}


def judge(differences: NDArray[np.float64], margin: float, level: float = ALPHA) -> Verdict:
    """The verdict on one candidate at a one-sided error rate."""
    low, high = interval(differences, level)
    mean, sd, n = float(differences.mean()), float(differences.std(ddof=1)), differences.size
    outcome: Outcome = "better" if high < 0 else "not worse" if high < margin else "worse" if low > 0 else "no verdict"
    return Verdict(outcome, mean, low, high, sd, n, level, margin)


def t_test(differences: ArrayLike, bound: float) -> float:
    """One-sided p value of the hypothesis that the mean is at least `bound`; 0 or 1 if the differences do not vary."""
    values = np.asarray(differences, float)
    if not values.std():
        return float(values.mean() >= bound)
    return float(stats.t.cdf((values.mean() - bound) / stats.sem(values), values.size - 1))


def smallest_detectable(seeds: int, sd: float = 1.0, alpha: float = ALPHA, power: float = POWER) -> float:
    """The smallest true mean of paired differences that `seeds` pairs distinguish from zero with that power; in units of `sd`."""
    return sd * float(TTestPower().solve_power(nobs=seeds, alpha=alpha, power=power, alternative="larger"))


def seeds_needed(difference: float, sd: float, alpha: float = ALPHA, power: float = POWER) -> int | None:
    """The number of pairs that distinguish a mean from a bound at `difference` with that power; None if above `MOST_SEEDS`."""
    if sd == 0:
        return 2
    seeds = range(2, MOST_SEEDS + 1)
    test = TTestPower()
    place = bisect_left(seeds, power, key=lambda n: test.power(difference / sd, n, alpha, alternative="larger"))
    return seeds[place] if place < len(seeds) else None


@dataclass(frozen=True)
class AgainstItself:
    """A/A test of an arm: its seeds are repeatedly shuffled, and one half is paired with the other."""

    pairs: int
    sd: float
    """Standard deviation of the relative differences of such pairs."""
    false_wins: float
    """Share of the shuffles in which the t test finds a winner, in either direction; `2 * alpha` is expected."""


def against_itself(scores: ArrayLike, alpha: float = ALPHA, shuffles: int = 1 << 12) -> AgainstItself:
    """The A/A test of one arm's scores, where no difference exists. Raises `ValueError` for fewer than 4 scores."""
    values = np.asarray(scores, float)
    pairs = values.size // 2
    if pairs < 2:
        raise ValueError(f"{values.size} seeds cannot be paired with each other; at least 4 are needed")
    shuffled = np.random.default_rng(0).permuted(np.tile(values, (shuffles, 1)), axis=1)
    differences = shuffled[:, :pairs] / shuffled[:, pairs : 2 * pairs] - 1
    p = np.asarray(stats.ttest_1samp(differences, 0, axis=1)[1])
    return AgainstItself(pairs, float(differences.std(axis=1, ddof=1).mean()), float(np.mean(p < 2 * alpha)))


def bootstrap_interval(
    candidate: ArrayLike, baseline: ArrayLike, sizes: ArrayLike, level: float = ALPHA, draws: int = 4_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the relative difference over seeds and documents, both drawn with replacement.

    `candidate` and `baseline` are sums of nats per seed and document, [S, D]; `sizes` the documents' bytes, [D]. It
    predicts the difference with other seeds on other documents of the same kind. Documents alone would only measure the noise
    of the test set. With few seeds a percentile interval is too narrow, so verdicts are based on `interval`.
    """
    ours, theirs, bytes_D = (np.asarray(value, float) for value in (candidate, baseline, sizes))
    if ours.shape != theirs.shape or ours.shape[1:] != bytes_D.shape:
        raise ValueError(f"shapes {ours.shape}, {theirs.shape} and {bytes_D.shape} do not match")
    generator = np.random.default_rng(seed)
    S, D = ours.shape
    # Counts of each seed and document per draw, so that sums over draws are matrix products.
    seeds_ND = generator.multinomial(S, np.full(S, 1 / S), draws)
    documents_ND = generator.multinomial(D, np.full(D, 1 / D), draws)
    weight = documents_ND @ bytes_D
    ratio_NS = (documents_ND @ ours.T / weight[:, None]) / (documents_ND @ theirs.T / weight[:, None]) - 1
    found = (ratio_NS * seeds_ND).sum(axis=1) / S
    low, high = np.quantile(found, [level, 1 - level])
    return float(low), float(high)


@cache
def sequential_level(looks: tuple[int, ...], alpha: float = ALPHA, draws: int = 200_000) -> float:
    """The one-sided level per look, for looks at increasing numbers of seeds, that keeps `alpha` over all of them.

    Pocock's group-sequential design (doi:10.1093/biomet/64.2.191) with t tests. The distribution of the smallest p value
    under no difference depends only on `looks`, not on the unknown variance, and is simulated with a fixed seed.
    Raises `ValueError` unless the looks increase from at least 2 seeds.
    """
    if not looks or looks[0] < 2 or any(b <= a for a, b in pairwise(looks)):
        raise ValueError(f"looks must be increasing numbers of seeds, at least 2, not {looks}")
    values = np.random.default_rng(0).standard_normal((draws, looks[-1]))
    smallest = np.ones(draws)
    for n in looks:
        t = values[:, :n].mean(axis=1) / (values[:, :n].std(axis=1, ddof=1) / np.sqrt(n))
        smallest = np.minimum(smallest, stats.t.cdf(t, n - 1))
    return float(np.quantile(smallest, alpha))


def sequential_verdict(differences: ArrayLike, looks: tuple[int, ...], margin: float, alpha: float = ALPHA) -> Verdict:
    """The verdict at the first of the planned looks that decides, or at the last one with enough seeds.

    Raises `ValueError` for fewer seeds than the first look needs.
    """
    values, level = np.asarray(differences, float), sequential_level(looks, alpha)
    if values.size < looks[0]:
        raise ValueError(f"the first look needs {looks[0]} seeds, not {values.size}")
    found = [judge(values[:n], margin, level) for n in looks if n <= values.size]
    return next((verdict for verdict in found if verdict.outcome != "no verdict"), found[-1])
