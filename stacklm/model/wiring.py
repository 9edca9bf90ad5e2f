"""What stands between the stacks: which outputs one reads, what its input sees of the tokens before, how its output joins.

All of these begin as if they were not there: their weights are zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Last(nn.Module):
    """Of x_0 and the stacks' outputs so far, the latest."""

    def forward(self, outputs: Sequence[Tensor]) -> Tensor:
        return outputs[-1]


class Read(nn.Module):
    """The latest output and the first of the others, as many as `weight` [others, C] has rows, each times a gain a channel.

    With all of the others a form of DenseFormer (Pagliardini et al. 2024, arXiv:2402.02622).
    """

    def __init__(self, others: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(others, width))

    def forward(self, outputs: Sequence[Tensor]) -> Tensor:
        return outputs[-1] + sum(gain_C * x_BTC for gain_C, x_BTC in zip(self.weight, outputs, strict=False))


class ShortConvolution(nn.Module):
    """x_t + sum_i w_i x_{t-i}, channel by channel, over the `reach` tokens before each: `weight` [reach, C].

    A reach of 1 is a token shift (as in RWKV, arXiv:2305.13048), of 3 a convolution of width 4 (Canon layers,
    arXiv:2512.17351).
    """

    def __init__(self, width: int, reach: int) -> None:
        super().__init__()
        self.reach = reach
        self.weight = nn.Parameter(torch.zeros(reach, width))

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.slide(F.pad(x_BTC, (0, 0, self.reach, 0)))

    def slide(self, x_BPC: Tensor) -> Tensor:
        """The same for tokens that follow `reach` others, P = reach + T: [B, P, C] to [B, T, C]."""
        length = x_BPC.shape[1] - self.reach
        taps = (x_BPC[:, self.reach - i : self.reach - i + length] * w_C for i, w_C in enumerate(self.weight, start=1))
        return x_BPC[:, self.reach :] + sum(taps)


class Replace(nn.Module):
    """What comes out of a stack takes the place of what went in."""

    def forward(self, x_BTC: Tensor, y_BTW: Tensor) -> Tensor:
        return y_BTW


class Residual(nn.Module):
    """What comes out of a stack is added to what went in; the channels that a wider output has more begin at zero."""

    def forward(self, x_BTC: Tensor, y_BTW: Tensor) -> Tensor:
        return F.pad(x_BTC, (0, y_BTW.shape[-1] - x_BTC.shape[-1])) + y_BTW


class ResidualFeedForward(nn.Module):
    """x + feed_forward(norm(x)), with dropout on what is added."""

    def __init__(self, width: int, feed_forward: nn.Module, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTW: Tensor) -> Tensor:
        return x_BTW + self.dropout(self.feed_forward(self.norm(x_BTW)))
