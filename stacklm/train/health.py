"""Training health metrics: whether every part of the model learns, and at what scale.

Metrics are named `health/<what>/<where>`:

    gradient          L2 norm of the gradient, by role of the parameters (`stacklm.model.count.roles`)
    update            L2 norm of the optimizer's update, by role; estimated from a sample
    relative_update   that norm over the norm of the weights before the step, by role
    activation        RMS of the output of each stack (`stack0`, ...), or each block of a dense model (`block0`, ...)
    dead_features     share of the N * D features of a stack's parallel layers that are dead
    dead_worst_layer  the largest share of dead features in any of those layers
    dead_hidden       share of dead hidden units: those of the small feed-forwards and the mix, or of the one feed-forward

A feature or unit is dead if it has the same value at every token of the probe, a fixed batch, such as a ReLU that is never active.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from stacklm.model.count import roles
from stacklm.model.custom import Custom
from stacklm.model.dense import Block
from stacklm.model.layers import LanguageModel, SquaredReLU, SwiGLU
from stacklm.model.stacked import Mix, PackedFeedForward, ParallelStack
from stacklm.train.distributed import full_tensor

SAMPLE = 2**16
"""Maximum elements of a parameter kept during a step: 256 KiB, where a copy of a large model would take gigabytes."""
STILL = 1e-4
"""Relative variation below which a value counts as constant: above the rounding of float32 sums, below anything learnt."""

PARTS = {ParallelStack: "stack", Block: "block"}
HIDDEN = {PackedFeedForward: "contract", Mix: "contract", SquaredReLU: "down", SwiGLU: "down"}
"""The layer of each feed-forward whose input is its hidden units."""


class Health:
    """Measures a model around selected steps and on the probe, ids [B, T], without affecting training.

        health.before_backward()
        loss.backward()
        health.before_step()
        optimizer.step()
        health.after_step()
        row |= health.read()    also without a preceding step, as at step 0: then without gradients and updates

    Nothing synchronises with the device before `read`. Metrics depend only on weights, gradients and probe, so equal runs have
    equal metrics. If the optimizer steps within the backward pass, gradients are freed and their norms are missing; otherwise the
    first call may be left out.

    Updates are estimated from every k-th element of a parameter, with k coprime to their number, so that all rows and columns are
    sampled evenly; for parameters of up to `SAMPLE` elements they are exact.
    """

    def __init__(self, model: LanguageModel, probe_BT: Tensor) -> None:
        self.model, self.probe_BT = model, probe_BT
        role_of = roles(model)
        self._parameters: dict[str, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            self._parameters.setdefault(role_of[name], []).append(parameter)
        self._before: dict[str, list[Tensor]] = {}
        self._step: dict[str, Tensor] = {}

    def before_backward(self) -> None:
        """Take a sample of the weights."""
        self._before = {role: [sample(full_tensor(p)).clone() for p in parameters] for role, parameters in self._parameters.items()}

    @torch.no_grad()
    def before_step(self) -> None:
        """Record the norms of the gradients: to be called before clipping."""
        if not self._before:
            self.before_backward()
        for role, parameters in self._parameters.items():
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if gradients:
                self._step[f"gradient/{role}"] = full_tensor(nn.utils.get_total_norm(gradients))

    @torch.no_grad()
    def after_step(self) -> None:
        """Compare the sample with the updated weights."""
        for role, parameters in self._parameters.items():
            weights = self._before.pop(role)
            updates = [sample(full_tensor(parameter)) - weight for parameter, weight in zip(parameters, weights, strict=True)]
            sizes = [parameter.numel() for parameter in parameters]
            update, weight = estimated_norm(updates, sizes), estimated_norm(weights, sizes)
            self._step |= {f"update/{role}": update, f"relative_update/{role}": update / weight}

    def read(self) -> dict[str, float]:
        """The metrics of the last step, if any, and of the probe now. Non-finite ones are left out."""
        figures = self._step | self._look()
        self._step = {}
        if not figures:
            return {}
        values = torch.stack([value.float() for value in figures.values()]).tolist()
        return {f"health/{name}": value for name, value in zip(figures, values, strict=True) if math.isfinite(value)}

    @torch.no_grad()
    def _look(self) -> dict[str, Tensor]:
        """Run the probe through the model in evaluation mode, with hooks on every part."""
        looks = [ActivationProbe(name, part) for name, part in parts(self.model)]
        was_training = self.model.training
        self.model.eval()
        with ExitStack() as hooks:
            for look in looks:
                look.begin(hooks)
            if "torch._dynamo" in sys.modules:  # only if something is compiled: importing it takes seconds
                hooks.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code would skip hooks
            self.model.features(self.probe_BT)
        self.model.train(was_training)
        return {key: value for look in looks for key, value in look.figures()}


class ActivationProbe:
    """Activations of one stack or block, measured by hooks on its modules."""

    def __init__(self, name: str, part: nn.Module) -> None:
        self.name, self.part = name, part
        self.scale: list[Tensor] = []
        self.dead_features: list[Tensor] = []
        self.dead_hidden: list[Tensor] = []

    def begin(self, hooks: ExitStack) -> None:
        """Register the hooks, which are removed when `hooks` closes."""

        def watch(module: nn.Module, found: list[Tensor]) -> None:
            hooks.enter_context(module.register_forward_pre_hook(lambda _, inputs: found.append(dead(inputs[0]).flatten())))

        hooks.enter_context(self.part.register_forward_hook(lambda _, inputs, output: self.scale.append(rms(_first(output)))))
        if isinstance(self.part, ParallelStack):
            watch(self.part.mix, self.dead_features)
        for module in self.part.modules():
            for reader in (name for kind, name in HIDDEN.items() if isinstance(module, kind)):
                watch(getattr(module, reader), self.dead_hidden)

    def figures(self) -> Iterator[tuple[str, Tensor]]:
        if self.scale:  # a user's list may hold modules that are never called
            yield f"activation/{self.name}", self.scale[0]
        if isinstance(self.part, ParallelStack):
            share_N = torch.cat(self.dead_features).unflatten(0, (self.part.attention.layers, -1)).float().mean(dim=-1)
            yield f"dead_features/{self.name}", share_N.mean()
            yield f"dead_worst_layer/{self.name}", share_N.max()
        if self.dead_hidden:
            yield f"dead_hidden/{self.name}", torch.cat(self.dead_hidden).float().mean()


def parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The stacks or blocks of a model in order, by name."""
    if isinstance(model, Custom):
        yield from ((f"block{i}", block) for i, block in enumerate(model.blocks()))
        return
    for kind, name in PARTS.items():
        found = (module for module in model.modules() if isinstance(module, kind))
        yield from ((f"{name}{i}", module) for i, module in enumerate(found))


def sample(parameter: Tensor) -> Tensor:
    """A flat view of at most `SAMPLE` elements of a tensor, evenly spaced; all of them if there are no more."""
    stride = -(-parameter.numel() // SAMPLE)
    while math.gcd(stride, parameter.numel()) > 1:
        stride += 1
    return parameter.detach().flatten()[::stride]


def estimated_norm(samples: list[Tensor], sizes: list[int]) -> Tensor:
    """The L2 norm of tensors of `sizes` elements each, estimated from samples of them."""
    squares = [part.float().square().mean() * size for part, size in zip(samples, sizes, strict=True)]
    return torch.stack(squares).sum().sqrt()


def _first(output: Any) -> Tensor:
    """The first output of a block that may return several."""
    return output if isinstance(output, Tensor) else output[0]


def rms(x: Tensor) -> Tensor:
    return x.float().square().mean().sqrt()


def dead(x_BT: Tensor) -> Tensor:
    """Which of the features [B, T, ...] do not vary over the tokens, bool [...]."""
    least, most = x_BT.flatten(0, 1).aminmax(dim=0)
    return most - least <= STILL * torch.maximum(least.abs(), most.abs())
