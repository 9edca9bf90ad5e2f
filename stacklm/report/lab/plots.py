"""Plots of intervals with the margin, loss against every budget, and learning rates, as SVGs for light and dark pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from stacklm.config.model import Dense
from stacklm.lab.diagnostics import Correlation
from stacklm.lab.findings import Findings
from stacklm.lab.scaling import DepthFit
from stacklm.lab.statistics import relative_differences
from stacklm.lab.tuning import parabola
from stacklm.report.plots import LIGHT, MARKERS, MOST_TICKS, End, Figure, Interval, draw_intervals, drawing, log_ticks, nth
from stacklm.units import count, duration, quantity

BUDGETS: dict[str, tuple[str, Callable[[float], str]]] = {
    "parameters": ("parameters", count),
    "training_flops": ("training FLOPs", lambda value: quantity(value, "")),
    "tokens": ("training tokens", count),
    "seconds": ("training time", duration),
}
EQUAL = 0.02
"""A budget in which arms and sizes differ by less than this fraction is not plotted."""


def draw_candidates(findings: Findings, folder: Path) -> Figure:
    """Draw a forest plot: for every candidate and size the mean difference and its interval, each seed, and the margin.

    A thinner line below is the interval over seeds and documents, if records have scores of documents.
    """
    rows, several = [], len(findings.results) > 1
    for name in findings.candidates:
        for size, result in findings.results.items():
            verdict = result.verdicts[name]
            each = relative_differences(result.scores[name], result.scores["baseline"])
            label = f"{name}, size {size:g}" if several else name
            wider = findings.over_documents(name, size)
            rows.append(Interval(label, verdict.mean, verdict.low, verdict.high, each.tolist(), _colour(findings, name), wider))
    figure = Figure(folder / "intervals.svg", "Relative differences in test bits per byte with intervals and the margin")
    return draw_intervals(rows, findings.lab.experiment.margin, "difference from the baseline in test bits per byte", figure)


def differs(findings: Findings, axis: str) -> bool:
    """Return whether arms or sizes differ in that budget by more than `EQUAL`."""
    values = [x for line in _lines(findings, axis).values() for x in line]
    return max(values) > (1 + EQUAL) * min(values)


def _lines(findings: Findings, axis: str) -> dict[str, list[float]]:
    """Return the value of every arm on an axis, by size."""

    def taken(name: str, size: float) -> float:
        return findings.seconds(name, size) if axis == "seconds" else getattr(findings.arm(name, size).cost, axis)

    return {name: [taken(name, size) for size in findings.results] for name in findings.names}


def draw_budget(findings: Findings, axis: str, folder: Path) -> Figure:
    """Draw loss against a budget: means over seeds, with a band of one sd."""
    (title, readable), path = BUDGETS[axis], folder / f"budget-{axis}.svg"
    with drawing(path, title, "test bits per byte") as (axes, ends):
        for place, (name, x) in enumerate(_lines(findings, axis).items()):
            scores = [np.array(result.scores[name]) for result in findings.results.values()]
            mean, sd = np.array([one.mean() for one in scores]), np.array([one.std(ddof=1) for one in scores])
            colour, marker = _colour(findings, name), nth(MARKERS, place)
            axes.errorbar(x, mean, sd, color=colour, linewidth=2, marker=marker, markersize=5, elinewidth=1.2, capsize=3)
            axes.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)
            if axis == "parameters" and findings.scaling:
                dense = np.geomspace(min(x), max(x), 60)
                axes.plot(dense, findings.scaling.laws[name].at(dense), color=colour, linewidth=1, linestyle="dotted")
            ends.append(End(name, x[-1], mean[-1], colour))
        values = [x for line in _lines(findings, axis).values() for x in line]
        low, high = min(values), max(values)
        axes.set_xlim(low * (low / high) ** 0.1, high * (high / low) ** 0.1)
        log_ticks(axes, list(np.geomspace(low, high, MOST_TICKS if high / low > 1.5 else 2)), readable)
    return Figure(path, f"Test bits per byte of every arm against {title}", title)


def draw_rates(findings: Findings, size: float, folder: Path) -> Figure:
    """Draw the valid score of every arm of a size over log2 of the learning rate, with the parabola that gives the best rate."""
    path, tuning = folder / f"rates-{size:g}.svg", findings.tunings[size]
    with drawing(path, "learning rate, powers of 2", "valid bits per byte") as (axes, ends):
        for place, (name, scores) in enumerate(tuning.scores.items()):
            colour, marker = _colour(findings, name), nth(MARKERS, place)
            known = {rate: float(np.mean(own)) for rate, own in sorted(scores.items()) if np.isfinite(own).all()}
            x, bowl = np.log2(list(known)), parabola(scores)
            axes.plot(x, list(known.values()), color=colour, marker=marker, markersize=5, linewidth=1.2, alpha=0.8)
            if bowl:
                a, b, c = bowl
                best = -b / (2 * a)
                around = np.linspace(best - 1, best + 1, 40)
                axes.plot(around, a * around**2 + b * around + c, color=colour, linewidth=2.4, alpha=0.5)
                axes.plot([best], [c - b**2 / (4 * a)], "*", color=colour, markersize=13, markeredgecolor=LIGHT.paper)
            if known:
                ends.append(End(name, x[-1], [*known.values()][-1], colour))
        low, high = (round(end) for end in axes.get_xlim())
        ticks = range(low, high + 1, -(-(high - low) // MOST_TICKS) or 1)
        axes.set_xticks(ticks, [f"{2.0**tick:.1e}" for tick in ticks])
    return Figure(path, f"Valid bits per byte over learning rates at size {size:g}", f"size {size:g}")


def draw_depth(findings: Findings, fit: DepthFit, folder: Path) -> Figure:
    """Draw loss over N, with a line per S: means over seeds, and the fit. Dense models are grey lines."""
    final, path = findings.final, folder / "depth.svg"
    assert final
    widest = max(N for _, N in fit.shapes)
    with drawing(path, "parallel layers per stack, N", "test bits per byte") as (axes, ends):
        scale = np.geomspace(1, widest, 40)
        for place, depth in enumerate(sorted({S for S, _ in fit.shapes})):
            colour = nth(LIGHT.lines, place)
            line = sorted((N, loss) for (S, N), loss in zip(fit.shapes, fit.losses, strict=True) if depth == S)
            axes.plot(*zip(*line, strict=True), color=colour, marker=nth(MARKERS, place), markersize=5, linewidth=2)
            axes.plot(scale, fit.at(depth, scale), color=colour, linewidth=1, linestyle="dotted")
            ends.append(End(f"S = {depth}", *line[-1], colour))
        for name, scores in final.scores.items():
            if isinstance(dense := findings.arm(name, final.size).model.architecture, Dense):
                axes.axhline(float(np.mean(scores)), color=LIGHT.faint, linewidth=1, linestyle="dashed")
                ends.append(End(f"{dense.n_layers} dense", widest, float(np.mean(scores)), LIGHT.faint))
        axes.set_xscale("log", base=2)
        ticks = sorted({N for _, N in fit.shapes})
        axes.set_xticks(ticks, [str(N) for N in ticks])
    return Figure(
        path, "Test bits per byte against parallel layers, for every number of stacks, with dense models of the same budget"
    )


def draw_ranks(found: Correlation, folder: Path) -> Figure:
    """Draw accuracy on a synthetic task against bits per byte, with the sd over seeds of both."""
    figure = Figure(folder / "ranks.svg", "Test accuracy on the synthetic task against test bits per byte, one point per arm")
    with drawing(figure.path, "test accuracy (%)", "test bits per byte") as (axes, _):
        for i, name in enumerate(found.arms):
            x, y, colour = 100 * found.accuracy[i], found.bits[i], nth(LIGHT.lines, i)
            axes.errorbar(x.mean(), y.mean(), y.std(ddof=1), x.std(ddof=1), fmt="o", color=colour, markersize=6, elinewidth=1)
            axes.annotate(name, (x.mean(), y.mean()), (6, 4), textcoords="offset points", color=colour, size=8)
        axes.margins(0.15)
    return figure


def _colour(findings: Findings, name: str) -> str:
    """Return grey for the baseline, and for candidates the colours of their cards."""
    return LIGHT.faint if name == "baseline" else nth(LIGHT.lines, findings.candidates.index(name))
