"""Memory that does not grow with depth: of each stack or block only its input is kept, and the rest computed again.

(Chen et al. 2016, arXiv:1604.06174.) What attention by blocks made is kept too: it is small, and most of the work.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from stacklm.model.dense import Block
from stacklm.model.stacked import ParallelStack

KEPT = [torch.ops.stacklm.blocked_attention.default]

keeping_inputs = partial(checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, KEPT))
"""`keeping_inputs(function, *inputs)`: the same outputs and gradients; only `inputs` wait for the backward pass."""


def recompute(model: nn.Module) -> None:
    """Let every stack or block of a model keep its input alone. To be undone by nothing: meant for a model that trains."""
    for module in model.modules():
        if isinstance(module, (ParallelStack, Block)):
            module.forward = partial(keeping_inputs, module.forward)
