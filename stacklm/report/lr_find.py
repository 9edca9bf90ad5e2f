"""What a learning-rate range test found: as text with a curve, as a drawing, and as data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from stacklm.config.model import Model
from stacklm.config.schema import plain
from stacklm.config.train import Train
from stacklm.files import write_json
from stacklm.report.plots import LIGHT, drawing
from stacklm.train.lr_find import MARGIN, RangeTest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS, COLUMNS = 24, 48
"""Of the curve in a terminal."""
RULE = f"the learning rate of the least smoothed loss, divided by {MARGIN}"


def record(test: RangeTest, config: Train, model: Model, folder: Path, name: str) -> None:
    """Write `name`.svg and `name`.json, which are equal for equal tests."""
    folder.mkdir(parents=True, exist_ok=True)
    draw(test, model.optimizer.peak_lr, name, folder / f"{name}.svg")
    updates = zip(test.lrs, test.losses, test.smoothed, strict=True)
    write_json(
        folder / f"{name}.json",
        {
            "suggestion": test.suggestion,
            "rule": RULE,
            "caveat": test.caveat,
            "ended": test.ended,
            "settings": {"train": plain(config), "model": plain(model)},
            "updates": [{"lr": lr, "loss": loss, "smoothed": smoothed} for lr, loss, smoothed in updates],
        },
    )


def describe(test: RangeTest, config: Train, model: Model, name: str) -> str:
    """What was done and found, with a curve of the smoothed loss that grows to the right."""
    best = test.best
    lines = [
        f"{name}: {len(test.losses)} updates of {config.tokens_per_step:,} tokens, {test.ended}",
        "",
        *_curve(test),
        "",
        f"The least loss, {test.smoothed[best]:.3f}, was at a learning rate of {test.lrs[best]:.1e}. Suggestion, that by {MARGIN}:",
        f"models.{name}.optimizer.peak_lr = {test.suggestion:.1e} (params.yaml has {model.optimizer.peak_lr:.1e})",
    ]
    if test.caveat:
        lines.append(f"But {test.caveat}.")
    return "\n".join(lines)


def _curve(test: RangeTest) -> Iterator[str]:
    lrs, losses = np.array(test.lrs), np.array(test.smoothed)
    shown = np.unique(np.linspace(0, len(losses) - 1, ROWS).round().astype(int))
    suggested = shown[np.abs(np.log(lrs[shown] / test.suggestion)).argmin()]
    low, high = losses.min(), losses.max()
    yield "  learning rate    loss"
    for i in shown:
        place = round(float((losses[i] - low) / (high - low or 1)) * COLUMNS)
        note = "  <- suggestion" if i == suggested else ""
        yield f"        {lrs[i]:.1e}  {losses[i]:6.3f}  {'':{place}}*{'':{COLUMNS - place}}{note}".rstrip()


def draw(test: RangeTest, present: float, name: str, path: Path) -> None:
    """Single losses, the smoothed loss, and the learning rates that are suggested and present."""
    colour, other = LIGHT.lines[:2]
    smoothed = test.smoothed
    with drawing(path, size=(6.4, 4.2)) as axes:
        axes.plot(test.lrs, test.losses, color=colour, linewidth=1, alpha=0.35)
        axes.plot(test.lrs, smoothed, color=colour, linewidth=2)
        axes.plot(test.lrs[test.best], smoothed[test.best], "o", color=colour)
        axes.set_xscale("log")
        rise = max(smoothed) - min(test.losses)
        axes.set_ylim(min(test.losses) - 0.05 * rise, max(smoothed) + 0.15 * rise)
        lower, higher = sorted([(test.suggestion, "suggestion", other), (present, "params.yaml", LIGHT.faint)])
        _mark(axes, *lower, side="left")
        _mark(axes, *higher, side="right")
        axes.set_title(name, loc="left", weight="bold")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("loss (nats per token)")


def _mark(axes: Axes, lr: float, text: str, colour: str, side: Literal["left", "right"]) -> None:
    """A line at a learning rate, with its name beside it at the top."""
    axes.axvline(lr, color=colour, linewidth=1.2, linestyle=(0, (4, 3)))
    shift, anchor = {"left": (-6, "right"), "right": (6, "left")}[side]
    axes.annotate(
        f"{text}\n{lr:.1e}", (lr, 0.98), (shift, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
        va="top", ha=anchor, color=colour, size=9, weight="bold",
    )  # fmt: skip
