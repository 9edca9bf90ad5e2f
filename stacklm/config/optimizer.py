"""Section `optimizer` of a model. See docs/training.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from stacklm.config.schema import ParamsError, Range

Rate = Annotated[float, Range(0, 100, open_low=True)]
"""A peak learning rate. All three optimizers change a weight by about that much per step."""
Eps = Annotated[float, Range(1e-20, 1)]
"""Added to the root of a second moment, which underflows for gradients below 1e-22; with less, these would give large updates."""

Beta = Annotated[float, Range(0, 0.999999)]
"""Decay factor of a moving average."""
Decay = Annotated[float, Range(0)]
"""Weight decay, multiplied by the learning rate; for matrices only, never for embeddings, heads, gains or biases."""


def _check_decay(optimizer: Optimizer) -> None:
    if optimizer.peak_lr * optimizer.weight_decay > 1:
        raise ParamsError(
            f"weight_decay: {optimizer.weight_decay:g} * peak_lr {optimizer.peak_lr:g} is above 1: a step multiplies weights by "
            "1 minus that, so they would change their sign"
        )


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov & Hutter 2017, 1711.05101) for every parameter.

    `optimizer_in_backward` rules out gradient accumulation and clipping: `train.micro_batch_size` must be the whole batch, and
    `train.max_grad_norm` null.
    """

    kind: Literal["adamw"] = "adamw"
    peak_lr: Rate = 1e-3
    """Peak learning rate."""
    beta1: Beta = 0.9
    """Decay factor of the moving average of gradients."""
    beta2: Beta = 0.95
    """Decay factor of the moving average of squared gradients."""
    eps: Eps = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Decay = 0.1
    """Weight decay of matrices, multiplied by the learning rate."""
    optimizer_in_backward: bool = False
    """Update each parameter during the backward pass and free its gradient."""

    def __post_init__(self) -> None:
        _check_decay(self)


@dataclass(frozen=True)
class Rest:
    """AdamW for all parameters that are not matrices; without weight decay."""

    peak_lr: Rate = 1e-3
    """Peak learning rate."""
    beta1: Beta = 0.9
    """Decay factor of the moving average of gradients."""
    beta2: Beta = 0.95
    """Decay factor of the moving average of squared gradients."""
    eps: Eps = 1e-8
    """Added to the root of the second moment."""


@dataclass(frozen=True)
class Muon:
    """Muon for matrices, separately for each layer; `adamw` is for embeddings, heads, gains and biases.

    Its updates are as large as AdamW's, so learning rates tuned for AdamW are a starting point.
    """

    kind: Literal["muon"] = "muon"
    peak_lr: Rate = 1e-3
    """Peak learning rate."""
    momentum: Beta = 0.95
    """Decay factor of the moving average of gradients."""
    ns_steps: Annotated[int, Range(1, 20)] = 5
    """Newton-Schulz iterations."""
    weight_decay: Decay = 0.1
    """Weight decay of matrices, multiplied by the learning rate."""
    adamw: Rest = Rest()
    """The optimizer of embeddings, heads, gains and biases."""
    optimizer_in_backward: bool = False
    """As for AdamW."""

    def __post_init__(self) -> None:
        _check_decay(self)


@dataclass(frozen=True)
class Adafactor:
    """Adafactor (Shazeer & Stern 2018, 1804.04235) for every parameter: second moments of a matrix factored by rows and columns."""

    kind: Literal["adafactor"] = "adafactor"
    peak_lr: Rate = 1e-2
    """Peak learning rate, relative to the RMS of a weight matrix or vector."""
    beta2_decay: Annotated[float, Range(-1, 0)] = -0.8
    """At update t the decay factor of the second moments is 1 - t ** beta2_decay."""
    eps: Eps = 1e-3
    """Lower bound on that RMS."""
    weight_decay: Decay = 0.01
    """Weight decay of matrices, multiplied by the learning rate."""
    optimizer_in_backward: bool = False
    """As for AdamW."""

    def __post_init__(self) -> None:
        _check_decay(self)


Optimizer = AdamW | Muon | Adafactor
DEFAULT_OPTIMIZER = AdamW()
