"""What was better in experiments/ideas.py, together with dynamic skips, for two stacks and for the dense twin.

Run by `stacklm lab run combined`. Both kinds get the same additions, and both begin as the forms of the package do: each addition
starts as nothing.

Dimension letters: B batch, T time, C width of the stream, W = N * D features of all parallel layers, H heads, K dim of a head.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from stacklm.config.model import Dense, FactoredAttention, Stack, Stacked
from stacklm.model.dense import Block, DenseDecoder
from stacklm.model.kernels import causal_attention
from stacklm.model.layers import Linear, Rotation, ShortConv
from stacklm.model.stacked import ParallelStack, StackedDecoder


class Additions(nn.Module):
    """Convolutions of width 4 behind the attention and before the feed-forward network (Canon, arXiv:2512.17351), and a gate for
    each head behind its attention, from what its query reads (Qiu et al. 2025, arXiv:2505.06708)."""

    def __init__(self, width: int, heads: int, convolutions: bool, gate: bool) -> None:
        super().__init__()
        self.attention_conv, self.ffn_conv = (ShortConv(width, 3) if convolutions else nn.Identity() for _ in range(2))
        self.gate = Linear(width, heads, bias=True, std=0) if gate else None

    def gated(self, a_BTHK: Tensor, y_BTC: Tensor) -> Tensor:
        return a_BTHK if self.gate is None else a_BTHK * (2 * self.gate(y_BTC).sigmoid())[..., None]


class MoreStack(ParallelStack):
    def __init__(self, config: Stacked, stack: Stack, depth: int, first: bool, **additions: bool) -> None:
        super().__init__(config, stack, depth, first)
        self.more = Additions(config.d_model, stack.layers * config.n_heads, **additions)

    def forward(self, x_BTC: Tensor, rotation: Rotation) -> Tensor:
        y_BTC = self.conv(x_BTC if self.norm is None else self.norm(x_BTC))
        a_BTHD = self.more.gated(causal_attention(*self.attention.project(y_BTC, rotation)), y_BTC)
        x_BTC = x_BTC + self.mix(self.more.attention_conv(self.attention.combine(a_BTHD, y_BTC).flatten(2)))
        return x_BTC + self.ffn(self.more.ffn_conv(self.ffn_norm(x_BTC)))


class Combined(StackedDecoder):
    """ids [B, T] to logits [B, T, V]: `stacks` stacks of 4 layers of 24 features, with dynamic skips."""

    def __init__(self, vocab_size: int, context_length: int, d_ff: int, convolutions: bool, gate: bool, stacks: int = 2) -> None:
        each = (Stack(4, 24, d_ff),) * stacks
        attention = FactoredAttention(rope=True, qk_norm=True)
        config = Stacked(96, 4, each, attention=attention, ffn="swiglu", residual=True, conv_size=4, skip_connections="dynamic")
        super().__init__(config, vocab_size, context_length)
        self.stacks = nn.ModuleList(
            MoreStack(config, one, stacks, first=s == 0, convolutions=convolutions, gate=gate) for s, one in enumerate(each)
        )


class MoreBlock(Block):
    def __init__(self, config: Dense, **additions: bool) -> None:
        super().__init__(config)
        self.more = Additions(config.d_model, config.n_heads, **additions)

    def forward(self, x_BTC: Tensor, rotation: Rotation) -> Tensor:
        y_BTC = self.conv(self.attention_norm(x_BTC))
        parts = (part.transpose(1, 2) for part in self.attention.project(y_BTC, rotation))
        a_BTHK = self.more.gated(F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2), y_BTC)
        x_BTC = x_BTC + self.attention.output(self.more.attention_conv(a_BTHK.flatten(2)))
        return x_BTC + self.feed_forward(self.more.ffn_conv(self.feed_forward_norm(x_BTC)))


class CombinedDense(DenseDecoder):
    """ids [B, T] to logits [B, T, V]: `layers` serial layers, with dynamic skips."""

    def __init__(self, vocab_size: int, context_length: int, d_ff: int, convolutions: bool, gate: bool, layers: int = 5) -> None:
        config = Dense(96, 4, layers, d_ff, ffn="swiglu", conv_size=4, skip_connections="dynamic")
        super().__init__(config, vocab_size, context_length)
        self.blocks = nn.ModuleList(MoreBlock(config, convolutions=convolutions, gate=gate) for _ in range(layers))
