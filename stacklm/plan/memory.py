"""How much memory a run takes, from its own code and without its data.

The trainer's step runs on fake tensors (torch.utils FakeTensorMode): they have shapes and lifetimes, and no content. Every
block that an operation makes is noted from its birth to its end, so any architecture, optimizer or loss is followed as it
is, and nothing has to be kept in step by hand. What a kernel takes for itself inside one operation is not seen; on a CPU
it is a few MB, and with attention by blocks some more for each thread.
"""

from __future__ import annotations

import multiprocessing
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from stacklm.config.model import Model
from stacklm.config.train import Train
from stacklm.model.build import build
from stacklm.plan.heap import Heap
from stacklm.plan.products import Products
from stacklm.train.assemble import assemble
from stacklm.train.loss import token_losses
from stacklm.train.machine import choose_products
from stacklm.train.trainer import update

COMPONENTS = (
    "weights",
    "gradients",
    "optimizer state",
    "saved activations",
    "logits",
    "temporary",
    "kernels",
    "allocator",
    "process",
)
PROCESS = 344_000_000
"""Python, torch and all other libraries, without a single tensor: as measured on Linux by benchmarks/memory.py."""
STEPS = 4
"""Steps until a process of glibc has about stopped growing."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment of the highest peak, by component.

    `saved activations` were made by a forward pass and wait for the backward pass, `logits` are all that is as wide as the
    vocabulary, `temporary` is what the backward pass and the optimizer work with, `kernels` are matrix products compiled for one
    shape, where oneDNN multiplies, `allocator` is what the C library keeps back.
    """

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def tensors(self) -> int:
        """Without what the process and its libraries take."""
        return self.total - sum(self.parts[part] for part in ("kernels", "allocator", "process"))


@lru_cache
def training_memory(model: Model, vocab_size: int, train: Train) -> Memory:
    """The peak of training on a CPU in float32."""
    return _in_own_process(trace_training, model, vocab_size, train)


@lru_cache
def evaluation_memory(model: Model, vocab_size: int, context: int, batch_size: int) -> Memory:
    """The peak of scoring `batch_size` windows at once on a CPU."""
    return _in_own_process(trace_evaluation, model, vocab_size, context, batch_size)


def trace_training(model: Model, vocab_size: int, train: Train) -> Memory:
    """As `training_memory`, in this process, whose heap is less tidy than a fresh one's."""
    micro_batches = min(2, train.batch_size // train.micro_batch)  # a third leaves and finds what the second did
    train = replace(train, batch_size=micro_batches * train.micro_batch)
    with FakeTensorMode(), Timeline(vocab_size) as timeline:
        run = assemble(
            "plan",
            replace(train, compile=False),
            model,
            vocab_size,
            batches=_Windows(train.batch_size, train.context),
            validate=lambda network: None,
            probe_BT=torch.zeros(1, 1, dtype=torch.long),
            identity={},
            work=Path(),
            device=torch.device("cpu"),
        )
        timeline.follow(run.model)
        for _ in range(STEPS):
            update(run, step=1)
            for state in run.optimizer.state.values():
                for tensor in state.values():
                    timeline.name(tensor, "optimizer state")
        return timeline.memory()


def trace_evaluation(model: Model, vocab_size: int, context: int, batch_size: int) -> Memory:
    """As `evaluation_memory`, in this process."""
    with FakeTensorMode(), Timeline(vocab_size) as timeline, torch.no_grad():
        network = build(model.architecture, vocab_size, context).eval()
        read = [torch.empty_like(parameter) for parameter in network.parameters()]  # the trained weights take their places
        for parameter, weights in zip(network.parameters(), read, strict=True):
            parameter.data = weights
        del read, weights
        timeline.follow(network)
        for _ in range(2):
            token_losses(network, *_Windows(batch_size, context).batch(0))
        return timeline.memory()


class Timeline(TorchDispatchMode):
    """Inside the block: what is alive, by component, after each operation of this process, and the highest of it."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self._vocab_size = vocab_size
        self._blocks: dict[int, _Block] = {}
        self._alive: Counter[str] = Counter()
        self._peak: dict[str, int] = {}
        self._products = Products()
        with _disable_current_modes():  # real numbers tell, also where tensors have none
            self._compiles = choose_products()
        try:
            self._heap = Heap()
        except OSError:
            self._heap = None

    def follow(self, model: nn.Module) -> None:
        """Tell weights and gradients from the rest."""

        def accumulated(parameter: Tensor) -> None:
            if parameter.grad is not None:  # it is used up at once where steps are taken within the backward pass
                self.name(parameter.grad, "gradients")

        for parameter in model.parameters():
            self.name(parameter, "weights")
            parameter.register_post_accumulate_grad_hook(accumulated)

    def name(self, tensor: Tensor, component: str) -> None:
        """Say what the block of a tensor is for."""
        block = self._blocks[tensor.untyped_storage()._cdata]
        self._alive[block.component] -= block.size
        self._alive[component] += block.size
        block.component = component

    def memory(self) -> Memory:
        """The highest peak so far."""
        kernels = self._products.bytes if self._compiles else 0
        parts = dict.fromkeys(COMPONENTS, 0) | self._peak | {"kernels": kernels, "process": PROCESS}
        if self._heap:
            parts["allocator"] = max(0, self._heap.peak - sum(self._peak.values()))
        return Memory(parts)

    def __torch_dispatch__(self, operation: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if operation is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # the value of a loss or a norm, of which there is none: any finite one will do
        self._products.note(operation, args)
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        if sum(self._alive.values()) > sum(self._peak.values()):
            self._peak = dict(self._alive)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._blocks:
            size = storage.nbytes()
            address = self._heap.allocate(size) if self._heap else 0
            end = weakref.ref(storage, lambda _, key=storage._cdata: self._forget(key))
            self._blocks[storage._cdata] = _Block(size, self._component(tensor), address, end)
            self._alive[self._component(tensor)] += size

    def _forget(self, key: int) -> None:
        block = self._blocks.pop(key)
        self._alive[block.component] -= block.size
        if self._heap:
            self._heap.free(block.address, block.size)

    def _component(self, tensor: Tensor) -> str:
        if tensor.dim() > 1 and tensor.shape[-1] == self._vocab_size and tensor.is_floating_point():
            return "logits"
        in_backward = torch._C._current_graph_task_id() != -1
        return "saved activations" if torch.is_grad_enabled() and not in_backward else "temporary"


@dataclass
class _Block:
    size: int
    component: str
    address: int
    end: weakref.ref


@dataclass(frozen=True)
class _Windows:
    """Batches of tokens that nobody looks at, in the place of `TrainBatches`."""

    batch_size: int
    context: int

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        shape = (self.batch_size, self.context)
        return torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)


def _in_own_process(trace: Callable[..., Memory], *arguments: object) -> Memory:
    """The result of `trace` in a fresh process, whose heap nothing has used before; copies of one that is started once."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(trace, *arguments).result()
