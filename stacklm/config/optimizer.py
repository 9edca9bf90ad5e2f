"""Section `optimizer` of a model: how its weights follow their gradients. See docs/training.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from stacklm.config.schema import ParamsError, Range

Rate = Annotated[float, Range(0, 100, open_low=True)]
"""A peak learning rate. All three optimizers change a weight by about so much a step."""
Eps = Annotated[float, Range(1e-20, 1)]
"""Added to the root of a second moment. That underflows below gradients of 1e-22, which divided by less would be large."""

Beta = Annotated[float, Range(0, 0.999999)]
"""The weight of the past in a moving average."""
Decay = Annotated[float, Range(0)]
"""Weight decay, a share of the learning rate; of matrices only: never of embeddings, heads, gains or biases."""


def _check_decay(optimizer: Optimizer) -> None:
    if optimizer.peak_lr * optimizer.weight_decay > 1:
        raise ParamsError(
            f"weight_decay: {optimizer.weight_decay:g} * peak_lr {optimizer.peak_lr:g} is above 1: a step multiplies weights by "
            "1 minus that, so they would change their sign"
        )


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov & Hutter 2017, 1711.05101) for every parameter.

    `optimizer_in_backward` leaves nothing to accumulate or to clip: `train.micro_batch_size` must be the whole batch, and
    `train.max_grad_norm` null.
    """

    kind: Literal["adamw"] = "adamw"
    peak_lr: Rate = 1e-3
    """Peak learning rate."""
    beta1: Beta = 0.9
    """Weight of the past in the mean of gradients."""
    beta2: Beta = 0.95
    """Weight of the past in the mean of their squares."""
    eps: Eps = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Decay = 0.1
    """Decay of matrices, as a share of the learning rate."""
    optimizer_in_backward: bool = False
    """Update each parameter within the backward pass and free its gradient."""

    def __post_init__(self) -> None:
        _check_decay(self)


@dataclass(frozen=True)
class Rest:
    """AdamW for what is not a matrix; without weight decay."""

    peak_lr: Rate = 1e-3
    """Peak learning rate."""
    beta1: Beta = 0.9
    """Weight of the past in the mean of gradients."""
    beta2: Beta = 0.95
    """Weight of the past in the mean of their squares."""
    eps: Eps = 1e-8
    """Added to the root of the second moment."""


@dataclass(frozen=True)
class Muon:
    """Muon for matrices, each layer's by itself; `adamw` is for embeddings, heads, gains and biases.

    Its updates have the size of AdamW's, so learning rates tuned for that one are a start.
    """

    kind: Literal["muon"] = "muon"
    peak_lr: Rate = 1e-3
    """Peak learning rate."""
    momentum: Beta = 0.95
    """Weight of the past in the mean of gradients."""
    ns_steps: Annotated[int, Range(1, 20)] = 5
    """Iterations of Newton-Schulz."""
    weight_decay: Decay = 0.1
    """Decay of matrices, as a share of the learning rate."""
    adamw: Rest = Rest()
    """The optimizer of embeddings, heads, gains and biases."""
    optimizer_in_backward: bool = False
    """As for AdamW."""

    def __post_init__(self) -> None:
        _check_decay(self)


@dataclass(frozen=True)
class Adafactor:
    """Adafactor (Shazeer & Stern 2018, 1804.04235) for every parameter: of a matrix, rows and columns of second moments."""

    kind: Literal["adafactor"] = "adafactor"
    peak_lr: Rate = 1e-2
    """Peak learning rate, relative to the root mean square of a weight matrix or vector."""
    beta2_decay: Annotated[float, Range(-1, 0)] = -0.8
    """At update t the moments of the past weigh 1 - t ** beta2_decay."""
    eps: Eps = 1e-3
    """The least root mean square that counts."""
    weight_decay: Decay = 0.01
    """Decay of matrices, as a share of the learning rate."""
    optimizer_in_backward: bool = False
    """As for AdamW."""

    def __post_init__(self) -> None:
        _check_decay(self)


Optimizer = AdamW | Muon | Adafactor
DEFAULT_OPTIMIZER = AdamW()
