"""Shared by the benchmarks: argument parser, timing, tables, token streams and training steps."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from stacklm.config.model import Stack, Stacked
from stacklm.console import table
from stacklm.data.shards import TokenStream
from stacklm.train.trainer import Run, Update, train_step

T = TypeVar("T")
LAPTOP = Stacked(128, 4, (Stack(16, 8, 512), Stack(16, 16, 1024)))
"""A stacked model small enough for a CPU."""


def command_line(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows the script's docstring unchanged."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


class Timed(NamedTuple, Generic[T]):
    """Wall and CPU seconds of one call, and its result."""

    wall: float
    cpu: float
    result: T


def timed(work: Callable[[], T]) -> Timed[T]:
    """Call `work` once and time it; wait for the GPU if one is in use."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return Timed(time.perf_counter() - wall, time.process_time() - cpu, result)


def medians(rows: Iterable[tuple[float, ...]]) -> list[float]:
    """The median of each column."""
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def table_of(rows: Iterable[Mapping[str, Any]], columns: Iterable[tuple[str, str]], left: int = 1) -> str:
    """A table with a line per row; each column is a header and a format string for its cells, such as `{loss:.3f}`."""
    headers, forms = zip(*columns, strict=True)
    return table(headers, [[form.format(**row) for form in forms] for row in rows], left)


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def stream_of(ids: np.ndarray, end_id: int = 0) -> TokenStream:
    """A stream of token ids as one document, one byte per token."""
    return TokenStream([ids], end_id, documents=1, bytes=len(ids), words=0)


def train_steps(run: Run, steps: int) -> list[Update]:
    """Take the first optimizer steps of a run."""
    return [train_step(run, step) for step in range(1, steps + 1)]
