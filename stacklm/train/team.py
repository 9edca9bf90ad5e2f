"""The processes that train one model together, and what they must agree on.

A team of one is the common case: it costs nothing and starts nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """This process is number `rank` of `size`; number 0 leads: it alone writes what there is once."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do the work on every process; return what each returned, by rank. An error on one is raised on all.

        Nobody is left waiting for one that gave up, and nobody goes on before all are done.
        """
        if self.size == 1:
            return [work()]
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        outcomes: list = [None] * self.size
        dist.all_gather_object(outcomes, (result, failure))
        for _, failure in outcomes:
            if failure is not None:
                raise failure
        return [result for result, _ in outcomes]


ALONE = Team()
