"""The processes that train one model together, and what they must agree on.

A team of one is the common case: it starts nothing and costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stacklm.config.schema import ParamsError

T = TypeVar("T")
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What `torchrun` sets in every process that it starts."""


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

    def any(self, here: bool) -> bool:
        """Whether it is so on any process."""
        if self.size == 1:
            return here
        flag = torch.tensor(int(here))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes, on every one of them."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.size
        return value


ALONE = Team()


def launched() -> bool:
    """Whether `torchrun`, or this package, started this process as one of a team."""
    return all(name in os.environ for name in ENVIRONMENT)


@contextmanager
def joined(device: torch.device) -> Iterator[Team]:
    """The team that this process was started for, which meets here; alone if for none.

    On a GPU every process takes the one of its number on its machine. Raises `ParamsError` where there are too few.

    Torch's agent keeps one store of addresses over all its starts, so that processes may find those of dead ones (pytorch
    issue 135712). On one machine each start gets a part of its own; on several, agents count starts differently.
    """
    if not launched():
        yield ALONE
        return
    if device.type == "cuda":
        _take_gpu(int(os.environ["LOCAL_RANK"]))
    store, rank, size = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    yield Team(rank, size)
    if device.type == "cuda":  # nccl asks for it; gloo may wait for ever for a thread of its own that waits for Python's lock
        dist.destroy_process_group()


def _take_gpu(number: int) -> None:
    count = torch.cuda.device_count()
    if number >= count:
        raise ParamsError(f"train.processes: this machine has {count} GPUs, and process {number} has none; start {count} at most")
    torch.cuda.set_device(number)


def whole(tensor: Tensor) -> Tensor:
    """What all processes together hold of a tensor that may be sharded; to be called by all of them."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
