"""What a run writes down while it runs: logs of JSON rows, and the figures of process and machine.

What repeats between equal runs and what does not go to different files, so that the first kind can be compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from stacklm.files import read_jsonl, sync, write_text

GPU_MEMORY = {"cuda": torch.cuda.max_memory_allocated, "mps": torch.mps.driver_allocated_memory}


class Log:
    """An append-only file of JSON rows, one for each reported step.

    Opening it drops the rows after step `last`: a run resumed from that step's checkpoint writes them again.
    """

    def __init__(self, path: Path, last: int) -> None:
        self.path = path
        write_text(path, "".join(_line(row) for row in read_jsonl(path) if row["step"] <= last))
        self._file = path.open("a", encoding="utf-8", newline="\n")

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def append(self, row: dict[str, Any]) -> None:
        """Write a row; it survives a kill of this process. Raises `ValueError` for a number that is not finite."""
        self._file.write(_line(row))
        self._file.flush()

    def sync(self) -> None:
        """Make all rows survive a loss of power: to be called before the checkpoint that relies on them."""
        sync(self.path)


class NoLog:
    """In place of a `Log`, for a process that writes none."""

    def __init__(self, path: Path, last: int) -> None:
        pass

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def append(self, row: dict[str, Any]) -> None:
        pass

    def sync(self) -> None:
        pass


class Meter:
    """Seconds spent training, over all resumes, and what the process and the machine use."""

    def __init__(self, seconds: float, device: torch.device) -> None:
        self.seconds = seconds
        self._device = device
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call only starts the interval
        self._last_seconds, self._tokens = seconds, 0

    @contextlib.contextmanager
    def training(self, tokens: int) -> Iterator[None]:
        """Count the time inside the block as training on so many tokens."""
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """The present figures; `tokens_per_second` and `cpu_percent` are over the time since the last reading."""
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
    """The most memory this process has held so far, in bytes (resident set; Windows: working set)."""
    if os.name == "nt":
        return psutil.Process().memory_info().peak_wset
    if sys.platform == "linux":  # not `getrusage`, whose peak is inherited from the process that started this one
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
