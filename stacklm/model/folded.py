"""Attention of N parallel layers with the fold as its parametrisation, and what may vary in it.

Behind the softmax, head h of layer n maps x to D features by one matrix M_h, where the published form has three
factors, `W_v,h W_o,h W_r`. While D <= K the two can express the same; there are fewer parameters here, and gradients take
other ways. Biases are left out. One layer is

    r = x W_r + sum_h A_h (x M_h)               A_h = causal softmax(q_h k_h^T / sqrt(K))

Queries and keys pass `prepare`, a chain of modules that each take and give both: norms, rotations, or nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stacklm.model.attention import causal_attention, project, sum_heads
from stacklm.model.layers import Linear, RMSNorm, drawn


class PackedMap(nn.Module):
    """N linear maps side by side, without biases: `weight` [N, E, C]. By default they keep the variance of their input."""

    def __init__(self, layers: int, inputs: int, outputs: int, std: float | None = None) -> None:
        super().__init__()
        self.weight = drawn(layers, outputs, inputs, std=inputs**-0.5 if std is None else std)

    def forward(self, x_BTNC: Tensor) -> Tensor:
        """Each map on its own input: [B, T, N, C] to [B, T, N, E]."""
        return torch.einsum("btnc,nec->btne", x_BTNC, self.weight)

    def shared(self, x_BTC: Tensor) -> Tensor:
        """All maps on the same input, as one product: [B, T, C] to [B, T, N, E]."""
        return project(x_BTC, self.weight.flatten(0, 1)).unflatten(-1, self.weight.shape[:2])

    def flops_per_token(self, attended: float) -> float:
        return 2 * self.weight.numel()


class QueryKeyNorm(nn.Module):
    """Queries and keys at one length each, times a gain that all heads share (Henry et al. 2020, arXiv:2010.04245)."""

    def __init__(self, key_dim: int) -> None:
        super().__init__()
        self.query = RMSNorm(key_dim)
        self.key = RMSNorm(key_dim)

    def forward(self, q_BTHK: Tensor, k_BTHK: Tensor) -> tuple[Tensor, Tensor]:
        return self.query(q_BTHK), self.key(k_BTHK)


class Prepare(nn.ModuleList):
    """Modules that queries and keys pass one after the other."""

    def forward(self, q_BTHK: Tensor, k_BTHK: Tensor) -> tuple[Tensor, Tensor]:
        for part in self:
            q_BTHK, k_BTHK = part(q_BTHK, k_BTHK)
        return q_BTHK, k_BTHK


class FoldedAttention(nn.Module):
    """r [B, T, N, D] of x [B, T, C]: every layer has keys and values of its own.

    `project` gives what attends, what is attended to and what is summed, so that a cache can keep the last two; `combine` is
    all that follows the sums. `depth` is the number of stacks in series, over which branches add up (as in `packed`).
    """

    def __init__(self, layers: int, width: int, heads: int, features: int, depth: int, key_dim: int, prepare: Prepare) -> None:
        super().__init__()
        self.layers, self.heads = layers, heads
        self.query = PackedMap(layers, width, heads * key_dim)
        self.key = PackedMap(layers, width, heads * key_dim)
        self.value = PackedMap(layers, width, heads * features, std=(2 * depth * heads * width) ** -0.5)
        self.reduce = PackedMap(layers, width, features)
        self.prepare = prepare

    def project(self, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys [B, T, N*H, K], values [B, T, N*H, D]."""
        parts = (part.shared(x_BTC) for part in (self.query, self.key, self.value))
        q_BTHK, k_BTHK, v_BTHD = (part.unflatten(3, (self.heads, -1)).flatten(2, 3) for part in parts)
        return *self.prepare(q_BTHK, k_BTHK), v_BTHD

    def combine(self, a_BTHD: Tensor, x_BTC: Tensor) -> Tensor:
        """r [B, T, N, D] of what N*H heads saw [B, T, N*H, D] and of the residual."""
        return sum_heads(a_BTHD, self.heads) + self.reduce.shared(x_BTC)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.combine(causal_attention(*self.project(x_BTC)), x_BTC)

    def flops_per_token(self, attended: float) -> float:
        parts = (self.query, self.key, self.value, self.reduce)
        keys, values = (part.weight.shape[:2].numel() for part in (self.key, self.value))
        return sum(part.flops_per_token(attended) for part in parts) + 2 * (keys + values) * attended


class SharedAttention(nn.Module):
    """r [B, T, N, D] of x [B, T, C]: head h of every layer reads the same keys and values, those of the stack.

    After Shazeer 2019, arXiv:1911.02150, with layers for heads. A layer makes its D features of C / H numbers a head by a
    matrix of its own. A cache keeps N times less than one of every layer's own keys.
    """

    def __init__(self, layers: int, width: int, heads: int, features: int, depth: int, key_dim: int, prepare: Prepare) -> None:
        super().__init__()
        self.layers, self.heads = layers, heads
        self.query = PackedMap(layers, width, heads * key_dim)
        self.key = Linear(width, heads * key_dim)
        self.value = Linear(width, width)
        self.output = PackedMap(layers, width, features, std=(2 * depth * width) ** -0.5)
        self.reduce = PackedMap(layers, width, features)
        self.prepare = prepare

    def project(self, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, N*H, K], keys [B, T, H, K], values [B, T, H, C/H]."""
        q_BTHK = self.query.shared(x_BTC).unflatten(3, (self.heads, -1)).flatten(2, 3)
        k_BTHK, v_BTHD = (part(x_BTC).unflatten(2, (self.heads, -1)) for part in (self.key, self.value))
        return *self.prepare(q_BTHK, k_BTHK), v_BTHD

    def combine(self, a_BTHD: Tensor, x_BTC: Tensor) -> Tensor:
        """r [B, T, N, D] of what N*H heads saw [B, T, N*H, C/H] and of the residual."""
        a_BTNC = a_BTHD.unflatten(2, (-1, self.heads)).flatten(3)
        return self.output(a_BTNC) + self.reduce.shared(x_BTC)

    def forward(self, x_BTC: Tensor) -> Tensor:
        q_BTHK, k_BTHK, v_BTHD = self.project(x_BTC)
        k_BTHK, v_BTHD = (part.repeat(1, 1, q_BTHK.shape[2] // self.heads, 1) for part in (k_BTHK, v_BTHD))
        return self.combine(causal_attention(q_BTHK, k_BTHK, v_BTHD), x_BTC)

    def flops_per_token(self, attended: float) -> float:
        parts = (self.query, self.key, self.value, self.output, self.reduce)
        keys, values = (self.layers * len(part.weight) for part in (self.key, self.value))
        return sum(part.flops_per_token(attended) for part in parts) + 2 * (keys + values) * attended
