"""Loss against tokens, compute and time, as PNGs for light and for dark pages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stacklm.report.runs import Run
from stacklm.report.units import count, duration, quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAIN_POINTS = 60
"""Training losses are averaged over neighbouring steps down to this many points: a single batch is mostly noise."""
MOST_TICKS = 4

PALETTES = {  # Okabe and Ito's colours, told apart by colour-blind readers, with the tones that each page can carry
    "light": ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    "dark": ("#56b4e9", "#e69f00", "#2fc79a", "#e39fc6", "#f0e442", "#7fa8ff"),
}
_MARKERS = "os^DvP"
INK = {"light": ("#ffffff", "#1c2024", "#5f6770", "#e3e6e9"), "dark": ("#181b1f", "#e8eaed", "#a3abb3", "#33393f")}
"""Of paper, ink, faint ink and grid."""


@dataclass(frozen=True)
class Axis:
    """What a loss is drawn against: `values` gives it for every row of metrics."""

    title: str
    values: Callable[[Run], np.ndarray]
    readable: Callable[[float], str]
    ticks: Sequence[float]


_DECIMAL = [digit * 10.0**exponent for exponent in range(27) for digit in (1, 2, 5)]
_CLOCK = [
    *(unit * number for unit in (0.01, 0.1) for number in (1, 2, 5)),
    *(unit * number for unit in (1, 60) for number in (1, 2, 5, 10, 20, 30)),
    *(3600 * number for number in (1, 2, 5, 12, 24, 48, 120, 240, 480, 1200, 2400)),
]
AXES = {
    "tokens": Axis("training tokens", lambda run: column(run, "tokens"), count, _DECIMAL),
    "flops": Axis("training compute (FLOP)", lambda run: column(run, "flops"), lambda value: quantity(value, ""), _DECIMAL),
    "time": Axis("training time", lambda run: _seconds(run), duration, _CLOCK),
}


def draw_curves(runs: Sequence[Run], folder: Path) -> list[str]:
    """Write `loss-{axis}-{theme}.png` for both themes and return the names of the axes drawn.

    Runs without timing are left out of the plot against time; where none has any, there is no such plot.
    """
    drawn = []
    for name, axis in AXES.items():
        styled = [(i, run) for i, run in enumerate(runs) if name != "time" or run.timing]
        if styled:
            for theme in PALETTES:
                _draw(styled, axis, theme, folder / f"loss-{name}-{theme}.png")
            drawn.append(name)
    return drawn


@contextmanager
def drawing(path: Path, theme: str, size: tuple[float, float] = (4.4, 3.6)) -> Iterator[Axes]:
    """Axes of a plot to be filled, which is then written to `path` in the colours of a theme; `size` is in inches."""
    import matplotlib
    import matplotlib.style
    from matplotlib.figure import Figure

    paper, ink, faint, grid = INK[theme]
    looks = {
        "figure.facecolor": paper, "axes.facecolor": paper, "axes.edgecolor": grid, "grid.color": grid, "text.color": ink,
        "axes.labelcolor": faint, "xtick.color": faint, "ytick.color": faint, "font.size": 10, "axes.axisbelow": True,
    }  # fmt: skip
    with matplotlib.style.context(["default", looks]):  # whatever the user's own matplotlibrc says
        figure = Figure(figsize=size, dpi=180, layout="constrained")
        axes = figure.add_subplot()
        axes.grid(True, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(which="both", length=0)
        yield axes
        figure.savefig(path, format="png", metadata={"Software": None})


def _draw(styled: Sequence[tuple[int, Run]], axis: Axis, theme: str, path: Path) -> None:
    with drawing(path, theme) as axes:
        ends = [_draw_run(axes, run, axis, nth(PALETTES[theme], i), nth(_MARKERS, i)) for i, run in styled]
        _scale(axes, axis)
        label(axes, ends, INK[theme][0])


def _draw_run(axes: Axes, run: Run, axis: Axis, colour: str, marker: str) -> tuple[str, float, float, str]:
    """Draw one model's training and validation loss; return its name, its last validation point and its colour."""
    x = axis.values(run)
    train, valid = column(run, "train_loss"), column(run, "valid_loss")
    start = x[np.isfinite(valid) & (x > 0)][0] / 2  # the fall from the first guess would press the rest into a corner
    for values, width, alpha, mark in ((train, 1.0, 0.45, ""), (valid, 2.0, 1.0, marker)):
        known = np.isfinite(values) & (x >= start)
        points = (x[known], values[known]) if mark else _thinned(x[known], values[known])
        axes.plot(*points, color=colour, linewidth=width, alpha=alpha, marker=mark, markersize=4.5)
    return run.name, x[known][-1], values[known][-1], colour


def _scale(axes: Axes, axis: Axis) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [tick for tick in axis.ticks if low <= tick <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // MOST_TICKS) or 1]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: axis.readable(value)))
    axes.set_xlabel(axis.title)
    axes.set_ylabel("loss (nats per token)")


def label(axes: Axes, ends: Sequence[tuple[str, float, float, str]], paper: str) -> None:
    """Write names beside the ends of lines (name, x, y, colour), moved apart where lines end close together."""
    from matplotlib.patheffects import withStroke

    axes.autoscale_view()
    place = axes.transData + axes.transAxes.inverted()
    ends = sorted(((name, x, place.transform((x, y))[1], colour) for name, x, y, colour in ends), key=lambda end: end[2])
    heights = spread([height for _, _, height, _ in ends], gap=0.065)
    for (name, x, _, colour), height in zip(ends, heights, strict=True):
        axes.annotate(
            name, (x, height), (8, 0), xycoords=("data", "axes fraction"), textcoords="offset points", va="center", color=colour,
            size=9, weight="bold", path_effects=[withStroke(linewidth=3, foreground=paper)],
        )  # fmt: skip


def spread(values: Sequence[float], gap: float) -> list[float]:
    """The nearest increasing values at least `gap` apart, the whole group kept around its centre."""
    placed: list[float] = []
    for value in values:
        placed.append(max(value, placed[-1] + gap) if placed else value)
    shift = (sum(values) - sum(placed)) / len(placed)
    return [value + shift for value in placed]


def nth(looks: Sequence[str], i: int) -> str:
    return looks[i % len(looks)]


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over neighbouring points, at most `TRAIN_POINTS` of them."""
    pieces = min(len(x), TRAIN_POINTS)
    return tuple(np.array([piece.mean() for piece in np.array_split(values, pieces)]) for values in (x, y))


def column(run: Run, key: str) -> np.ndarray:
    """One value a row of metrics, NaN where a row has none."""
    values: list[Any] = [row.get(key) for row in run.metrics]
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def _seconds(run: Run) -> np.ndarray:
    """Seconds of training at every row of metrics, interpolated between the steps that were timed."""
    steps = [0, *(row["step"] for row in run.timing)]
    return np.interp(column(run, "step"), steps, [0.0, *(row["seconds"] for row in run.timing)])
