"""Memory that does not grow with the number of parallel layers: some layers of a stack at a time.

Of each group only its input and what its heads saw are kept; the backward pass computes the rest again, group by group
(Chen et al. 2016, arXiv:1604.06174, with a stack's layers in place of a chain's). Attention by blocks is not among what
is computed again: it keeps nothing but its queries, keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stacklm.model.folded import PackedMap
from stacklm.model.packed import PackedLayerNorm, PackedLinear
from stacklm.model.recompute import keeping_inputs
from stacklm.model.stacked import ParallelStack

PACKED = (PackedLinear, PackedMap, PackedLayerNorm)
"""Modules whose parameters have the N layers as their first dimension."""


class InGroups:
    """A way to run the layers of a stack: `size` of them at a time, with the same outputs and gradients."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, layers: nn.Module, x_BTC: Tensor) -> Tensor:
        shared, groups = self._split(layers)

        def run(x_BTC: Tensor, group: dict[str, Tensor]) -> Tensor:
            return functional_call(layers, shared | group, x_BTC)

        return torch.cat([keeping_inputs(run, x_BTC, group) for group in groups], dim=-1)

    def _split(self, layers: nn.Module) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """The parameters that all layers share, and those of each group, by name."""
        shared, split = {}, {}
        for name, parameter in layers.named_parameters():
            if isinstance(layers.get_submodule(name.rpartition(".")[0]), PACKED):
                split[name] = parameter.split(self.size)
            else:
                shared[name] = parameter
        return shared, [dict(zip(split, group, strict=True)) for group in zip(*split.values(), strict=True)]


def in_groups(model: nn.Module, size: int) -> None:
    """Let the stacks of a model run `size` of their layers at a time; a model without stacks stays as it is."""
    for module in model.modules():
        if isinstance(module, ParallelStack):
            module.run = InGroups(size)
