"""Estimates of the memory of a run, from its real code and without data.

The trainer's step runs on tensors with shapes, strides and lifetimes, but no content. Every storage is tracked from its
allocation to its release, so any architecture, optimizer or loss is planned from its own code. Memory that a kernel allocates
inside one operation, or that the allocator retains, is not seen: a linear fit to measured processes adds it.
"""

from __future__ import annotations

import gc
import importlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stacklm.config.model import Dense, Model, Stacked
from stacklm.config.schema import ParamsError
from stacklm.config.train import Train
from stacklm.data.batches import TrainBatches
from stacklm.model.build import build
from stacklm.train.loss import token_losses
from stacklm.train.trainer import Run, train_step
from stacklm.train.validate import Score

CPU = torch.device("cpu")
TENSORS = ("weights", "gradients", "optimizer state", "saved activations", "logits", "temporary")
COMPONENTS = (*TENSORS, "allocator", "process")

# Fitted and tested by `python benchmarks/memory.py`, which writes docs/measurements/memory.md.
OVERHEAD, PER_BYTE = 22_600_000, 1.215
"""Bytes that a CPU process takes beyond its imports: OVERHEAD + PER_BYTE * peak bytes of its tensors."""
LOW, HIGH = 0.89, 1.37
"""Smallest and largest ratio of measured to estimated bytes beyond the imports, over held-out configurations."""
PROCESS = 334_000_000
"""Bytes of Python, torch and all other libraries, without any tensor."""


@dataclass(frozen=True)
class Memory:
    """Bytes at peak memory, by component.

    `saved activations` are stored by the forward pass for the backward pass, `logits` are all tensors whose last dimension is
    the vocabulary, `temporary` are the tensors that the backward pass and the optimizer work on, `allocator` is what a process
    takes beyond its tensors: kernels, their buffers, and freed blocks that the C library keeps.
    """

    parts: dict[str, int]

    @property
    def tensors(self) -> int:
        return sum(self.parts[part] for part in TENSORS)

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def interval(self) -> tuple[int, int]:
        """The range of the total that the errors of the calibration allow, as (low, high)."""
        process = self.parts["process"]
        low, high = (process + round((self.total - process) * ratio) for ratio in (LOW, HIGH))
        return low, high


