"""The machine under a run: which device, how many threads, and arithmetic that repeats itself."""

from __future__ import annotations

import os

import torch

from stacklm.config.schema import ParamsError

EXACT = 2e-6
"""An error of sums of some hundred float32 products; with bfloat16 it is above 1e-3."""


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
    choose_products()
    return torch.device(device)


def choose_products() -> bool:
    """Let oneDNN multiply float32 matrices on a CPU where it does so in float32; whether it does.

    It is up to 2.5 times faster than torch's default on processors that the default knows little of. Torch hands products
    to oneDNN only with leave to round to bfloat16, so what it does with that leave is tried out: where it rounds, the
    leave is withdrawn.
    """
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    exact = product_error() <= EXACT
    if not exact:
        torch.backends.mkldnn.matmul.fp32_precision = "none"
    return exact


def product_error() -> float:
    """The largest relative error of float32 matrix products on the CPU, over shapes for which kernels differ."""
    generator = torch.Generator().manual_seed(0)
    errors = []
    for shape in ((512, 512), (256, 32), (8, 64, 256), (8, 64, 8)):
        left, right = (torch.randn(shape, generator=generator) for _ in range(2))
        wanted = left.double() @ right.double().mT
        errors.append(((left @ right.mT - wanted).norm() / wanted.norm()).item())
    return max(errors)
