"""What an architecture consists of and costs, counted from its modules without allocating or running it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from stacklm.config.model import Architecture
from stacklm.model.build import build
from stacklm.model.roles import Role, roles


@dataclass(frozen=True)
class Counts:
    """Parameters by role and in all; floating-point operations a token, a multiplication and an addition being two.

    Operations are those of matrix products and attention. A training step does three times those of a forward: one for
    the loss, one for the gradients of activations, one for those of weights.
    """

    parameters: dict[Role, int]
    total: int
    forward_flops_per_token: int
    training_flops_per_token: int


def count(architecture: Architecture, vocab_size: int, context: int) -> Counts:
    """Count the model of that architecture. A token attends causally, so to (T + 1) / 2 positions on average."""
    with torch.device("meta"):
        model = build(architecture, vocab_size, context)
    parameters: dict[Role, int] = {"embedding": 0, "matrix": 0, "vector": 0, "head": 0}
    role_of = roles(model)
    for name, parameter in model.named_parameters():
        parameters[role_of[name]] += parameter.numel()
    forward = round(forward_flops(model, attended=(context + 1) / 2))
    return Counts(parameters, sum(parameters.values()), forward, 3 * forward)


def forward_flops(module: nn.Module, attended: float) -> float:
    """Operations a token of one forward, where a token attends to `attended` positions on average.

    A module that multiplies knows its own `flops_per_token`; any other costs what its parts cost.
    """
    if hasattr(module, "flops_per_token"):
        return module.flops_per_token(attended)
    return sum(forward_flops(child, attended) for child in module.children())
