"""Parameters and FLOPs of an architecture, counted from its modules without allocating or running it.

Every parameter has a role. Optimizers group by role, never by number of dimensions: packed biases have two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stacklm.config.model import Architecture, Dense, Role, Stacked
from stacklm.model.build import build
from stacklm.model.custom import Custom
from stacklm.model.measured import ROLES


@dataclass(frozen=True)
class Counts:
    """Parameters by role and in total; floating-point operations (FLOPs) per token, where a multiply-add counts as two.

    FLOPs include matrix products and attention. A training step takes three times those of a forward pass: once for the loss,
    once for the gradients of activations, once for those of weights.
    """

    parameters: dict[Role, int]
    total: int
    forward_flops_per_token: int
    training_flops_per_token: int


def count(architecture: Architecture, vocab_size: int, context: int) -> Counts:
    """Count parameters and FLOPs. With causal attention a token attends to (T + 1) / 2 positions on average."""
    try:
        return _counted(architecture, vocab_size, context, "meta")
    except Exception:
        if isinstance(architecture, (Stacked, Dense)):
            raise
    with torch.random.fork_rng(devices=[]):  # a model whose code depends on tensor values
        return _counted(architecture, vocab_size, context, "cpu")


def _counted(architecture: Architecture, vocab_size: int, context: int, device: str) -> Counts:
    with torch.device(device):
        model = build(architecture, vocab_size, context)
        parameters: dict[Role, int] = {"embedding": 0, "matrix": 0, "vector": 0, "head": 0}
        role_of = roles(model)
        for name, parameter in model.named_parameters():
            parameters[role_of[name]] += parameter.numel()
        forward = round(forward_flops(model, attended=(context + 1) / 2))
    return Counts(parameters, sum(parameters.values()), forward, 3 * forward)


def forward_flops(module: Any, attended: float) -> float:
    """FLOPs per token of one forward pass, where a token attends to `attended` positions on average.

    A module with matrix products has its own `flops_per_token`; for any other it is the sum over its children.
    """
    if hasattr(module, "flops_per_token"):
        return module.flops_per_token(attended)
    return sum(forward_flops(child, attended) for child in module.children())


def roles(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter, by its name in `model.named_parameters()`; a tied head counts as the embedding.

    Raises `KeyError` naming a parameter of a module type that is not in `ROLES`, and `ParamsError` for a parameter of a user's
    model that has no role.
    """
    if isinstance(model, Custom):
        return model.roles()
    found = {}
    for name, _ in model.named_parameters():
        module_name, _, parameter_name = name.rpartition(".")
        module = model.get_submodule(module_name)
        try:
            found[name] = ROLES[type(module)][parameter_name]
        except KeyError:
            raise KeyError(f"{name}: no role is written down for `{parameter_name}` of {type(module).__name__}") from None
    return found
