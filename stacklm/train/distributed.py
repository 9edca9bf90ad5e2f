"""Training one model with several processes: launching, synchronisation, and DDP and FSDP.

A process group of one is the common case: it starts nothing and has no overhead.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from stacklm.config.schema import ParamsError
from stacklm.config.train import Train
from stacklm.data import DataError
from stacklm.model.custom import Custom
from stacklm.model.dense import Block
from stacklm.model.layers import LanguageModel
from stacklm.model.stacked import ParallelStack
from stacklm.train import CheckpointError, DiskFullError, Interrupted, NonFiniteError, NotCertifiedError
from stacklm.train.loss import Arithmetic, Objective

T = TypeVar("T")
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that `torchrun` sets in every process it starts."""
RESTARTS = 10
"""Maximum number of restarts of the processes before the run fails."""
FINAL = (ParamsError, DataError, NotCertifiedError, NonFiniteError, CheckpointError, DiskFullError, Interrupted)
"""Errors that a restart would not fix."""
PRELOADED = ["stacklm.train.pretrain", "torch._dynamo", "torch.distributed.checkpoint"]
"""Modules imported in the fork server, on systems that have one, so that a restart does not spend seconds on imports."""


@dataclass(frozen=True)
class ProcessGroup:
    """Processes that train one model: this one has rank `rank` of `size`. Only rank 0, the main process, writes shared files."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on every process; return all results by rank. An error on one is raised on all.

        No process waits for a failed one, and none continues before all are done.
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
        """Whether `here` is true on any process."""
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


SINGLE = ProcessGroup()


def is_launched() -> bool:
    """Whether `torchrun`, or this package, started this process as one of several."""
    return all(name in os.environ for name in ENVIRONMENT)


@contextmanager
def init_process_group(device: torch.device) -> Iterator[ProcessGroup]:
    """The process group that this process was launched in; `SINGLE` if in none.

    Each process uses the GPU of its local rank. Raises `ParamsError` if there are too few.

    Torch's agent keeps one store of addresses over all restarts, so processes may find addresses of dead ones (pytorch issue
    135712). On one machine each restart gets its own prefix; on several, agents count restarts differently.
    """
    if not is_launched():
        yield SINGLE
        return
    if device.type == "cuda":
        _take_gpu(int(os.environ["LOCAL_RANK"]))
    store, rank, size = next(rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
        store = dist.distributed_c10d.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    yield ProcessGroup(rank, size)
    if device.type == "cuda":  # nccl requires it; gloo may deadlock with its own thread waiting for the GIL
        dist.destroy_process_group()


def _take_gpu(number: int) -> None:
    count = torch.cuda.device_count()
    if number >= count:
        raise ParamsError(f"train.nproc: this machine has {count} GPUs, and process {number} has none; start {count} at most")
    torch.cuda.set_device(number)


def full_tensor(tensor: Any) -> Tensor:
    """The full tensor of one that may be sharded; to be called by all processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def parallelize(model: LanguageModel, arithmetic: Arithmetic, config: Train, team: ProcessGroup) -> Objective:
    """The objective that the processes of `team` minimise together; all of them call this. fsdp shards the model's weights.

    All processes have equally many rows, so the mean of their mean losses is the mean over all tokens, and the mean of their
    gradients is its gradient: both strategies average.
    """
    if team.size == 1:
        return Objective(model, arithmetic)
    if config.strategy == "fsdp" and isinstance(model, Custom):
        raise ParamsError(
            "strategy: fsdp gathers one stack or block after the other, and those of this model are not known; choose ddp"
        )
    return {"ddp": Replicated, "fsdp": Sharded}[config.strategy](model, arithmetic)


class Replicated(Objective):
    """Every process has the whole model; gradients are averaged during the backward pass (Li et al. 2020, arXiv:2006.15704)."""

    def __init__(self, model: LanguageModel, arithmetic: Arithmetic) -> None:
        super().__init__(model, arithmetic)
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # `broadcast_buffers` will be renamed
            inner = Objective(model, arithmetic)
            self.shared = DistributedDataParallel(inner, broadcast_buffers=False, gradient_as_bucket_view=True)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return self.shared(inputs_BT, targets_BT)

    def no_sync(self) -> AbstractContextManager:
        return self.shared.no_sync()


