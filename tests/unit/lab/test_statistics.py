"""Each estimator on simulated data with a known result; tolerances are four standard errors of the simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from stacklm.lab import statistics
from stacklm.lab.statistics import (
    ALPHA,
    against_itself,
    bootstrap_interval,
    interval,
    judge,
    relative_differences,
    seeds_needed,
    sequential_level,
    sequential_verdict,
    smallest_detectable,
    verdicts,
)

MARGIN = 0.005


def error(rate: float, trials: int) -> float:
    """Four standard errors of a share."""
    return 4 * np.sqrt(rate * (1 - rate) / trials)


@pytest.mark.parametrize("seeds", [5, 8, 10, 30])
def test_the_smallest_detectable_difference_is_near_the_usual_approximation(seeds):
    """Which adds two quantiles of the central t distribution: too small by a tenth at 3 seeds, by less with more."""
    usual = (stats.t.isf(ALPHA, seeds - 1) + stats.t.isf(0.2, seeds - 1)) / np.sqrt(seeds)
    assert smallest_detectable(seeds) == pytest.approx(usual, rel=0.06)


@pytest.mark.parametrize("seeds", [3, 10])
def test_the_smallest_detectable_difference_is_detected_as_often_as_said(seeds):
    true = smallest_detectable(seeds, sd=0.002)
    values = np.random.default_rng(1).normal(true, 0.002, (20_000, seeds))
    found = np.mean(stats.ttest_1samp(values, 0, axis=1, alternative="greater").pvalue < ALPHA)
    assert found == pytest.approx(0.8, abs=error(0.8, 20_000))


def test_as_many_seeds_as_needed_are_enough_and_one_less_is_not():
    for effect in (0.3, 1.0, 3.0):
        n = seeds_needed(effect * 0.004, 0.004)
        assert n is not None and smallest_detectable(n) <= effect < smallest_detectable(n - 1)
    assert seeds_needed(1e-9, 1.0) is None
    assert seeds_needed(-1.0, 1.0) is None
    assert seeds_needed(0.001, 0.0) == 2


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_the_interval_covers_as_often_as_said(seeds):
    values = np.random.default_rng(2).normal(0.003, 0.001, (4_000, seeds))
    ends = np.array([interval(row) for row in values])
    for missed in (ends[:, 0] > 0.003, ends[:, 1] < 0.003):
        assert missed.mean() == pytest.approx(ALPHA, abs=error(ALPHA, 4_000))


@pytest.mark.parametrize(
    ("differences", "outcome"),
    [
        ([-0.010, -0.011, -0.012], "better"),
        ([0.0010, 0.0012, 0.0011], "not worse"),
        ([0.010, 0.011, 0.012], "worse"),
        ([0.002, 0.012, -0.001], "no verdict"),
        ([-0.010, 0.002, -0.003], "no verdict"),
    ],
)
def test_verdicts_of_clear_cases(differences, outcome):
    verdict = verdicts({"candidate": differences}, MARGIN)["candidate"]
    assert verdict.outcome == outcome
    assert (verdict.low, verdict.high) == interval(differences) and verdict.low < verdict.mean < verdict.high
    assert (verdict.more_seeds is not None) == (outcome == "no verdict")


def test_the_seeds_that_are_said_to_decide_do_so_as_often_as_said():
    first = judge(np.array([0.002, 0.006, -0.001, 0.004]), MARGIN)
    assert first.outcome == "no verdict" and first.more_seeds
    values = np.random.default_rng(3).normal(first.mean, first.sd, (2_000, first.seeds + first.more_seeds))
    decided = np.mean([judge(row, MARGIN).outcome in ("better", "not worse") for row in values])
    assert 0.8 - error(0.8, 2_000) < decided < 0.9


@pytest.mark.parametrize("truths", [(MARGIN,) * 3, (0.0, MARGIN, -0.02)])
def test_no_wrong_claim_over_all_candidates_more_often_than_said(truths):
    """Better though the mean is 0, or not worse though it is the margin: with and without candidates that are much better."""
    generator, wrong, trials = np.random.default_rng(4), 0, 800
    for _ in range(trials):
        found = verdicts({str(i): generator.normal(true, 0.002, 5) for i, true in enumerate(truths)}, MARGIN)
        wrong += any(
            (true == 0 and found[str(i)].outcome == "better")
            or (true == MARGIN and found[str(i)].outcome in ("better", "not worse"))
            for i, true in enumerate(truths)
        )
    assert wrong / trials < ALPHA + error(ALPHA, trials)


def test_more_candidates_need_more_and_a_winner_hands_its_level_on():
    clear, close = [-0.010, -0.011, -0.012], [-0.0010, -0.0030, -0.0020, -0.0026]
    alone = verdicts({"close": close}, MARGIN)["close"]
    beside = verdicts({"close": close, "clear": clear, "worse": [0.02, 0.03, 0.04]}, MARGIN)
    assert alone.level == ALPHA and alone.outcome == "better"
    assert beside["clear"].level == ALPHA / 3
    assert (beside["close"].level, beside["close"].outcome) == (ALPHA / 2, "better")
    assert beside["worse"].level == ALPHA
    assert verdicts({}, MARGIN) == {}


def test_the_winners_are_those_of_statsmodels_holm():
    generator = np.random.default_rng(7)
    for _ in range(8):
        values = {str(i): generator.normal(-0.002 * i, 0.002, 4) for i in range(4)}
        p = [stats.ttest_1samp(value, 0, alternative="less").pvalue for value in values.values()]
        found = [verdict.outcome == "better" for verdict in verdicts(values, MARGIN).values()]
        assert found == list(multipletests(p, ALPHA, method="holm")[0])


def test_differences_that_do_not_vary_are_judged():
    same = verdicts({"same": [0.0, 0.0, 0.0]}, MARGIN)["same"]
    assert (same.outcome, same.low, same.high) == ("not worse", 0, 0)


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(ValueError, match="1 seeds give no interval"):
        verdicts({"a": [0.1]}, MARGIN)
    with pytest.raises(ValueError, match="margin must be above 0"):
        verdicts({"a": [0.1, 0.2]}, 0)
    with pytest.raises(ValueError, match="cannot be paired"):
        relative_differences([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="finite and positive"):
        relative_differences([1.0, np.nan], [1.0, 1.0])
    assert relative_differences([1.1, 0.9], [1.0, 1.0]) == pytest.approx([0.1, -0.1])


@pytest.mark.parametrize("seeds", [4, 10, 21])
def test_against_itself_noise_has_a_winner_as_often_as_the_test_errs(seeds):
    """Seeds are exchangeable, so that this holds on average over experiments, whatever the distribution of p values in one."""
    found = [against_itself(np.random.default_rng(i).normal(1.5, 0.003, seeds), shuffles=100) for i in range(200)]
    assert {one.pairs for one in found} == {seeds // 2}
    rates = np.array([one.false_wins for one in found])
    assert rates.mean() == pytest.approx(2 * ALPHA, abs=4 * rates.std() / np.sqrt(200))
    # the mean of a sample sd is below the true one: by a fifth for 2 values
    sds = np.array([one.sd for one in found])
    low = np.sqrt(2 / np.pi) if seeds < 6 else 0.9
    assert low * 0.9 < sds.mean() / (np.sqrt(2) * 0.003 / 1.5) < 1.05


def test_against_itself_three_seeds_are_too_few():
    with pytest.raises(ValueError, match="3 seeds cannot be paired"):
        against_itself([1.0, 2.0, 3.0])


def test_the_bootstrap_covers_the_truth_over_seeds_and_documents():
    """Nats of many seeds and documents with noise of both kinds: the interval of one small experiment holds the mean of all."""
    generator, missed, trials, seeds, documents = np.random.default_rng(5), 0, 200, 20, 40
    for _ in range(trials):
        sizes = generator.integers(500, 4_000, documents)
        hard = generator.normal(1, 0.2, documents)
        effect = 0.01 + generator.normal(0, 0.01, documents) + generator.normal(0, 0.004, (seeds, 1))
        noise = generator.normal(1, 0.002, (seeds, documents))
        low, high = bootstrap_interval(sizes * hard * noise * (1 + effect), np.tile(sizes * hard, (seeds, 1)), sizes, draws=400)
        missed += not low < 0.01 < high
    assert 0 < missed / trials < 2 * ALPHA + error(2 * ALPHA, trials)


def test_the_bootstrap_refuses_shapes_that_do_not_belong_together():
    with pytest.raises(ValueError, match="do not match"):
        bootstrap_interval(np.ones((3, 4)), np.ones((3, 4)), np.ones(5))


@pytest.mark.parametrize("looks", [(3, 5, 8), (3, 4, 5, 6, 7, 8, 9, 10)])
def test_looking_again_keeps_the_error_rate(looks):
    values = np.random.default_rng(6).normal(0, 1, (20_000, looks[-1]))
    level = sequential_level(looks)
    p = [stats.ttest_1samp(values[:, :n], 0, axis=1, alternative="less").pvalue for n in looks]
    assert np.mean(np.min(p, axis=0) < level) == pytest.approx(ALPHA, abs=error(ALPHA, 20_000) + error(ALPHA, 200_000))
    assert np.mean(np.min(p, axis=0) < ALPHA) > 1.5 * ALPHA  # without a correction there would be many more
    assert sequential_level(looks[:1]) == pytest.approx(ALPHA, abs=error(ALPHA, 200_000))


def test_a_sequential_verdict_stops_at_the_first_look_that_decides():
    clear = [-0.010, -0.0101, -0.0102, 0.5, 0.5]
    assert sequential_verdict(clear, (3, 5), MARGIN).seeds == 3
    open_question = [0.002, 0.012, -0.001, 0.004, 0.001]
    verdict = sequential_verdict(open_question, (3, 5, 8), MARGIN)
    assert (verdict.outcome, verdict.seeds) == ("no verdict", 5)
    with pytest.raises(ValueError, match="first look needs 3 seeds"):
        sequential_verdict(clear[:2], (3, 5), MARGIN)
    with pytest.raises(ValueError, match="increasing numbers"):
        sequential_level((5, 3))


def test_the_power_is_the_one_that_is_promised():
    assert (statistics.ALPHA, statistics.POWER) == (0.025, 0.8)
