"""Independent pieces of work on the threads of a CPU, each piece on one of them.

Torch divides every operation among its threads, and they wait for each other at the end of it. Where operations are small and
many, that waiting is most of the time, and more where other programs want the same cores. Pieces wait once, at the end of all.
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
    """Do the work on every piece, in float arithmetic as it is written and without gradients; as many at once as torch has threads.

    Which thread takes a piece makes no difference to what comes out.
    """
    threads = torch.get_num_threads()
    inference = torch.is_inference_mode_enabled()

    def alone(piece: T) -> None:
        with torch.inference_mode(inference), torch.no_grad(), torch.autocast("cpu", enabled=False):  # a thread's own settings
            work(piece)

    if threads == 1 or len(pieces) == 1:
        for piece in pieces:
            alone(piece)
    else:
        list(_pool(threads).map(alone, pieces))


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that divide no operation."""
    pool, started = ThreadPoolExecutor(threads, "stacklm"), Barrier(threads)

    def begin(_: int) -> None:
        torch.get_num_threads()  # a thread's first question sets its number to the common one, after which it is its own
        torch.set_num_threads(1)
        started.wait()  # so that none begins two times and another never

    list(pool.map(begin, range(threads)))
    torch.set_num_threads(threads)  # it is also what threads to come begin with
    return pool
