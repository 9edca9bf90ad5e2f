"""Optimizers over parameter groups by role, and their steps within the backward pass."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stacklm.config.optimizer import AdamW, Muon, Optimizer
from stacklm.model.roles import roles
from stacklm.train import adafactor, muon
from stacklm.train.errors import NonFiniteError


def build_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """The optimizer of those settings, one group for each role; weight decay on matrices only.

    Roles, not shapes, decide: packing N layers makes a gain two-dimensional. Each group keeps its peak learning rate
    beside the present one, for `set_lr`. The first group is that of the matrices.
    """
    if isinstance(settings, AdamW):
        betas = (settings.beta1, settings.beta2)
        return torch.optim.AdamW(_groups(model, settings), betas=betas, eps=settings.eps, fused=True)
    if isinstance(settings, Muon):
        rest = settings.rest
        betas = (rest.beta1, rest.beta2)
        return muon.Muon(_groups(model, settings), settings.momentum, settings.ns_steps, betas, rest.eps)
    return adafactor.Adafactor(_groups(model, settings), settings.beta2_decay, settings.eps)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of every group to a share of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


class InBackward:
    """Updates within the backward pass: each parameter's as soon as its gradient is complete, which is then freed.

    For as long as the model lives, `loss.backward()` is a whole step, the same to the bit as one of `optimizer.step()`
    without clipping; there is never more than one parameter's gradient. Every parameter must get all of its gradient in one
    backward pass. A pass raises `NonFiniteError` before an update that would spoil its parameter; those behind it
    have been updated by then, so only a checkpoint leads back.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self.optimizer = optimizer
        self._norms: list[float] = []
        model.zero_grad()
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(partial(self._update, name))

    def step(self, loss: Tensor) -> Tensor:
        """Nothing is left to do; the norm of all gradients since the last call, a scalar as `loss` is."""
        norm = torch.tensor(math.hypot(*self._norms), device=loss.device)
        self._norms.clear()
        return norm

    def _update(self, name: str, parameter: Tensor) -> None:
        norm = torch.linalg.vector_norm(parameter.grad).item()
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"the gradient of {name} has the norm {norm}; within a backward pass the parameters behind it are updated "
                "already, so the run goes on from its last checkpoint: lower peak_lr or raise train.warmup_steps"
            )
        self._norms.append(norm)
        self.optimizer.step()  # of this parameter alone: it passes over those without a gradient
        parameter.grad = None


def _groups(model: nn.Module, settings: Optimizer) -> list[dict[str, Any]]:
    role_of = roles(model)
    members: dict[str, list[nn.Parameter]] = {"matrix": []}
    for name, parameter in model.named_parameters():
        members.setdefault(role_of[name], []).append(parameter)
    matrices = {"peak_lr": settings.peak_lr, "weight_decay": settings.weight_decay}
    others = {"peak_lr": settings.rest.peak_lr if isinstance(settings, Muon) else settings.peak_lr, "weight_decay": 0.0}
    groups = [
        {"role": role, "params": parameters, **(matrices if role == "matrix" else others)} for role, parameters in members.items()
    ]
    return [group | {"lr": group["peak_lr"]} for group in groups]
