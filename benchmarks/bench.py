"""What several benchmarks need: their command line, clocks, tokens, and runs of the trainer."""

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
"""A stacked model for a CPU, which several benchmarks measure."""


def command_line(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows the text of the script as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


class Timed(NamedTuple, Generic[T]):
    """Seconds of the clock and of this process's processors, and what came of them."""

    wall: float
    cpu: float
    result: T


def timed(work: Callable[[], T]) -> Timed[T]:
    """One call, until the GPU, where one is used, has done all that was asked of it."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return Timed(time.perf_counter() - wall, time.process_time() - cpu, result)


def medians(rows: Iterable[tuple[float, ...]]) -> list[float]:
    """Of each column."""
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def table_of(rows: Iterable[Mapping[str, Any]], columns: Iterable[tuple[str, str]], left: int = 1) -> str:
    """A line for each row of figures; a column is its header and what `str.format` makes its cells of, such as `{loss:.3f}`."""
    headers, forms = zip(*columns, strict=True)
    return table(headers, [[form.format(**row) for form in forms] for row in rows], left)


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def stream_of(ids: np.ndarray, end_id: int = 0) -> TokenStream:
    """Ids of one document, each of one byte."""
    return TokenStream([ids], end_id, documents=1, bytes=len(ids), words=0)


def train_steps(run: Run, steps: int) -> list[Update]:
    """The first optimizer steps of a run."""
    return [train_step(run, step) for step in range(1, steps + 1)]
