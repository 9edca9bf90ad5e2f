"""The machine under a run: which device, how many threads, and arithmetic that repeats itself."""

from __future__ import annotations

import os

import torch

from stacklm.config.schema import ParamsError


def prepare(device: str, threads: int) -> torch.device:
    """Make torch deterministic in this process and return the device that `device` names.

    `auto` is the GPU where there is one. Equal settings then give equal bits on equal hardware: sums over a fixed
    number of threads, and no operation whose order of additions is left to chance. Raises `ParamsError` for a device
    that this machine or this build of torch does not have.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, there in available.items() if there)
    if not available[device]:
        here = ", ".join(name for name, there in available.items() if there)
        raise ParamsError(f"device: {device} is not available here with torch {torch.__version__}; choose auto or {here}")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with a workspace of its own
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a pass over every buffer
    torch.set_num_threads(threads)
    return torch.device(device)
