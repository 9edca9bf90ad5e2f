"""Scaling laws fitted to simulated losses with a known law."""

from __future__ import annotations

import numpy as np
import pytest

from stacklm.lab.scaling import BEYOND, Law, fit_depth, fit_law, fit_scaling
from stacklm.lab.statistics import ALPHA

SIZES = [1e5, 4e5, 1.6e6, 6.4e6, 2.56e7]
TRUTH = {"baseline": Law(1.5, 0.3, 0.25, SIZES[-1]), "steeper": Law(1.5, 0.28, 0.30, SIZES[-1])}


@pytest.mark.parametrize("law", [*TRUTH.values(), Law(0.0, 2.0, 0.07, SIZES[-1]), Law(1.9, 0.01, 1.1, SIZES[-1])])
def test_a_law_without_noise_is_found(law):
    found = fit_law(SIZES, law.at(SIZES))
    assert (found.floor, found.scale, found.exponent) == pytest.approx((law.floor, law.scale, law.exponent), abs=1e-4)
    assert found.at(SIZES) == pytest.approx(law.at(SIZES), rel=1e-7)


def test_fewer_sizes_are_refused():
    with pytest.raises(ValueError, match="a power law to 4 losses at 4 sizes; at least 5"):
        fit_law(SIZES[:4], TRUTH["baseline"].at(SIZES[:4]))


@pytest.mark.parametrize("trials", [5, pytest.param(150, marks=pytest.mark.slow)])
def test_intervals_cover_the_truth_and_pairing_narrows_the_gain(trials):
    """Over many experiments of five seeds with noise that is mostly common to both arms."""
    generator, seeds = np.random.default_rng(0), 5
    missed, widths = {"exponent": 0, "gain": 0}, []
    truth = TRUTH["steeper"].at(BEYOND * SIZES[-1]) / TRUTH["baseline"].at(BEYOND * SIZES[-1]) - 1
    for _ in range(trials):
        common = generator.normal(0, 0.003, (5, seeds))
        scores = {
            name: law.at(SIZES)[:, None] * (1 + common + generator.normal(0, 0.0005, (5, seeds))) for name, law in TRUTH.items()
        }
        found = fit_scaling(dict.fromkeys(TRUTH, SIZES), scores, draws=25)
        exponent, gain = found.exponents["baseline"], found.beyond["steeper"]
        missed["exponent"] += not exponent.low < 0.25 < exponent.high
        missed["gain"] += not gain.low < truth < gain.high
        widths.append((gain.high - gain.low) / 2)
    most = 2 * ALPHA + 4 * (2 * ALPHA * (1 - 2 * ALPHA) / trials) ** 0.5
    assert max(missed.values()) / trials < most
    assert np.median(widths) < 0.003  # without pairs about 0.009


SHAPES = [(1, 1), (1, 4), (2, 1), (2, 4), (3, 1), (3, 2), (5, 1)]


@pytest.mark.parametrize(("serial", "parallel"), [(0.2, 0.05), (0.0, 0.1), (0.3, 0.0)])
def test_what_depth_and_parallel_layers_do_is_found_with_intervals_that_hold_it(serial, parallel):
    S, N = np.array(SHAPES, float).T
    losses = 1.8 + serial / S + parallel / (S * N)
    exact = fit_depth(SHAPES, np.stack([losses] * 3, axis=1))
    assert [one.value for one in (exact.floor, exact.serial, exact.parallel)] == pytest.approx([1.8, serial, parallel], abs=1e-10)
    assert exact.residual < 1e-10 and exact.at(2, 4) == pytest.approx(losses[3])
    noisy = fit_depth(SHAPES, losses[:, None] + np.random.default_rng(1).normal(0, 0.01, (len(SHAPES), 8)))
    for one, truth in ((noisy.floor, 1.8), (noisy.serial, serial), (noisy.parallel, parallel)):
        assert one.low < truth < one.high and one.high - one.low < 0.1


@pytest.mark.parametrize(
    "shapes", [SHAPES[:4], [(1, n) for n in (1, 2, 3, 4, 5)], [(s, 1) for s in (1, 2, 3, 4, 5)], SHAPES[:4] * 2]
)
def test_shapes_that_do_not_tell_depth_from_parallel_layers_give_no_fit(shapes):
    assert fit_depth(shapes, np.ones((len(shapes), 3))) is None
