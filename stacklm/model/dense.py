"""The dense twin: a modern decoder of L serial layers.

Rotary positions, QK-norm per head (arXiv:2302.05442), RMSNorm before each branch (arXiv:1910.07467), no biases, squared ReLU or
SwiGLU. The last map of each branch is initialised to zero, so branches add nothing at the start. Optional, as in stacked models: a
short convolution at the attention's input, and dynamic skips.

Dimension letters: B batch, T time, C width of the residual stream, H heads, K = C / H head dim.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from stacklm.config.model import Dense
from stacklm.model.kernels import checkpointed, rotate
from stacklm.model.layers import (
    FEED_FORWARDS,
    DynamicSkip,
    Embedding,
    Head,
    LanguageModel,
    Linear,
    Positions,
    RMSNorm,
    Rotation,
    ShortConv,
    rotations,
)


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

    def project(self, x_BTC: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, T, H, K] each."""
        q_BTHK, k_BTHK, v_BTHK = (part(x_BTC).unflatten(-1, (self.heads, -1)) for part in (self.query, self.key, self.value))
        return rotate(self.query_norm(q_BTHK), rotation), rotate(self.key_norm(k_BTHK), rotation), v_BTHK

    def forward(self, x_BTC: Tensor, rotation: Rotation) -> Tensor:
        q_BHTK, k_BHTK, v_BHTK = (part.transpose(1, 2) for part in self.project(x_BTC, rotation))
        a_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        return self.combine(a_BHTK.transpose(1, 2), x_BTC)

    def combine(self, a_BTHK: Tensor, x_BTC: Tensor) -> Tensor:
        """The heads' outputs, projected back to the residual stream: [B, T, C]."""
        return self.output(a_BTHK.flatten(2))

    def flops_per_token(self, attended: float) -> float:
        projections = sum(part.flops_per_token(attended) for part in (self.query, self.key, self.value, self.output))
        return projections + 4 * self.width * attended


class Block(nn.Module):
    """
    x ─┬─ RMSNorm ─ (conv) ─ attention ──(+)─┬─ RMSNorm ─ feed-forward ──(+)─►
       └──────────────────────────────────┘  └────────────────────────────┘
    """

    def __init__(self, config: Dense) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model)
        self.conv = ShortConv(config.d_model, config.conv_size - 1) if config.conv_size > 1 else None
        self.attention = Attention(config.d_model, config.n_heads)
        self.feed_forward_norm = RMSNorm(config.d_model)
        self.feed_forward = FEED_FORWARDS[config.ffn](config.d_model, config.d_ff)

    def forward(self, x_BTC: Tensor, rotation: Rotation) -> Tensor:
        y_BTC = self.attention_norm(x_BTC)
        if self.conv is not None:
            y_BTC = self.conv(y_BTC)
        x_BTC = x_BTC + self.attention(y_BTC, rotation)
        return x_BTC + self.feed_forward(self.feed_forward_norm(x_BTC))


class DenseDecoder(LanguageModel):
    """ids [B, T] to logits [B, T, vocab_size], for T up to `context`."""

    def __init__(self, config: Dense, vocab_size: int, context: int) -> None:
        super().__init__()
        self.positions = Positions(context)
        self.head_dim = config.d_model // config.n_heads
        self.embedding = Embedding(vocab_size, config.d_model)
        self.embedding_norm = RMSNorm(config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        dynamic = config.skip_connections == "dynamic"
        self.skips = nn.ModuleList(DynamicSkip(n + 1, config.d_model) for n in range(config.n_layers)) if dynamic else None
        self.norm = RMSNorm(config.d_model)
        self.head = Head(config.d_model, vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def features(self, ids_BT: Tensor) -> Tensor:
        """The input of the head, [B, T, C]. Raises `ValueError` for a sequence longer than the context."""
        rotation = rotations(self.positions(ids_BT), self.head_dim)
        x_BTC = self.embedding_norm(self.embedding(ids_BT))
        outputs = [x_BTC]
        for n, block in enumerate(self.blocks):
            x_BTC = checkpointed(block, x_BTC, rotation) if self.activation_checkpointing else block(x_BTC, rotation)
            if self.skips is not None:
                outputs.append(x_BTC)
                x_BTC = self.skips[n](outputs)
        return self.norm(x_BTC)
