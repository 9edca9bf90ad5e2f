"""Section `optimizer` of a model: how its weights follow their gradients. See docs/training.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from stacklm.config.schema import Positive, Range

Beta = Annotated[float, Range(0, 0.999999)]
"""The weight of the past in a moving average."""
Decay = Annotated[float, Range(0)]
"""Weight decay, a share of the learning rate; of matrices only: never of embeddings, heads, gains or biases."""


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov & Hutter 2017, 1711.05101) for every parameter.

    `in_backward`: each parameter is updated within the backward pass, as soon as its gradient is complete, and the gradient is
    freed. That leaves nothing to accumulate or to clip: `train.micro_batch` must be the whole batch, `train.clip_norm` null.
    """

    kind: Literal["adamw"] = "adamw"
    peak_lr: Positive = 1e-3
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: Positive = 1e-8
    weight_decay: Decay = 0.1
    in_backward: bool = False


@dataclass(frozen=True)
class Rest:
    """AdamW for what is no matrix, and so never decays."""

    peak_lr: Positive = 1e-3
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: Positive = 1e-8


@dataclass(frozen=True)
class Muon:
    """Muon for matrices, each layer's by itself; `rest` is for embeddings, heads, gains and biases.

    Its updates have the size of AdamW's, so learning rates tuned for that one are a start. `ns_steps`: products of the
    Newton-Schulz iteration. `in_backward`: as for AdamW.
    """

    kind: Literal["muon"] = "muon"
    peak_lr: Positive = 1e-3
    momentum: Beta = 0.95
    ns_steps: Annotated[int, Range(1, 20)] = 5
    weight_decay: Decay = 0.1
    rest: Rest = Rest()
    in_backward: bool = False


@dataclass(frozen=True)
class Adafactor:
    """Adafactor (Shazeer & Stern 2018, 1804.04235) for every parameter: of a matrix, rows and columns of second moments.

    A step changes a weight by `peak_lr` times the root mean square of its matrix or vector, which counts as `eps` at least.
    At update t the moments of the past weigh `1 - t ** beta2_decay`. `in_backward`: as for AdamW.
    """

    kind: Literal["adafactor"] = "adafactor"
    peak_lr: Positive = 1e-2
    beta2_decay: Annotated[float, Range(-1, 0)] = -0.8
    eps: Positive = 1e-3
    weight_decay: Decay = 0.01
    in_backward: bool = False


Optimizer = AdamW | Muon | Adafactor
DEFAULT_OPTIMIZER = AdamW()
