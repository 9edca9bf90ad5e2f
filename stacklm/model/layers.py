"""Layers that every architecture uses. Their weights are drawn normal with the standard deviation they are given."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stacklm.model.elementwise import rms_norm

EMBEDDING_STD = 0.02


def drawn(*shape: int, std: float) -> nn.Parameter:
    """A parameter of that shape, drawn from torch's global generator of the device in use."""
    weight = torch.empty(shape)
    if not weight.is_meta:  # where there is nothing to draw, asking for it costs torch two seconds of imports
        weight.normal_(std=std)
    return nn.Parameter(weight)


class Embedding(nn.Module):
    """One row of `weight` [V, C] a token."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = drawn(vocab_size, width, std=EMBEDDING_STD)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return F.embedding(ids_BT, self.weight)


class RMSNorm(nn.RMSNorm):
    """Root mean square normalisation (arXiv:1910.07467) in the number format of its input, whatever that of its gain."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype), self.eps)


class Linear(nn.Module):
    """`weight` [outputs, inputs] without a bias. By default it keeps the variance of its input."""

    def __init__(self, inputs: int, outputs: int, std: float | None = None) -> None:
        super().__init__()
        self.weight = drawn(outputs, inputs, std=inputs**-0.5 if std is None else std)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def flops_per_token(self, attended: float) -> float:
        return 2 * self.weight.numel()


class BiasedLinear(Linear):
    """`weight` [outputs, inputs] and `bias` [outputs], which starts at zero."""

    def __init__(self, inputs: int, outputs: int, std: float | None = None) -> None:
        super().__init__(inputs, outputs, std)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Head(Linear):
    """Features to logits. Logits start at a size of 1 / sqrt(width), so the first loss is close to ln V."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__(width, vocab_size, std=1 / width)


class BiasedHead(BiasedLinear):
    """As `Head`, with a bias a token."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__(width, vocab_size, std=1 / width)
