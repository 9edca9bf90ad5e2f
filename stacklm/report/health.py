"""The health of each model over its steps, as PNGs for light and for dark pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from stacklm.report.plots import INK, PALETTES, column, drawing, label, nth
from stacklm.report.runs import Run

KINDS = {"relative_update": "change of one step / weights", "activation": "RMS of what leaves a part"}
"""The figures that are drawn, `health/<kind>/<where>` in the rows of metrics, with the title of their axis."""
MOST_LINES = 6


def draw_health(runs: Sequence[Run], folder: Path) -> list[tuple[str, str]]:
    """Write `health-{kind}-{model}-{theme}.png` for both themes; return the pairs of kind and model drawn.

    Runs whose rows have no such figures are left out. Of many parts some are shown, evenly spaced, the first and the last
    among them.
    """
    drawn = []
    for run in runs:
        for kind in KINDS:
            lines = _some(list(_lines(run, kind)))
            if lines:
                for theme in PALETTES:
                    _draw(lines, kind, theme, folder / f"health-{kind}-{run.name}-{theme}.png")
                drawn.append((kind, run.name))
    return drawn


def _lines(run: Run, kind: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Where, steps and values of all figures of a kind."""
    steps = column(run, "step")
    for key in dict.fromkeys(key for row in run.metrics for key in row if key.startswith(f"health/{kind}/")):
        values = column(run, key)
        known = np.isfinite(values) & (values > 0)
        if known.any():
            yield key.rpartition("/")[2], steps[known], values[known]


def _some(lines: list) -> list:
    return [lines[i] for i in np.unique(np.linspace(0, len(lines) - 1, min(len(lines), MOST_LINES)).round().astype(int))]


def _draw(lines: Sequence[tuple[str, np.ndarray, np.ndarray]], kind: str, theme: str, path: Path) -> None:
    from matplotlib.ticker import LogFormatter

    with drawing(path, theme) as axes:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
        ends = []
        for i, (name, steps, values) in enumerate(lines):
            colour = nth(PALETTES[theme], i)
            axes.plot(steps, values, color=colour, linewidth=2, marker="o", markersize=3)
            ends.append((name, steps[-1], values[-1], colour))
        axes.set_xlabel("step")
        axes.set_ylabel(KINDS[kind])
        label(axes, ends, INK[theme][0])
