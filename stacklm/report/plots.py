"""Plots of loss against tokens, FLOPs and time, and of training health, as SVGs for light and dark pages.

A plot has the colours of a light page; its style sheet replaces them if the reader prefers a dark one.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stacklm.files import write_text
from stacklm.report.runs import Result, by_model
from stacklm.units import count, duration, quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAIN_POINTS = 60
"""Maximum points of a training curve, averaged over neighbouring steps: the loss of a single batch is mostly noise."""
MOST_TICKS = 4
MOST_LINES = 6
"""Maximum lines in a plot of training health."""
MARKERS = "os^DvP"
KINDS = {"relative_update": "update of one step / weights", "activation": "RMS of the output"}
"""The health metrics that are plotted, `health/<kind>/<where>` in the rows of metrics, with their axis titles."""


@dataclass(frozen=True)
class Theme:
    """The colours of a light or dark page."""

    paper: str
    ink: str
    faint: str
    grid: str
    lines: tuple[str, ...]

    @property
    def colours(self) -> tuple[str, ...]:
        return (self.paper, self.ink, self.faint, self.grid, *self.lines)


# Okabe and Ito's colours, which colour-blind readers can distinguish, in shades that suit each page.
LIGHT = Theme("#ffffff", "#1c2024", "#5f6770", "#e3e6e9", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"))
DARK = Theme("#181b1f", "#e8eaed", "#a3abb3", "#33393f", ("#56b4e9", "#e69f00", "#2fc79a", "#e39fc6", "#f0e442", "#7fa8ff"))


@dataclass(frozen=True)
class Figure:
    """A plot on disk, with its alternative text."""

    path: Path
    alt: str
    title: str = ""

    @property
    def uri(self) -> str:
        """The plot as a data URI, for a self-contained page."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.path.read_bytes()).decode()}"


class End(NamedTuple):
    """The end of a line, where its name is written."""

    name: str
    x: float
    y: float
    colour: str


@dataclass(frozen=True)
class Axis:
    """A horizontal axis for losses: `values` returns its value for every row of metrics."""

    title: str
    values: Callable[[Result], np.ndarray]
    readable: Callable[[float], str]
    ticks: Sequence[float]


_DECIMAL = [digit * 10.0**exponent for exponent in range(27) for digit in (1, 2, 5)]
_CLOCK = [
    *(unit * number for unit in (0.01, 0.1) for number in (1, 2, 5)),
    *(unit * number for unit in (1, 60) for number in (1, 2, 5, 10, 20, 30)),
    *(3600 * number for number in (1, 2, 5, 12, 24, 48, 120, 240, 480, 1200, 2400)),
]
AXES = {
    "tokens": Axis("training tokens", lambda result: column(result, "tokens"), count, _DECIMAL),
    "flops": Axis("training FLOPs", lambda result: column(result, "flops"), lambda v: quantity(v, ""), _DECIMAL),
    "time": Axis("training time", lambda result: _seconds(result), duration, _CLOCK),
}
COUNTED, TIMED = ("tokens", "flops"), ("time",)
"""The axes that are equal for equal runs, and those that are not."""


