"""What to do when the memory was not enough."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import torch

from stacklm.config.params import preview
from stacklm.plan.levers import fit
from stacklm.plan.plan import plan
from stacklm.plan.text import verdict


class OutOfMemoryError(MemoryError):
    """A run that this machine cannot hold, with settings that it can."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says, in torch's words or Python's, that there was no memory left, on a GPU or beside it."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def available(device: str) -> int:
    """Bytes that a process may take: the GPU's, or the machine's, or less where the process is limited."""
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    total = psutil.virtual_memory().total
    if sys.platform == "win32":
        return total
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return total if limit == resource.RLIM_INFINITY else min(total, limit)


def advice(file: Path, name: str) -> str:
    """What the plan says of training that model of a params file here, and which settings would fit."""
    params = preview(file, [])
    budget = available(params.train.device)
    moves = fit(lambda more: preview(file, more), [name], budget)
    return verdict(plan(params, [name], None), moves, budget)
