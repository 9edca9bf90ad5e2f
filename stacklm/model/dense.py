"""The dense twin: a modern decoder of L serial layers.

Rotary positions, queries and keys normalised per head (arXiv:2302.05442), RMSNorm before each branch
(arXiv:1910.07467), no biases, squared ReLU (arXiv:2109.08668) or SwiGLU (arXiv:2002.05202), and branches that add
nothing at the start because their last map is zero.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from stacklm.config.model import Dense
from stacklm.model.elementwise import rotate, squared_relu
from stacklm.model.layers import Embedding, Head, Linear, RMSNorm
from stacklm.model.positions import Positions, rotations


class Attention(nn.Module):
    """Causal self-attention with H heads of dim K = C / H."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.query = Linear(width, width)
        self.key = Linear(width, width)
        self.value = Linear(width, width)
        self.query_norm = RMSNorm(width // heads)
        self.key_norm = RMSNorm(width // heads)
        self.output = Linear(width, width, std=0)

    def project(self, x_BTC: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, T, H, K] each."""
        q_BTHK, k_BTHK, v_BTHK = (part(x_BTC).unflatten(-1, (self.heads, -1)) for part in (self.query, self.key, self.value))
        return rotate(self.query_norm(q_BTHK), rotation), rotate(self.key_norm(k_BTHK), rotation), v_BTHK

    def forward(self, x_BTC: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        q_BHTK, k_BHTK, v_BHTK = (part.transpose(1, 2) for part in self.project(x_BTC, rotation))
        a_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        return self.output(a_BHTK.transpose(1, 2).flatten(2))

    def flops_per_token(self, attended: float) -> float:
        projections = sum(part.flops_per_token(attended) for part in (self.query, self.key, self.value, self.output))
        return projections + 2 * (self.width + self.width) * attended


class SquaredReLU(nn.Module):
    """`down(relu(up(x))^2)`, with F hidden units."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width, std=0)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down(squared_relu(self.up(x_BTC)))


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`, with F hidden units."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = Linear(width, hidden)
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width, std=0)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTC)) * self.up(x_BTC))


FEED_FORWARDS = {"relu2": SquaredReLU, "swiglu": SwiGLU}


class Block(nn.Module):
    """
    x ─┬─ RMSNorm ─ attention ────(+)─┬─ RMSNorm ─ feed-forward ──(+)─►
       └───────────────────────────┘  └────────────────────────────┘
    """

    def __init__(self, width: int, heads: int, feed_forward: nn.Module) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = Attention(width, heads)
        self.feed_forward_norm = RMSNorm(width)
        self.feed_forward = feed_forward

    def forward(self, x_BTC: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x_BTC = x_BTC + self.attention(self.attention_norm(x_BTC), rotation)
        return x_BTC + self.feed_forward(self.feed_forward_norm(x_BTC))


class DenseDecoder(nn.Module):
    """ids [B, T] to logits [B, T, V], for T up to `context`."""

    def __init__(self, config: Dense, vocab_size: int, context: int) -> None:
        super().__init__()
        self.positions = Positions(context)
        self.head_dim = config.width // config.heads
        feed_forward = FEED_FORWARDS[config.activation]
        self.embedding = Embedding(vocab_size, config.width)
        self.embedding_norm = RMSNorm(config.width)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, feed_forward(config.width, config.hidden)) for _ in range(config.layers)
        )
        self.norm = RMSNorm(config.width)
        self.head = Head(config.width, vocab_size)
        if config.tied:
            self.head.weight = self.embedding.weight

    def features(self, ids_BT: Tensor) -> Tensor:
        """What the head reads, [B, T, C]. Raises `ValueError` for a window longer than the context."""
        rotation = rotations(self.positions(ids_BT), self.head_dim)
        x_BTC = self.embedding_norm(self.embedding(ids_BT))
        for block in self.blocks:
            x_BTC = block(x_BTC, rotation)
        return self.norm(x_BTC)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.head(self.features(ids_BT))