class Sharded(Objective):
    """Every process keeps a shard of each weight, gradient and moment, and gathers a stack or block while computing it.

    Fully sharded data parallelism (Zhao et al. 2023, arXiv:2304.11277), torch's `fully_shard`: parameters become DTensors.
    Parameters outside stacks and blocks are gathered before `features` and stay so until the backward pass, since the head is used
    after `features`.
    """

    def __init__(self, model: LanguageModel, arithmetic: Arithmetic) -> None:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        super().__init__(model, arithmetic)
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nothing here writes into a view
        layers = [module for module in model.modules() if isinstance(module, (ParallelStack, Block))]
        self.parts: list[Any] = [fully_shard(module) for module in (*layers, model)]
        register_fsdp_forward_method(model, "features")

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.parts[-1].set_requires_gradient_sync(False)
        yield
        self.parts[-1].set_requires_gradient_sync(True)

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        self.parts[-1].unshard()
        yield
        self.parts[-1].reshard()  # as a backward pass does

    def gather(self) -> None:
        for module in self.parts:
            module.unshard()


def launch(processes: int, work: Callable[..., None], *arguments: Any) -> None:
    """Run `work(*arguments)` in `processes` processes on this machine, as one group, until all have succeeded.

    This uses torch's elastic agent, as `torchrun` does: it notices within a tenth of a second that a process has died, ends the
    others and restarts all of them, and the run resumes from its last checkpoint. Re-raises an error of `work` that is one of
    `FINAL`; raises `Interrupted` after a signal to this process, and `RuntimeError` if processes keep dying.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=RESTARTS,
        start_method=start_method(),
    )
    try:
        with _own_signals():
            outcomes = elastic_launch(config, _member)(work, arguments)
    except SignalException as error:
        raise Interrupted(f"{error.sigval.name}: stopped with a checkpoint; the same command resumes there") from None
    except ChildFailedError as error:
        raise RuntimeError(
            f"the {processes} processes were started {RESTARTS + 1} times, and one died each time: {error}"
        ) from error
    for failure in outcomes.values():
        if failure is not None:
            raise failure


def _member(work: Callable[..., None], arguments: tuple) -> Exception | None:
    """The main function of each process. Errors in `FINAL` are returned; after any other the processes are restarted."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(*arguments)
    except FINAL as error:
        return error
    return None


def _end_with_parent() -> None:
    """Exit when the parent dies: an orphan would write to the next run's files. Files are always complete, so exit at once."""
    if parent := multiprocessing.parent_process():
        parent.join()
    sys.stderr.write("stacklm: the process that started this one is gone; stopping\n")
    os._exit(143)


def start_method(*modules: str) -> str:
    """How to start training processes: from a fork server with `PRELOADED` and `modules` imported, if the system has one."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.set_forkserver_preload([*PRELOADED, *modules])
    return "forkserver"


@contextmanager
def _own_signals() -> Iterator[None]:
    """Restore the signal handlers after the block, since torch's agent installs its own."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            _set_handlers(handlers)


class StopRequest:
    """Inside the block SIGINT and SIGTERM set `signal` to their name; a second one ends the process as usual.

    With `patient` it does not: one of several processes receives a single Ctrl-C twice, from the terminal and from its parent,
    which kills it if it does not stop in time. A signal that is ignored stays ignored: a shell starts background jobs with SIGINT
    ignored, since a Ctrl-C in its terminal is not for them. Only the main thread can receive signals: in other threads the block
    does nothing.
    """

    def __init__(self, patient: bool = False) -> None:
        self.patient = patient
        self.signal: str | None = None
        self._previous: dict = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *error: object) -> None:
        _set_handlers(self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        if not self.patient:
            _set_handlers(self._previous)


def _set_handlers(handlers: dict) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