@lru_cache
def training_memory(model: Model, vocab_size: int, train: Train) -> Memory:
    """Return the peak memory of training on a CPU."""
    micro_batches = min(2, train.global_batch_size // train.micro_batch_size)  # a third adds nothing to the peak
    train = replace(train, global_batch_size=micro_batches * train.micro_batch_size, compile=False)
    with _explained(model, vocab_size, train.context_length), tracing(vocab_size) as timeline:
        run = fresh_run(model, vocab_size, train)
        timeline.follow(run.model)
        for _ in range(2):  # the first step allocates the optimizer's state
            train_step(run, step=1)
            for state in run.optimizer.state.values():
                for tensor in state.values():
                    timeline.name(tensor, "optimizer state")
    return timeline.memory()


@lru_cache
def evaluation_memory(model: Model, vocab_size: int, context: int, batch_size: int) -> Memory:
    """Return the peak memory of scoring `batch_size` sequences at once on a CPU."""
    with _explained(model, vocab_size, context), tracing(vocab_size) as timeline, torch.no_grad():
        network = build(model.architecture, vocab_size, context).eval()
        fresh: list[Any] = list(network.parameters())
        read: list[Any] = [torch.empty_like(parameter) for parameter in fresh]
        for parameter, weights in zip(fresh, read, strict=True):
            parameter.storage_ = weights.storage_  # trained weights replace the fresh ones
        timeline.follow(network)
        token_losses(network, *_Sequences(batch_size, context).batch(0))
    return timeline.memory()


@contextmanager
def _explained(model: Model, vocab_size: int, context: int) -> Iterator[None]:
    """Explain, for a model from outside this package, why code that works with data may fail here."""
    if isinstance(model.architecture, (Stacked, Dense)):
        yield
        return
    try:
        with torch.device("meta"):
            build(model.architecture, vocab_size, context)  # imports its modules now: in a trace, constants would have no data
        yield
    except Exception as error:
        raise ParamsError(
            f"cannot estimate the memory of this model, since that runs it on tensors without data: {error}"
        ) from error


def fresh_run(model: Model, vocab_size: int, train: Train, batches: TrainBatches | None = None, device: torch.device = CPU) -> Run:
    """Return a run for optimizer steps only, over `batches` or, by default, batches of zeros."""
    return Run(
        "plan",
        train,
        model,
        vocab_size,
        batches=batches or _Sequences(train.global_batch_size, train.context_length),
        validate=lambda network: Score(0, 0.0, 0.0, 0),
        probe_BT=torch.zeros(1, 1, dtype=torch.long),
        identity={},
        work=Path(),
        device=device,
    )


@contextmanager
def tracing(vocab_size: int) -> Iterator[Timeline]:
    """Track tensors, which have no data inside the block; nothing is computed and almost nothing allocated.

    Python's garbage collector is off: when it frees tensors of a model with reference cycles depends on everything else in the
    process. The plan assumes that they live as long as possible.
    """
    with _compiler_not_imported(), without_garbage_collector(), Timeline(vocab_size) as timeline:
        yield timeline


@contextmanager
def without_garbage_collector() -> Iterator[None]:
    """Disable the garbage collector inside the block: unreferenced objects are freed at once, reference cycles are not freed."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class DatalessTensor(Tensor):
    """A tensor with a layout and a storage without bytes, which reports the CPU as its device, for model code and autocast."""

    @staticmethod
    def __new__(cls, layout: Layout, storage: Storage) -> DatalessTensor:
        strides, offset, dtype = layout.strides, layout.offset, layout.dtype
        return Tensor._make_wrapper_subclass(cls, layout.shape, strides=strides, storage_offset=offset, dtype=dtype, device=CPU)

    def __init__(self, layout: Layout, storage: Storage) -> None:
        self.layout_, self.storage_ = layout, storage

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        raise RuntimeError(f"{operation} on a tensor without data, after its trace has ended")


class Layout(NamedTuple):
    """The layout of a tensor in its storage of `nbytes` bytes."""

    shape: torch.Size
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    nbytes: int

    @staticmethod
    def of(tensor: Tensor) -> Layout:
        return Layout(tensor.shape, tensor.stride(), int(tensor.storage_offset()), tensor.dtype, tensor.untyped_storage().nbytes())

    def on_meta(self) -> Tensor:
        """Return a tensor with this layout on torch's meta device, whose kernels infer the layout of an operation's results."""
        whole = torch.empty(self.nbytes // self.dtype.itemsize, dtype=self.dtype, device="meta")
        return whole.as_strided(self.shape, self.strides, self.offset)


class Storage:
    """The storage shared by tensors that are views of each other; released with the last of them."""

    def __init__(self, nbytes: int, component: str, alive: Counter[str]) -> None:
        self.nbytes, self.component, self._alive = nbytes, component, alive
        alive[component] += nbytes

    def rename(self, component: str) -> None:
        """Assign it to another component."""
        self._alive[self.component] -= self.nbytes
        self._alive[component] += self.nbytes
        self.component = component

    def __del__(self) -> None:
        self._alive[self.component] -= self.nbytes


@dataclass(frozen=True)
class _Result:
    """A result of an operation: its layout, and the index of the argument that it is (`same`) or views; -1 for a new storage."""

    layout: Layout
    argument: int
    same: bool


class Timeline(TorchDispatchMode):
    """Tracks live bytes by component after each operation inside the block, and their peak."""

    _results: ClassVar[dict[tuple, object]] = {}
    """Cache by operation and layouts of its arguments: layers and steps repeat, and torch's meta kernels are slow."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self._vocab_size = vocab_size
        self._alive: Counter[str] = Counter()
        self._peak: dict[str, int] = {}

    def follow(self, model: nn.Module) -> None:
        """Assign the weights and gradients of a model to their components."""

        def accumulated(parameter: Tensor) -> None:
            if parameter.grad is not None:  # None if the optimizer has stepped within the backward pass
                self.name(parameter.grad, "gradients")

        for parameter in model.parameters():
            self.name(parameter, "weights")
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(accumulated)

    def name(self, tensor: Any, component: str) -> None:
        """Assign the storage of a tensor to a component."""
        tensor.storage_.rename(component)

    def memory(self) -> Memory:
        """Return the peak so far."""
        parts = dict.fromkeys(COMPONENTS, 0) | self._peak | {"process": PROCESS}
        tensors = sum(self._peak.values())
        return Memory(parts | {"allocator": max(0, round(OVERHEAD + PER_BYTE * tensors) - tensors)})

    def __torch_dispatch__(self, operation: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if operation is torch.ops.aten._local_scalar_dense.default:  # the value of a loss or norm, or a check for NaN or Inf
            return 1.0 if args[0].is_floating_point() else 0
        if operation.namespace == "profiler":
            return operation(*args, **(kwargs or {}))
        arguments: list[DatalessTensor] = []

        def described(value: object) -> tuple:
            if not isinstance(value, Tensor):
                return type(value), value  # 1, 1.0 and True are equal
            arguments.append(value if isinstance(value, DatalessTensor) else self._new(Layout.of(value)))
            return arguments[-1].layout_

        def made(result: object) -> object:
            if not isinstance(result, _Result):
                return result
            if result.same:
                return arguments[result.argument]
            if result.argument < 0:
                return self._new(result.layout)
            return DatalessTensor(result.layout, arguments[result.argument].storage_)

        kwargs = kwargs or {}
        key = operation, _mapped(described, args), tuple(kwargs), _mapped(described, tuple(kwargs.values()))
        if key not in self._results:
            self._results[key] = _results(operation, args, kwargs)
        result = _mapped(made, self._results[key])
        if self._alive.total() > sum(self._peak.values()):
            self._peak = dict(self._alive)
        return result

    def _new(self, layout: Layout) -> DatalessTensor:
        return DatalessTensor(layout, Storage(layout.nbytes, self._component(layout), self._alive))

    def _component(self, layout: Layout) -> str:
        if len(layout.shape) > 1 and layout.shape[-1] == self._vocab_size and layout.dtype.is_floating_point:
            return "logits"
        in_backward = torch._C._current_graph_task_id() != -1
        return "saved activations" if torch.is_grad_enabled() and not in_backward else "temporary"


def _results(operation: Any, args: tuple, kwargs: dict[str, object]) -> object:
    """Return the layouts of the results of an operation, by running it on the meta device."""
    metas: list[Tensor] = []

    def meta_of(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        metas.append((value.layout_ if isinstance(value, DatalessTensor) else Layout.of(value)).on_meta())
        return metas[-1]

    def result_of(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        same = next((i for i, meta in enumerate(metas) if meta is value), -1)
        storage = value.untyped_storage()._cdata
        view = next((i for i, meta in enumerate(metas) if meta.untyped_storage()._cdata == storage), -1)
        return _Result(Layout.of(value), view if same < 0 else same, same >= 0)

    args, kwargs = _mapped(meta_of, args), {name: _mapped(meta_of, value) for name, value in kwargs.items()}
    if any(argument.name == "device" for argument in operation._schema.arguments):
        kwargs["device"] = torch.device("meta")
    before = [Layout.of(meta) for meta in metas]
    result = _mapped(result_of, operation(*args, **kwargs))
    if [Layout.of(meta) for meta in metas] != before:
        raise NotImplementedError(f"{operation} changes the layout of a tensor in place, which is not supported")
    return result


def _mapped(function: Callable[[object], object], value: object) -> Any:
    """Apply the function to every value in nested lists and tuples, which become tuples."""
    return tuple([_mapped(function, each) for each in value]) if isinstance(value, (list, tuple)) else function(value)


class _Sequences(TrainBatches):
    """Batches of zeros."""

    def __init__(self, batch_size: int, context: int) -> None:
        self.shape = batch_size, context

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.shape, dtype=torch.long), torch.zeros(self.shape, dtype=torch.long)

    def targets(self, step: int) -> int:
        return math.prod(self.shape)


@contextmanager
def _compiler_not_imported() -> Iterator[None]:
    """Keep optimizers from importing torch's compiler inside the block, which takes a third of the time of a plan.

    Outside of compiled code they call only two of its functions, which do nothing there; a stub provides these. Accessing any
    other attribute imports the compiler.
    """
    name = "torch._dynamo"
    if name in sys.modules:
        yield
        return
    stand_in = ModuleType(name)

    def remove() -> None:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name], torch._dynamo

    def other(attribute: str) -> object:
        remove()
        return getattr(importlib.import_module(name), attribute)

    vars(stand_in).update(disable=lambda function, *_, **__: function, graph_break=lambda: None, __getattr__=other)
    sys.modules[name] = torch._dynamo = stand_in
    try:
        yield
    finally:
        remove()
