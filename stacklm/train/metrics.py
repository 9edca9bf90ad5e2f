"""The logs of a run: JSONL files, and the resource usage of process and machine.

Values that are reproducible between equal runs and values that are not go to different files, so that the former can be compared.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from stacklm.config.schema import listed
from stacklm.files import json_line, sync, write_jsonl
from stacklm.train import CheckpointError

METRICS, TIMING, NON_FINITE = "metrics.jsonl", "timing.jsonl", "nonfinite.jsonl"
MAX_ROWS = 2000
GPU_MEMORY = {"cuda": torch.cuda.max_memory_allocated, "mps": torch.mps.driver_allocated_memory}


def row_every(steps: int) -> int:
    """Steps between rows in a run of `steps` steps."""
    return math.ceil(steps / MAX_ROWS)


class JsonlWriter:
    """An append-only file of JSON rows, one for each reported step.

    It starts with `rows`: those up to the checkpoint that the run resumes from. Later rows are written again.
    """

    def __init__(self, path: Path, rows: Sequence[dict[str, Any]] = ()) -> None:
        self.path = path
        write_jsonl(path, rows)
        self._file = path.open("a", encoding="utf-8", newline="\n")

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def append(self, row: dict[str, Any]) -> None:
        """Write a row; it survives a kill of this process. Raises `ValueError` for a number that is NaN or Inf."""
        self._file.write(json_line(row))
        self._file.flush()

    def sync(self) -> None:
        """Flush all rows to disk, so that they survive a power failure: to be called before the checkpoint that relies on them."""
        sync(self.path)


class NullWriter(JsonlWriter):
    """A `JsonlWriter` that writes nothing, for all processes but the main one."""

    def __init__(self, path: Path, rows: Sequence[dict[str, Any]] = ()) -> None: ...

    def __exit__(self, *error: object) -> None: ...

    def append(self, row: dict[str, Any]) -> None: ...

    def sync(self) -> None: ...


def read_rows(path: Path, last: int, every: int) -> list[dict[str, Any]]:
    """The rows of a log up to step `last`; one for each multiple of `every` must be present. A truncated last line is dropped.

    Raises `CheckpointError`, with the line or the steps, for a log that is missing, truncated or modified.
    """
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line, parse_constant=_no_number)
            follows = is_count(row["step"]) and (not rows or row["step"] > rows[-1]["step"])
        except (ValueError, KeyError, TypeError):
            raise _unusable(path, f"line {number} is not a JSON object with a step") from None
        if not follows:
            raise _unusable(path, f"line {number} has step {row['step']!r} after step {rows[-1]['step'] if rows else None}")
        rows.append(row)
    kept = [row for row in rows if row["step"] <= last]
    if missing := sorted(set(range(0, last + 1, every)) - {row["step"] for row in kept}):
        more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
        raise _unusable(path, f"no row of step {listed(missing[:3])}{more}, but there is a checkpoint of step {last}")
    return kept


def _unusable(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}; restore the file, or remove {path.parent} to train from the start")


def is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class LossSpikeDetector:
    """Detects a loss above the mean of the last 50 by more than six standard deviations and more than 10%."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=50)

    def note(self, loss: float) -> str | None:
        """Add a loss; return a warning if it is a spike."""
        said = None
        if len(self._losses) >= 20:
            usual, spread = statistics.mean(self._losses), statistics.stdev(self._losses)
            if loss > max(usual + 6 * spread, 1.1 * usual):
                said = f"the loss jumped to {loss:.3f}; over the last {len(self._losses)} steps it was {usual:.3f} ± {spread:.3f}"
        self._losses.append(loss)
        return said


class Meter:
    """Training time over all resumes, and resource usage of process and machine."""

    def __init__(self, seconds: float, device: torch.device) -> None:
        self.seconds = seconds
        self._device = device
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call only starts the interval
        self._last_seconds, self._tokens = seconds, 0

    @contextlib.contextmanager
    def training(self, tokens: int) -> Iterator[None]:
        """Count the time inside the block as training on `tokens` tokens."""
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """Current values; `tokens_per_second` and `cpu_percent` cover the time since the last call."""
        spent = self.seconds - self._last_seconds
        rate = self._tokens / spent if spent else 0.0
        self._last_seconds, self._tokens = self.seconds, 0
        system = psutil.virtual_memory()
        figures = {
            "seconds": self.seconds,
            "tokens_per_second": rate,
            "process_rss_bytes": self._process.memory_info().rss,
            "peak_memory_bytes": peak_memory(),
            "cpu_percent": self._process.cpu_percent(),
            "system_memory_bytes": system.used,
            "system_memory_percent": system.percent,
        }
        if self._device.type in GPU_MEMORY:
            figures["gpu_memory_bytes"] = GPU_MEMORY[self._device.type]()
        return figures


def peak_memory() -> int:
    """Peak memory of this process so far, in bytes (resident set; Windows: working set)."""
    if os.name == "nt":
        return psutil.Process().memory_info().peak_wset
    if sys.platform == "linux":  # not `getrusage`, whose peak is inherited from the process that started this one
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
