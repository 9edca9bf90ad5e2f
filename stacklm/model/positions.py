"""Where a token stands: sinusoids that are added to it, or rotations of its queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stacklm.model.elementwise import rotate

SLOWEST = 10_000.0
"""Wavelengths grow geometrically from 2 pi to this many times 2 pi positions."""


class Positions(nn.Module):
    """Where the tokens of a window stand: 0 to T-1, float32 [T]. A module, so that a decoder can have one that counts on.

    The window is anything of [B, T, ...]: ids, features, queries. Raises `ValueError` for more tokens than `context`.
    """

    def __init__(self, context: int) -> None:
        super().__init__()
        self.context = context

    def forward(self, window: Tensor) -> Tensor:
        length = window.shape[1]
        if length > self.context:
            raise ValueError(
                f"a window of {length} tokens is longer than the model's context of {self.context}; cut it or build with more"
            )
        return torch.arange(length, dtype=torch.float32, device=window.device)


class Sinusoids(nn.Module):
    """Adds to each token's features [B, T, C] where it stands."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.positions = Positions(context)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return x_BTC + sinusoids(self.positions(x_BTC), x_BTC.shape[-1]).to(x_BTC.dtype)


class Rotary(nn.Module):
    """Turns queries and keys [B, T, H, K] by where they stand."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.positions = Positions(context)

    def forward(self, q_BTHK: Tensor, k_BTHK: Tensor) -> tuple[Tensor, Tensor]:
        rotation = rotations(self.positions(q_BTHK), q_BTHK.shape[-1])
        return rotate(q_BTHK, rotation), rotate(k_BTHK, rotation)


def sinusoids(positions_T: Tensor, width: int) -> Tensor:
    """Sine and cosine of each wavelength in turn, [T, C] (Vaswani et al. 2017, arXiv:1706.03762, section 3.5)."""
    angles = _angles(positions_T, (width + 1) // 2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]


def rotations(positions_T: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle by which each of the `dim` / 2 planes turns at each position, [T, 1, K/2] both."""
    angles = _angles(positions_T, dim // 2)[:, None]
    return angles.cos(), angles.sin()


def _angles(positions_T: Tensor, planes: int) -> Tensor:
    plane = torch.arange(planes, dtype=torch.float32, device=positions_T.device)
    return torch.outer(positions_T, SLOWEST ** (-plane / planes))
