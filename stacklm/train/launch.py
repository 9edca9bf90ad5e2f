"""Starting a team on this machine, and starting it again when a process of it dies.

Torch's elastic agent does it, as in `torchrun`: it sees within a tenth of a second that a process is gone, ends the others
and starts all of them anew, and the run goes on from its last checkpoint.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from stacklm.config.schema import ParamsError
from stacklm.data import DataError
from stacklm.train.errors import CheckpointError, DiskFullError, NonFiniteError, NotCertifiedError
from stacklm.train.interrupt import Interrupted

RESTARTS = 10
"""So often is a team started again before it is given up."""
FINAL = (ParamsError, DataError, NotCertifiedError, NonFiniteError, CheckpointError, DiskFullError, Interrupted)
"""Errors that a new start would not mend."""
PRELOADED = ["stacklm.train.pretrain", "torch._dynamo", "torch.distributed.checkpoint"]
"""What processes find imported where the system can fork them from one that has it, so that a new start takes no seconds."""


def launch(processes: int, work: Callable[..., None], *arguments: Any) -> None:
    """Run `work(*arguments)` on that many processes of this machine, as one team, until all have ended well.

    Raises what `work` raised if that is one of `FINAL`, `Interrupted` after a signal to this process, and `RuntimeError`
    where processes die again and again.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=RESTARTS,
        start_method=_start_method(),
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
    """What each process does. It returns an error that is final: for any other it is started again."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(*arguments)
    except FINAL as error:
        return error
    return None


def _end_with_parent() -> None:
    """No orphans: they would write where the next run does. What is written is whole at any moment, so the end is immediate."""
    multiprocessing.parent_process().join()
    sys.stderr.write("stacklm: the process that started this one is gone; stopping\n")
    os._exit(143)


def _start_method() -> str:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.set_forkserver_preload(PRELOADED)
    return "forkserver"


@contextmanager
def _own_signals() -> Iterator[None]:
    """The agent takes signals for itself; give them back to whom they belong."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
