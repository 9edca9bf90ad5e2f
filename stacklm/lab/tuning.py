"""Tuning the learning rate of every arm: a grid of factor 2, extended until the best is inside it, with equal trials for all.

Scores are means over the tuning seeds on the valid set, lower is better; a diverged run has an infinite score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

MOST = 15
"""Maximum number of rates per arm; the best of them is then used even at an edge."""

Scores = Mapping[float, Sequence[float]]
"""The scores of all tuning seeds, by learning rate."""


def first_rates(peak_lr: float, points: int) -> list[float]:
    """`points` rates around `peak_lr`, each twice the previous one."""
    return [peak_lr * 2.0 ** (i - points // 2) for i in range(points)]


def next_rates(arms: Mapping[str, Scores]) -> dict[str, float]:
    """One more rate for every arm if the best of any arm is at an edge of its grid; empty if all are inside.

    Each arm gets the rate beyond the edge nearer to its best, so that all arms have the same number of trials.
    Raises `ValueError` for arms with different numbers of trials.
    """
    if len({sum(map(len, scores.values())) for scores in arms.values()}) > 1:
        raise ValueError(f"unequal trials: { ({name: len(scores) for name, scores in arms.items()}) }")
    if all(_inside(scores) or len(scores) >= MOST for scores in arms.values()):
        return {}
    return {name: _beyond(scores) for name, scores in arms.items()}


def best_rate(scores: Scores) -> float:
    """The rate with the lowest mean score: the minimum of `parabola`, or the best of the grid if there is none.

    Raises `ValueError` if every rate diverged.
    """
    rates, means = _means(scores)
    best = int(np.argmin(means))
    if not math.isfinite(means[best]):
        raise ValueError(f"every learning rate from {rates[0]:g} to {rates[-1]:g} diverged")
    bowl = parabola(scores)
    return float(2 ** (-bowl[1] / (2 * bowl[0]))) if bowl else rates[best]


def parabola(scores: Scores) -> tuple[float, float, float] | None:
    """a, b and c of `a * x**2 + b * x + c` through the best of the grid and its neighbours, where x is log2 of the rate.

    None if a neighbour is missing or diverged, or if it has no minimum.
    """
    rates, means = _means(scores)
    best = int(np.argmin(means)) if rates else 0
    around = slice(best - 1, best + 2)
    if best in (0, len(rates) - 1) or not np.isfinite(means[around]).all():
        return None
    a, b, c = map(float, np.polyfit(np.log2(rates[around]), means[around], 2))
    return (a, b, c) if a > 0 else None


def _means(scores: Scores) -> tuple[list[float], np.ndarray]:
    rates = sorted(scores)
    means = np.array([np.mean(scores[rate]) for rate in rates])
    return rates, np.where(np.isfinite(means), means, np.inf)


def _inside(scores: Scores) -> bool:
    return 0 < int(np.argmin(_means(scores)[1])) < len(scores) - 1


def _beyond(scores: Scores) -> float:
    rates, means = _means(scores)
    low = int(np.argmin(means)) < len(rates) / 2
    return rates[0] / 2 if low else rates[-1] * 2
