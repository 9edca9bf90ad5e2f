"""The stacked-parallel decoder: S stacks in series, each of N decoder layers side by side.

    ids ─ Embedding ─ LayerNorm ─ + sinusoids ─ stack ─ … ─ stack ─ LayerNorm ─ head ─ logits

    one stack    ┌─ layer 1 ─┐
    x ─ LayerNorm┼─ layer 2 ─┼─ concat ─ mix ─►      no LayerNorm before the first stack,
                 └─ layer N ─┘                       no residual around a stack or its mix
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from stacklm.config.model import Stack, Stacked
from stacklm.model.layers import BiasedHead, BiasedLinear, Embedding
from stacklm.model.packed import FoldedOutputs, FoldedValues, PackedFeedForward, ParallelLayers
from stacklm.model.positions import Positions, sinusoids


class Mix(nn.Module):
    """Lets the layers' features meet: W -> F -> W. No residual goes around it, so it starts by keeping the variance."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = BiasedLinear(width, hidden)
        self.contract = BiasedLinear(hidden, width, std=(2 / hidden) ** 0.5)

    def forward(self, x_BTW: Tensor) -> Tensor:
        return self.contract(F.relu(self.expand(x_BTW)))


class ParallelStack(nn.Module):
    """[B, T, C] to [B, T, W]."""

    def __init__(self, norm: nn.Module, layers: ParallelLayers, mix: Mix) -> None:
        super().__init__()
        self.norm = norm
        self.layers = layers
        self.mix = mix

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.mix(self.layers(self.norm(x_BTC)))


class StackedDecoder(nn.Module):
    """ids [B, T] to logits [B, T, V], for T up to `context`."""

    def __init__(self, config: Stacked, vocab_size: int, context: int) -> None:
        super().__init__()
        self.positions = Positions(context)
        self.embedding = Embedding(vocab_size, config.width)
        self.embedding_norm = nn.LayerNorm(config.width)
        norms = [nn.Identity(), *(nn.LayerNorm(config.width) for _ in config.stacks[1:])]
        self.stacks = nn.Sequential(
            *(
                ParallelStack(norm, parallel_layers(config, stack), Mix(stack.width, stack.hidden))
                for norm, stack in zip(norms, config.stacks, strict=True)
            )
        )
        self.norm = nn.LayerNorm(config.stacks[-1].width)
        self.head = BiasedHead(config.stacks[-1].width, vocab_size)

    def features(self, ids_BT: Tensor) -> Tensor:
        """What the head reads, [B, T, W] of the last stack. Raises `ValueError` for a window longer than the context."""
        x_BTC = self.embedding_norm(self.embedding(ids_BT))
        x_BTC = x_BTC + sinusoids(self.positions(ids_BT), x_BTC.shape[-1]).to(x_BTC.dtype)
        return self.norm(self.stacks(x_BTC))

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.head(self.features(ids_BT))


def parallel_layers(config: Stacked, stack: Stack) -> ParallelLayers:
    """The layers of one stack, with the attention that is cheaper at its number of features."""
    depth = len(config.stacks)
    attention = FoldedValues if stack.features <= config.width // config.heads else FoldedOutputs
    return ParallelLayers(
        attention(stack.layers, config.width, config.heads, stack.features, depth),
        PackedFeedForward(stack.layers, stack.features, depth, config.dropout),
    )
