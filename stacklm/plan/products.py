"""Matrix products, of which a CPU's library compiles one kernel for each shape and keeps it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.baddbmm_, aten.matmul)
KERNEL = 2 * 258_376
"""Bytes of one of oneDNN's: two buffers for machine code, as found in processes on x86 with torch 2.13."""
MOST = 1024
"""Kernels that oneDNN keeps by default (ONEDNN_PRIMITIVE_CACHE_CAPACITY)."""

HEADS = 16
"""Heads that are followed. They come in groups of up to so many where windows are long, and the last may be smaller."""


class Products:
    """The different matrix products among the operations that it is told of."""

    def __init__(self) -> None:
        self._seen: set[tuple] = set()
        self._kernels: set[tuple] = set()

    @property
    def bytes(self) -> int:
        return min(len(self._kernels), MOST) * KERNEL

    def note(self, operation: Callable, args: tuple) -> None:
        """Count a product, or those inside of an operation of our own, which looks like one operation from outside."""
        if operation.overloadpacket in PRODUCTS:
            self._kernels.add(_signature(operation, args))
        elif operation.namespace == "stacklm" and (signature := _signature(operation, args)) not in self._seen:
            self._seen.add(signature)
            with _disable_current_modes(), _Inside(self), _one_thread():
                OPDEFS[operation._schema.name]._init_fn(*(_without_data(arg) for arg in args))


class _Inside(TorchDispatchMode):
    """Inside the block, every operation is noted."""

    def __init__(self, products: Products) -> None:
        super().__init__()
        self._products = products

    def __torch_dispatch__(self, operation: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self._products.note(operation, args)
        return operation(*args, **(kwargs or {}))


@contextmanager
def _one_thread() -> Iterator[None]:
    """A mode sees the operations of its own thread only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _signature(operation: Callable, args: tuple) -> tuple:
    return operation, *((tuple(arg.shape), arg.stride()) for arg in args if isinstance(arg, Tensor))


def _without_data(arg: object) -> object:
    """The first row of a batch and the first heads, as the others only repeat their products: [B, T, H, ...]."""
    if not isinstance(arg, Tensor):
        return arg
    _, length, heads, *rest = arg.shape
    return torch.empty_strided((1, length, min(heads, HEADS + heads % HEADS), *rest), arg.stride(), device="meta")
