"""From the rows that training writes to the curves that people look at."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

POINTS = 2000
"""Points of a curve, at most about: more are not seen, and make MLflow slow."""

METRICS = {
    "valid_bits_per_byte": "bits_per_byte/valid",
    "train_loss": "loss/train",
    "valid_loss": "loss/valid",
    "lr": "optimizer/learning_rate",
    "grad_norm": "optimizer/grad_norm",
    "tokens": "progress/tokens",
    "flops": "progress/training_flops",
}
TIMING = {
    "seconds": ("progress/seconds", 1),
    "tokens_per_second": ("speed/tokens_per_second", 1),
    "cpu_percent": ("system/cpu_utilization_percentage", 1),
    "system_memory_percent": ("system/system_memory_usage_percentage", 1),
    "system_memory_bytes": ("system/system_memory_usage_megabytes", 1e-6),
    "process_rss_bytes": ("system/process_memory_megabytes", 1e-6),
    "peak_memory_bytes": ("system/process_peak_memory_megabytes", 1e-6),
    "gpu_memory_bytes": ("system/gpu_0_memory_usage_megabytes", 1e-6),
}
"""The name of each figure in MLflow, where the part before the slash is a group of charts, and the factor to its unit."""
HEALTH = "health/"
"""Figures whose names in the rows begin so are shown under these names: which there are depends on the model."""


class Point(NamedTuple):
    """One value of a curve; `seconds` of training had passed."""

    key: str
    step: int
    value: float
    seconds: float


def points(metrics: Sequence[Mapping[str, Any]], timing: Sequence[Mapping[str, Any]], steps: int) -> list[Point]:
    """All points to show of a run of `steps` optimizer steps. Of growing rows it is always a beginning of the same points."""
    clock = _Clock(timing)
    curves = [(row_key, key, 1, metrics) for row_key, key in METRICS.items()]
    curves += [(row_key, key, factor, timing) for row_key, (key, factor) in TIMING.items()]
    curves += [(key, key, 1, metrics) for key in dict.fromkeys(key for row in metrics for key in row) if key.startswith(HEALTH)]
    return [
        Point(key, row["step"], row[row_key] * factor, clock.at(row["step"]))
        for row_key, key, factor, rows in curves
        for row in _thin((row for row in rows if row.get(row_key) is not None), steps)
    ]


def _thin(rows: Iterator[Mapping[str, Any]], steps: int) -> Iterator[Mapping[str, Any]]:
    """The first row of every `steps / POINTS` steps, and that of the last step."""
    width = -(-steps // POINTS)
    bucket = -1
    for row in rows:
        if row["step"] // width != bucket or row["step"] == steps:
            bucket = row["step"] // width
            yield row


class _Clock:
    """Seconds of training at any step, between the rows that have them by a straight line."""

    def __init__(self, timing: Sequence[Mapping[str, Any]]) -> None:
        self._steps = [0, *(row["step"] for row in timing)]
        self._seconds = [0.0, *(row["seconds"] for row in timing)]

    def at(self, step: int) -> float:
        i = bisect.bisect_left(self._steps, step)
        if i == len(self._steps):
            return self._seconds[-1]
        if self._steps[i] == step or i == 0:
            return self._seconds[i]
        share = (step - self._steps[i - 1]) / (self._steps[i] - self._steps[i - 1])
        return self._seconds[i - 1] + share * (self._seconds[i] - self._seconds[i - 1])
