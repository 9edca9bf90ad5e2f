"""Wall-clock and memory of a run. They vary between equal runs, so they appear on the page and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

from stacklm.report.runs import Run


@dataclass(frozen=True)
class Speed:
    """Training time without pauses between resumes, the mean rate over it, and peaks in bytes."""

    seconds: float
    tokens_per_second: float
    peak_memory: int
    gpu_memory: int | None


def speed(run: Run) -> Speed | None:
    """None where the run has no timing."""
    if not run.timing:
        return None
    seconds = run.timing[-1]["seconds"]
    return Speed(
        seconds=seconds,
        tokens_per_second=run.metrics[-1]["tokens"] / seconds,
        peak_memory=max(row["peak_memory_bytes"] for row in run.timing),
        gpu_memory=max((row["gpu_memory_bytes"] for row in run.timing if "gpu_memory_bytes" in row), default=None),
    )
