"""From settings to a run that is ready to train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stacklm.config.model import Model
from stacklm.config.optimizer import Optimizer
from stacklm.config.train import Train
from stacklm.data.batches import TrainBatches
from stacklm.model.build import build
from stacklm.model.count import count
from stacklm.model.groups import in_groups
from stacklm.model.recompute import recompute
from stacklm.train.guard import Guard
from stacklm.train.health import Health
from stacklm.train.loss import Arithmetic
from stacklm.train.optimizer import InBackward, build_optimizer
from stacklm.train.parallel import objective_of
from stacklm.train.prefetch import Prefetch
from stacklm.train.team import ALONE, Team
from stacklm.train.trainer import Run, Stepper
from stacklm.train.validate import Score

Validate = Callable[[nn.Module], Score]


def assemble(
    name: str,
    config: Train,
    model: Model,
    vocab_size: int,
    batches: TrainBatches | Prefetch,
    validate: Validate,
    probe_BT: Tensor,
    identity: Mapping[str, Any],
    work: Path,
    device: torch.device,
    team: Team = ALONE,
) -> Run:
    """A run with fresh weights, as the settings fix them: the model is drawn on the CPU, so it is the same for every device.

    `validate` scores a model; `probe_BT` are the ids by which its health is seen. Every process of a team starts with the same
    model; what is random later, such as dropout, is not the same.
    """
    torch.manual_seed(config.seed)
    network = build(model.architecture, vocab_size, config.context)
    if device.type != "cpu":
        network.to(device)
    lean(network, config)
    objective = objective_of(network, arithmetic(config, device), config, team)
    if not team.leads:
        torch.manual_seed(config.seed + team.rank * 2**32)
    optimizer = build_optimizer(network, model.optimizer)
    return Run(
        name=name,
        config=config,
        model=network,
        objective=objective,
        optimizer=optimizer,
        stepper=stepper(network, optimizer, config, model.optimizer),
        batches=batches,
        validate=partial(validate, network),
        health=Health(network, probe_BT.to(device)),
        flops_per_token=count(model.architecture, vocab_size, config.context).training_flops_per_token,
        identity=identity,
        work=work,
        device=device,
        team=team,
    )


def stepper(network: nn.Module, optimizer: torch.optim.Optimizer, config: Train, settings: Optimizer) -> Stepper:
    """What takes the optimizer's steps: within the backward pass, or after it."""
    if settings.in_backward:
        return InBackward(optimizer, network)
    return Guard(optimizer, network, config.clip_norm, config.non_finite)


def lean(network: nn.Module, config: Train) -> None:
    """Choose how the model's forward and backward passes run; outputs and gradients stay the same, up to rounding."""
    if config.layers_at_once:
        in_groups(network, config.layers_at_once)
    if config.recompute == "stacks":
        recompute(network)
    if config.compile:
        network.features = torch.compile(network.features, dynamic=False)


def arithmetic(config: Train, device: torch.device) -> Arithmetic:
    """The context of forward passes: float32, or products in bfloat16 (torch.autocast) of weights that stay in float32."""
    if config.precision == "fp32":
        return nullcontext
    return partial(torch.autocast, device.type, torch.bfloat16)
