"""Loss as a power law of size, `floor + scale * size ** -exponent`, with the predicted gain at a larger size; and loss over depth
and parallel layers at one budget.

Power laws are fitted by variable projection: least squares over the exponent; given it, floor and scale are a linear problem.
Their intervals are t intervals with the standard error of a bootstrap over seeds. Seeds are drawn jointly for all arms and
sizes, so that arms stay paired. A percentile interval would be too narrow with few seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import least_squares

from stacklm.lab.statistics import ALPHA, interval

FEWEST = 5
"""Minimum number of sizes: three parameters are fitted, and at least two degrees of freedom are needed to judge the fit."""
BEYOND = 4
"""The gain is predicted at this multiple of the largest size."""
FEWEST_SHAPES = 5
"""Minimum number of stacked models with different (S, N)."""
FLATTEST, STEEPEST = 1e-2, 4.0
DRAWS = 200


@dataclass(frozen=True)
class Law:
    """`floor + scale * (size / reference) ** -exponent`; the reference is the largest size, where the loss is floor + scale."""

    floor: float
    scale: float
    exponent: float
    reference: float

    def at(self, size: ArrayLike) -> NDArray[np.float64]:
        return self.floor + self.scale * (np.asarray(size, float) / self.reference) ** -self.exponent


@dataclass(frozen=True)
class Estimate:
    """A number with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scaling:
    """Laws of all arms, exponents with intervals, and the predicted relative difference of each candidate at `size` parameters:
    `BEYOND` times the baseline's largest size."""

    laws: Mapping[str, Law]
    exponents: Mapping[str, Estimate]
    beyond: Mapping[str, Estimate]
    size: float


def fit_law(sizes: Sequence[float], losses: ArrayLike, start: float = 0.3) -> Law:
    """Fit a law to one loss per size by least squares; `start` is the initial exponent.

    Raises `ValueError` for fewer than `FEWEST` sizes.
    """
    x, y = np.asarray(sizes, float) / max(sizes), np.asarray(losses, float)
    if x.size < FEWEST or x.shape != y.shape:
        raise ValueError(f"cannot fit a power law to {y.size} losses at {x.size} sizes; at least {FEWEST} of each are needed")

    def solved(log_exponent: NDArray[np.float64]) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        design = np.stack([np.ones_like(x), x ** -math.exp(log_exponent[0])], axis=1)
        linear = np.linalg.lstsq(design, y, rcond=None)[0]
        return linear, design @ linear - y

    bounds = math.log(FLATTEST), math.log(STEEPEST)
    found = least_squares(lambda exponent: solved(exponent)[1], [math.log(start)], bounds=bounds, x_scale=0.1).x
    floor, scale = solved(found)[0]
    return Law(float(floor), float(scale), math.exp(found[0]), float(max(sizes)))


def fit_scaling(
    sizes: Mapping[str, Sequence[float]], scores: Mapping[str, NDArray[np.float64]], level: float = ALPHA, draws: int = DRAWS
) -> Scaling:
    """Fit the laws of the baseline and the candidates to scores [C, S] of C sizes with the same S seeds."""
    largest = BEYOND * max(sizes["baseline"])
    ratio = {name: largest * max(own) / max(sizes["baseline"]) for name, own in sizes.items()}

    def fitted(means: Mapping[str, NDArray[np.float64]], start: Mapping[str, float]) -> tuple[dict[str, Law], dict[str, float]]:
        laws = {name: fit_law(own, means[name], start[name]) for name, own in sizes.items()}
        ahead = {name: float(law.at(ratio[name])) for name, law in laws.items()}
        return laws, {name: value / ahead["baseline"] - 1 for name, value in ahead.items() if name != "baseline"}

    laws, gains = fitted({name: own.mean(axis=1) for name, own in scores.items()}, dict.fromkeys(sizes, 0.3))
    exponents = {name: law.exponent for name, law in laws.items()}
    S, generator, drawn = scores["baseline"].shape[1], np.random.default_rng(0), []
    for _ in range(draws):
        seeds = generator.integers(S, size=S)
        again, ahead = fitted({name: own[:, seeds].mean(axis=1) for name, own in scores.items()}, exponents)
        drawn.append(({name: law.exponent for name, law in again.items()}, ahead))
    wide = float(stats.t.isf(level, S - 1)) * math.sqrt(S / (S - 1))

    def estimates(values: Mapping[str, float], which: int) -> dict[str, Estimate]:
        half = {name: wide * float(np.std([one[which][name] for one in drawn])) for name in values}
        return {name: Estimate(value, value - half[name], value + half[name]) for name, value in values.items()}

    return Scaling(laws, estimates(exponents, 0), estimates(gains, 1), largest)


@dataclass(frozen=True)
class DepthFit:
    """`floor + serial / S + parallel / (S N)` for models of S stacks of N layers at one budget.

    If only depth lowers the loss, `parallel` is zero; if layers average like an ensemble wherever they are, `serial` is zero.
    """

    floor: Estimate
    serial: Estimate
    parallel: Estimate
    shapes: tuple[tuple[int, int], ...]
    losses: NDArray[np.float64]
    """Mean over seeds for each shape."""
    residual: float
    """Root mean square of the residuals of the means, relative to their mean."""

    def at(self, stacks: ArrayLike, layers: ArrayLike) -> NDArray[np.float64]:
        S, N = np.asarray(stacks, float), np.asarray(layers, float)
        return self.floor.value + self.serial.value / S + self.parallel.value / (S * N)


def fit_depth(shapes: Sequence[tuple[int, int]], scores: ArrayLike, level: float = ALPHA) -> DepthFit | None:
    """Fit by least squares over shapes (S, N) to scores [shapes, seeds]; None if the shapes do not identify the three terms.

    The fit is linear in the losses, so every seed gets its own, and intervals are t intervals over these. They include the noise
    of seeds, but not the misfit of the model itself: see `residual`.
    """
    S, N = np.array(shapes, float).reshape(-1, 2).T
    design = np.stack([np.ones_like(S), 1 / S, 1 / (S * N)], axis=1)
    if len({*shapes}) < FEWEST_SHAPES or np.linalg.matrix_rank(design) < design.shape[1]:
        return None
    losses = np.asarray(scores, float)
    each, means = np.linalg.lstsq(design, losses, rcond=None)[0], losses.mean(axis=1)
    floor, serial, parallel = (Estimate(float(own.mean()), *interval(own, level)) for own in each)
    residual = float(np.sqrt(np.square(means - design @ each.mean(axis=1)).mean()) / means.mean())
    return DepthFit(floor, serial, parallel, tuple(shapes), means, residual)