def draw_curves(results: Sequence[Result], axes: Sequence[str], folder: Path) -> list[Figure]:
    """Write `loss-{axis}.svg` for each axis, with a line per model: the mean over its seeds.

    The plot against time omits models without timing, and is not written if no model has timing.
    """
    figures = []
    for name in axes:
        axis = AXES[name]
        models = enumerate(by_model(results).values())
        styled = [(i, runs) for i, runs in models if name not in TIMED or all(run.timing for run in runs)]
        if not styled:
            continue
        figures.append(Figure(folder / f"loss-{name}.svg", f"Training and validation loss of every model against {axis.title}"))
        with drawing(figures[-1].path, axis.title, "loss (nats per token)") as (plot, ends):
            ends += [_draw_losses(plot, runs, axis, nth(LIGHT.lines, i), nth(MARKERS, i)) for i, runs in styled]
            plot.set_xscale("log")
            low, high = plot.get_xlim()
            ticks = [tick for tick in axis.ticks if low <= tick <= high]
            log_ticks(plot, ticks[:: -(-len(ticks) // MOST_TICKS) or 1], axis.readable)
    return figures


@dataclass(frozen=True)
class Interval:
    """A relative difference with its interval, the differences of single seeds, and a wider interval, if any."""

    label: str
    mean: float
    low: float
    high: float
    seeds: Sequence[float]
    colour: str
    wider: tuple[float, float] | None = None


def draw_intervals(rows: Sequence[Interval], margin: float, axis: str, figure: Figure) -> Figure:
    """Draw a forest plot: for every row mean, interval, each seed, and below it the wider interval; the margin is shaded."""
    with drawing(figure.path, f"{axis} (%)", size=(5.6, 0.9 + 0.42 * len(rows))) as (axes, _):
        axes.axvspan(0, 100 * margin, color=LIGHT.grid, linewidth=0)
        axes.axvline(0, color=LIGHT.ink, linewidth=1)
        for y, row in enumerate(rows):
            axes.plot(
                100 * np.asarray(row.seeds), np.full(len(row.seeds), y - 0.24), "|", color=row.colour, markersize=6, alpha=0.7
            )
            axes.plot([100 * row.low, 100 * row.high], [y, y], color=row.colour, linewidth=3, solid_capstyle="round")
            axes.plot([100 * row.mean], [y], "o", color=row.colour, markersize=8, markeredgecolor=LIGHT.paper)
            if row.wider:
                axes.plot([100 * end for end in row.wider], [y + 0.2, y + 0.2], color=row.colour, linewidth=1.2)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(False, axis="y")
    return figure


def draw_verdicts(comparison: Mapping[str, Any], folder: Path) -> Figure:
    """Write `verdicts.svg`: the relative difference of each pair of models."""
    names = list(comparison["models"])
    rows = [
        Interval(
            f"{pair['model']}\nagainst {pair['against']}",
            pair["mean"],
            pair["low"],
            pair["high"],
            pair["differences"],
            nth(LIGHT.lines, names.index(pair["model"])),
        )
        for pair in comparison["pairs"]
    ]
    alt = "Relative differences of every pair in test bits per byte, with intervals and the margin"
    figure = Figure(folder / "verdicts.svg", alt)
    return draw_intervals(rows, comparison["provenance"]["margin"], "difference in test bits per byte", figure)


def draw_health(results: Sequence[Result], folder: Path) -> list[Figure]:
    """Write `health-{kind}-{model}.svg` for each model with such metrics, from its first seed.

    Of many parts an evenly spaced selection is shown, including the first and the last.
    """
    figures = []
    for result, *_ in by_model(results).values():
        for kind, title in KINDS.items():
            lines = list(_health(result, kind))
            if lines:
                path = folder / f"health-{kind}-{result.name}.svg"
                figures.append(Figure(path, f"{title} over the steps of {result.name}", result.name))
                shown = np.linspace(0, len(lines) - 1, min(len(lines), MOST_LINES)).round().astype(int)
                _draw_health([lines[i] for i in shown], title, path)
    return figures


@contextmanager
def drawing(path: Path, x: str, y: str = "", size: tuple[float, float] = (4.4, 3.6)) -> Iterator[tuple[Axes, list[End]]]:
    """Yield the axes of a plot, titled `x` and `y`, and a list for the ends of its lines, where their names are written; then
    write the plot to `path`. Draw with the colours of `LIGHT`. `size` is in inches."""
    import matplotlib
    import matplotlib.style
    from matplotlib.figure import Figure as Canvas

    looks = {
        "figure.facecolor": LIGHT.paper, "axes.facecolor": LIGHT.paper, "axes.edgecolor": LIGHT.grid, "grid.color": LIGHT.grid,
        "text.color": LIGHT.ink, "axes.labelcolor": LIGHT.faint, "xtick.color": LIGHT.faint, "ytick.color": LIGHT.faint,
        "font.size": 10, "axes.axisbelow": True, "svg.hashsalt": "stacklm", "svg.fonttype": "path",
    }  # fmt: skip
    with matplotlib.style.context(["default", looks]):  # independent of the user's matplotlibrc
        canvas = Canvas(figsize=size, layout="constrained")
        axes = canvas.add_subplot()
        axes.grid(True, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(which="both", length=0)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        ends: list[End] = []
        yield axes, ends
        if ends:
            _label(axes, ends)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    write_text(path, buffer.getvalue().replace("</style>", f"{_dark_rules()}</style>", 1))


def _dark_rules() -> str:
    """Return CSS that replaces the colours of `LIGHT` with those of `DARK`."""
    rules = [
        f'[style*="{use}: {light}"] {{ {use}: {dark} !important }}'
        for light, dark in zip(LIGHT.colours, DARK.colours, strict=True)
        for use in ("fill", "stroke")
    ]
    return "\n".join(["", "@media (prefers-color-scheme: dark) {", *rules, "}", ""])


def _draw_losses(axes: Axes, runs: Sequence[Result], axis: Axis, colour: str, marker: str) -> End:
    """Draw the training and validation loss of one model; return the end of the latter."""
    x = np.mean([axis.values(run) for run in runs], axis=0)
    train = np.mean([column(run, "train_loss") for run in runs], axis=0)
    valid = np.array([column(run, "valid_loss") for run in runs])  # [seeds, rows]
    known = np.isfinite(valid).all(axis=0)
    start = x[known & (x > 0)][0] / 2  # the initial drop would squeeze the rest of the curve
    drawn = np.isfinite(train) & (x >= start)
    axes.plot(_thinned(x[drawn]), _thinned(train[drawn]), color=colour, linewidth=1, alpha=0.45)
    x, valid = x[known & (x >= start)], valid[:, known & (x >= start)]
    axes.plot(x, valid.mean(axis=0), color=colour, linewidth=2, marker=marker, markersize=4.5)
    if len(runs) > 1:
        axes.fill_between(x, valid.min(axis=0), valid.max(axis=0), color=colour, alpha=0.25, linewidth=0)
    return End(runs[0].name, x[-1], float(valid[:, -1].mean()), colour)


def log_ticks(axes: Axes, ticks: Sequence[float], readable: Callable[[float], str]) -> None:
    """Set a logarithmic horizontal axis with only these ticks."""
    axes.set_xscale("log")
    axes.set_xticks(ticks, [readable(tick) for tick in ticks])
    axes.minorticks_off()


def _draw_health(lines: Sequence[tuple[str, np.ndarray, np.ndarray]], title: str, path: Path) -> None:
    from matplotlib.ticker import LogFormatter

    with drawing(path, "step", title) as (axes, ends):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
        for i, (name, steps, values) in enumerate(lines):
            colour = nth(LIGHT.lines, i)
            axes.plot(steps, values, color=colour, linewidth=2, marker="o", markersize=3)
            ends.append(End(name, steps[-1], values[-1], colour))


def _label(axes: Axes, ends: Sequence[End]) -> None:
    """Write names at the ends of lines, moved apart if they would overlap."""
    from matplotlib.patheffects import withStroke

    axes.autoscale_view()
    place = axes.transData + axes.transAxes.inverted()
    heights = {end: place.transform((end.x, end.y))[1] for end in ends}
    ordered = sorted(ends, key=heights.__getitem__)
    for end, height in zip(ordered, spread([heights[end] for end in ordered], gap=0.065), strict=True):
        axes.annotate(
            end.name, (end.x, height), (8, 0), xycoords=("data", "axes fraction"), textcoords="offset points", va="center",
            color=end.colour, size=9, weight="bold", path_effects=[withStroke(linewidth=3, foreground=LIGHT.paper)],
        )  # fmt: skip


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Return increasing values at least `gap` apart, near the given ones and with the same mean."""
    placed: list[float] = []
    for value in values:
        placed.append(max(value, placed[-1] + gap) if placed else value)
    shift = (sum(values) - sum(placed)) / len(placed)
    return [value + shift for value in placed]


def column(result: Result, key: str) -> np.ndarray:
    """Return one value per row of metrics, NaN if a row has none."""
    values: list[Any] = [row.get(key) for row in result.metrics]
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def _health(result: Result, kind: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield the part, steps and values of each health metric of a kind."""
    steps = column(result, "step")
    for key in dict.fromkeys(key for row in result.metrics for key in row if key.startswith(f"health/{kind}/")):
        values = column(result, key)
        known = np.isfinite(values) & (values > 0)
        if known.any():
            yield key.rpartition("/")[2], steps[known], values[known]


def _seconds(result: Result) -> np.ndarray:
    """Return seconds of training at every row of metrics, interpolated between timed steps."""
    steps = [0, *(row["step"] for row in result.timing)]
    return np.interp(column(result, "step"), steps, [0.0, *(row["seconds"] for row in result.timing)])


def _thinned(values: np.ndarray) -> np.ndarray:
    """Return at most `TRAIN_POINTS` means over neighbouring values."""
    return np.array([piece.mean() for piece in np.array_split(values, min(len(values), TRAIN_POINTS))])


def nth(looks: Sequence[str], i: int) -> str:
    return looks[i % len(looks)]
