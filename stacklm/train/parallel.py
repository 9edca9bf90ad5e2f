"""One model on several processes: how they share weights and gradients.

Every process sees rows of its own, as many as every other, so the mean of their mean losses is the mean over all tokens, and
the mean of their gradients its gradient: both ways of sharing average. Both are objectives like `loss.Objective`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stacklm.config.train import Train
from stacklm.model.dense import Block
from stacklm.model.stacked import ParallelStack
from stacklm.train.loss import Arithmetic, Objective
from stacklm.train.team import Team


class Replicated(Objective):
    """Every process has the whole model; gradients are averaged during the backward pass (Li et al. 2020, arXiv:2006.15704)."""

    def __init__(self, model: nn.Module, arithmetic: Arithmetic) -> None:
        super().__init__(model, arithmetic)
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # `broadcast_buffers` has another name to come
            inner = Objective(model, arithmetic)
            self.shared = DistributedDataParallel(inner, broadcast_buffers=False, gradient_as_bucket_view=True)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return self.shared(inputs_BT, targets_BT)

    def no_sync(self) -> AbstractContextManager:
        return self.shared.no_sync()


class Sharded(Objective):
    """Every process keeps a part of each weight, gradient and moment, and gathers a stack or block while it is at work.

    Fully sharded data parallelism (Zhao et al. 2023, arXiv:2304.11277), torch's `fully_shard`: parameters become DTensors.
    What is in no stack or block is gathered before `features` and stays so until the backward pass, since the head is read
    after it.
    """

    def __init__(self, model: nn.Module, arithmetic: Arithmetic) -> None:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        super().__init__(model, arithmetic)
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nothing here writes into one
        self.parts = [*(module for module in model.modules() if isinstance(module, (ParallelStack, Block))), model]
        for module in self.parts:
            fully_shard(module)
        register_fsdp_forward_method(model, "features")

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.model.set_requires_gradient_sync(False)
        yield
        self.model.set_requires_gradient_sync(True)

    @contextmanager
    def looked_into(self) -> Iterator[None]:
        self.model.unshard()
        yield
        self.model.reshard()  # as a backward pass does

    def gather(self) -> None:
        for module in self.parts:
            module.unshard()


def objective_of(model: nn.Module, arithmetic: Arithmetic, config: Train, team: Team) -> Objective:
    """What a team minimises; all of its processes call it at the same time. Where weights are sharded, the model changes."""
    if team.size == 1:
        return Objective(model, arithmetic)
    return {"ddp": Replicated, "fsdp": Sharded}[config.parallel](model, arithmetic)
