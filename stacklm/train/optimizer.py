"""AdamW over parameter groups by role."""

from __future__ import annotations

import torch
from torch import nn

from stacklm.config.model import Optimizer
from stacklm.model.roles import roles


def build_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2017, 1711.05101), one group for each role; weight decay on matrices only.

    Roles, not shapes, decide: packing N layers makes a gain two-dimensional. Each group keeps its peak learning rate
    beside the present one, for `set_lr`.
    """
    role_of = roles(model)
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(role_of[name], []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "role": role,
                "params": parameters,
                "peak_lr": settings.peak_lr,
                "weight_decay": settings.weight_decay if role == "matrix" else 0.0,
            }
            for role, parameters in groups.items()
        ],
        lr=settings.peak_lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of every group to a share of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
