"""The device of a run, its precision, and how forward and backward passes run on it."""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from stacklm.config.schema import ParamsError
from stacklm.config.train import Train
from stacklm.model.custom import Custom
from stacklm.model.dense import Block
from stacklm.model.layers import LanguageModel
from stacklm.model.stacked import ParallelStack
from stacklm.train.loss import Arithmetic

EXACT = 2e-6
"""Bound on the relative error of sums of a few hundred float32 products; with bfloat16 the error is above 1e-3."""


def setup_device(device: str, threads: int) -> torch.device:
    """Make torch deterministic in this process and return the device that `device` names.

    `auto` is the GPU if there is one. Equal settings then give equal bits on equal hardware: the number of threads is fixed, and no
    operation adds in nondeterministic order. Raises `ParamsError` for a device that this machine or this build of torch does not
    have.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, there in available.items() if there)
    if not available[device]:
        here = ", ".join(name for name, there in available.items() if there)
        raise ParamsError(f"device: {device} is not available here with torch {torch.__version__}; choose auto or {here}")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
    torch.use_deterministic_algorithms(True)
    deterministic: Any = torch.utils.deterministic  # a module with properties that type checkers do not know
    deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a pass over every buffer
    torch.set_num_threads(threads)
    choose_matmul_kernels()
    return torch.device(device)


def choose_matmul_kernels() -> bool:
    """Use oneDNN for float32 matrix products on a CPU if it computes them in float32; return whether it does.

    It is up to 2.5 times faster than torch's default on processors for which the default is poorly tuned. Torch uses oneDNN only if
    rounding to bfloat16 is allowed, so this is allowed, the error is measured, and it is disallowed again if oneDNN does round.
    """
    backend: Any = torch.backends.mkldnn
    backend.matmul.fp32_precision = "bf16"
    exact = matmul_error() <= EXACT
    if not exact:
        backend.matmul.fp32_precision = "none"
    return exact


def matmul_error() -> float:
    """The largest relative error of float32 matrix products on the CPU, over shapes that use different kernels."""
    generator = torch.Generator().manual_seed(0)
    errors = []
    for shape in ((512, 512), (256, 32), (8, 64, 256), (8, 64, 8)):
        left, right = (torch.randn(shape, generator=generator) for _ in range(2))
        exact = left.double() @ right.double().mT
        errors.append(((left @ right.mT - exact).norm() / exact.norm()).item())
    return max(errors)


def autocast_context(config: Train, device: torch.device) -> Arithmetic:
    """The context of forward passes: float32, or matrix products in bfloat16 (torch.autocast) with weights kept in float32."""
    if config.precision == "fp32":
        return nullcontext
    return partial(torch.autocast, device.type, torch.bfloat16)


def apply_memory_options(model: LanguageModel, config: Train) -> None:
    """Choose how the model's forward and backward passes run; outputs and gradients stay the same, up to rounding."""
    checkpointing = config.activation_checkpointing == "full"
    if isinstance(model, Custom):
        model.as_trained(checkpointing, config.compile)
        return
    model.activation_checkpointing = checkpointing
    if config.compile:
        for module in model.modules():
            if isinstance(module, (ParallelStack, Block)):
                module.compile(dynamic=False)
