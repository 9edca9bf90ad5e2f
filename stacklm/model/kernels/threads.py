"""Independent pieces of work in parallel on CPU threads, one thread per piece.

Torch splits every operation over its threads, which synchronise at its end. With many small operations this takes most of the time,
and more when other programs use the same cores. Pieces synchronise once, after the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier
from typing import TypeVar

import torch

T = TypeVar("T")


def each(work: Callable[[T], None], pieces: Sequence[T]) -> None:
    """Run `work` on every piece, without autocast or gradients, on as many threads as torch uses.

    The result does not depend on which thread runs a piece.
    """
    threads = torch.get_num_threads()
    inference = torch.is_inference_mode_enabled()

    def alone(piece: T) -> None:
        with torch.inference_mode(inference), torch.no_grad(), torch.autocast("cpu", enabled=False):  # these are per thread
            work(piece)

    if threads == 1 or len(pieces) == 1:
        for piece in pieces:
            alone(piece)
    else:
        list(_pool(threads).map(alone, pieces))


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that each run torch operations single-threaded."""
    pool, started = ThreadPoolExecutor(threads, "stacklm"), Barrier(threads)

    def begin(_: int) -> None:
        torch.get_num_threads()  # a thread's first call sets its own count to the global one
        torch.set_num_threads(1)
        started.wait()  # so that each thread runs this exactly once

    list(pool.map(begin, range(threads)))
    torch.set_num_threads(threads)  # also the initial count of new threads
    return pool
