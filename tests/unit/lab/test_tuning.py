"""Learning rates are bracketed, with equally many trials for every arm."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stacklm.lab.tuning import MOST, best_rate, first_rates, next_rates, parabola


def bowl(best: float, seeds: int = 2):
    """Losses that are a parabola in log2 of the rate."""
    return lambda rate: [2.0 + 0.01 * math.log2(rate / best) ** 2 + 0.001 * seed for seed in range(seeds)]


def search(losses: dict, start: float = 1e-3, points: int = 5) -> dict[str, dict[float, list[float]]]:
    arms = {name: {rate: loss(rate) for rate in first_rates(start, points)} for name, loss in losses.items()}
    while more := next_rates(arms):
        for name, rate in more.items():
            assert rate not in arms[name]
            arms[name][rate] = losses[name](rate)
    return arms


def test_the_grid_doubles_around_the_given_rate():
    assert first_rates(1e-3, 5) == [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]


def test_the_minimum_of_a_parabola_is_found_exactly_with_equal_trials():
    losses = {"inside": bowl(1.3e-3), "low": bowl(3e-5), "high": bowl(0.1)}
    arms = search(losses)
    for name, best in (("inside", 1.3e-3), ("low", 3e-5), ("high", 0.1)):
        assert best_rate(arms[name]) == pytest.approx(best, rel=1e-9)
    assert len({len(scores) for scores in arms.values()}) == 1


def test_no_parabola_goes_through_too_few_rates():
    assert parabola({}) is None and parabola({1e-3: [1.0], 2e-3: [0.9]}) is None
    assert parabola({1e-3: [1.0], 2e-3: [0.9], 4e-3: [math.nan]}) is None
    a, b, c = parabola(search({"a": bowl(1.3e-3)})["a"])
    assert -b / (2 * a) == pytest.approx(math.log2(1.3e-3)) and c - b**2 / (4 * a) == pytest.approx(2.0005)


def test_no_arm_is_extended_once_all_are_inside():
    assert all(len(scores) == 5 for scores in search({"a": bowl(1.3e-3), "b": bowl(0.8e-3)}).values())


def test_a_search_ends_where_the_loss_only_falls():
    scores = search({"endless": lambda rate: [1 / rate]})["endless"]
    assert len(scores) == MOST and best_rate(scores) == max(scores)


def test_rates_that_diverge_are_not_chosen():
    def loss(rate: float) -> list[float]:
        return [math.nan if rate > 3e-3 else 2 - rate]

    scores = search({"a": loss})["a"]
    assert best_rate(scores) == 2e-3
    with pytest.raises(ValueError, match=r"every learning rate from 0\.001 to 0\.004 diverged"):
        best_rate({1e-3: [np.inf], 2e-3: [math.nan], 4e-3: [math.nan]})


def test_unequal_trials_are_refused():
    with pytest.raises(ValueError, match="unequal trials"):
        next_rates({"a": {1e-3: [1.0]}, "b": {1e-3: [1.0, 1.1]}})
