"""The stacked-parallel decoder: S stacks in series, each of N decoder layers side by side.

    ids ─ Embedding ─ LayerNorm ─ + sinusoids ─ stack ─ … ─ stack ─ LayerNorm ─ head ─ logits

    one stack as published              ┌─ layer 1 ─┐
                           x ─ LayerNorm┼─ layer 2 ─┼─ concat ─ mix ─►      no LayerNorm before the first stack,
                                        └─ layer N ─┘                       no residual around a stack or its mix

    every place of a stack              x_0 … x_s ─ read ─┬─ LayerNorm ─ convolution ─ layers ─ mix ─ join ─ feed-forward ─►
                                                          └─────────────────────────────────────────┘

The settings choose what stands in each place when a model is built; as published, most places hold nothing.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from stacklm.config.model import FoldedAttention as Folded
from stacklm.config.model import PublishedAttention as Published
from stacklm.config.model import Stack, Stacked
from stacklm.model.dense import FEED_FORWARDS
from stacklm.model.folded import FoldedAttention, Prepare, QueryKeyNorm, SharedAttention
from stacklm.model.layers import BiasedHead, BiasedLinear, Embedding, Head, Linear
from stacklm.model.packed import FoldedOutputs, FoldedValues, PackedFeedForward, ParallelLayers
from stacklm.model.positions import Rotary, Sinusoids
from stacklm.model.wiring import Last, Read, Replace, Residual, ResidualFeedForward, ShortConvolution


class Mix(nn.Module):
    """Lets the layers' features meet: W -> F -> W. Unless told otherwise it starts by keeping the variance."""

    def __init__(self, width: int, hidden: int, std: float | None = None) -> None:
        super().__init__()
        self.expand = BiasedLinear(width, hidden)
        self.contract = BiasedLinear(hidden, width, std=(2 / hidden) ** 0.5 if std is None else std)

    def forward(self, x_BTW: Tensor) -> Tensor:
        return self.contract(F.relu(self.expand(x_BTW)))


class BareLayers(nn.Module):
    """The layers of a stack without feed-forwards of their own, [B, T, C] to [B, T, W]."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.attention(x_BTC).flatten(2)


def at_once(layers: nn.Module, x_BTC: Tensor) -> Tensor:
    """The way to run the layers of a stack that is fastest to start with and keeps most; `groups` has another."""
    return layers(x_BTC)


class ParallelStack(nn.Module):
    """[B, T, C] to [B, T, W]. What it holds is chosen by `stack_of`."""

    def __init__(
        self,
        norm: nn.Module,
        convolution: nn.Module,
        layers: nn.Module,
        mix: nn.Module,
        join: nn.Module,
        feed_forward: nn.Module,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.convolution = convolution
        self.layers = layers
        self.mix = mix
        self.join = join
        self.feed_forward = feed_forward
        self.run = at_once

    def forward(self, x_BTC: Tensor) -> Tensor:
        y_BTW = self.mix(self.run(self.layers, self.convolution(self.norm(x_BTC))))
        return self.feed_forward(self.join(x_BTC, y_BTW))


class StackedDecoder(nn.Module):
    """ids [B, T] to logits [B, T, V], for T up to `context`."""

    def __init__(self, config: Stacked, vocab_size: int, context: int) -> None:
        super().__init__()
        depth, last = config.depth(context), config.stacks[-1].width
        norms = [nn.Identity(), *(nn.LayerNorm(config.width) for _ in range(depth - 1))]
        self.embedding = Embedding(vocab_size, config.width)
        self.embedding_norm = nn.LayerNorm(config.width)
        self.place = nn.Identity() if config.rotary else Sinusoids(context)
        self.reads = nn.ModuleList(read_of(config, s) for s in range(depth))
        self.stacks = nn.ModuleList(
            stack_of(config, stack, norm, depth, context) for stack, norm in zip(config.stacks_for(context), norms, strict=True)
        )
        self.norm = nn.LayerNorm(last)
        if config.head == "tied":
            self.narrow = Linear(last, config.width) if last != config.width else nn.Identity()
            self.head = Head(config.width, vocab_size)
            self.head.weight = self.embedding.weight
        else:
            self.narrow = nn.Identity()
            self.head = BiasedHead(last, vocab_size)

    def features(self, ids_BT: Tensor) -> Tensor:
        """What the head reads: [B, T, W] of the last stack, or C of it. Raises `ValueError` for a window above the context."""
        outputs_BTC = [self.place(self.embedding_norm(self.embedding(ids_BT)))]
        for read, stack in zip(self.reads, self.stacks, strict=True):
            outputs_BTC.append(stack(read(outputs_BTC)))
        return self.narrow(self.norm(outputs_BTC[-1]))

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.head(self.features(ids_BT))


def read_of(config: Stacked, before: int) -> nn.Module:
    """What the stack after `before` others reads. The first has but x_0."""
    others = {"previous": 0, "first": min(before, 1), "all": before}[config.reads]
    return Read(others, config.width) if others else Last()


def stack_of(config: Stacked, stack: Stack, norm: nn.Module, depth: int, context: int) -> ParallelStack:
    """One stack. Where its output joins by a residual it starts at zero, so that it adds nothing."""
    width, residual = stack.width, config.join == "residual"
    attention = attention_of(config, stack, depth, context)
    if config.feed_forward == "micro":
        layers = ParallelLayers(attention, PackedFeedForward(stack.layers, stack.features, depth, config.dropout))
        mix = Mix(width, stack.hidden, std=0 if residual else None)
        feed_forward = nn.Identity()
    else:
        layers = BareLayers(attention)
        mix = BiasedLinear(width, width, std=0 if residual else None)
        hidden = FEED_FORWARDS[config.feed_forward](width, stack.hidden)
        feed_forward = ResidualFeedForward(width, hidden, config.dropout)
    convolution = ShortConvolution(config.width, config.convolution - 1) if config.convolution > 1 else nn.Identity()
    return ParallelStack(norm, convolution, layers, mix, Residual() if residual else Replace(), feed_forward)


def attention_of(config: Stacked, stack: Stack, depth: int, context: int) -> nn.Module:
    """The attentions of one stack, [B, T, C] to [B, T, N, D]; as published, in the form that is cheaper at D features."""
    shape = (stack.layers, config.width, config.heads, stack.features, depth)
    match config.attention:
        case Published():
            return (FoldedValues if stack.features <= config.key_dim else FoldedOutputs)(*shape)
        case Folded(rotary=rotary, qk_norm=qk_norm, keys_values=keys_values):
            norms = [QueryKeyNorm(config.key_dim)] if qk_norm else []
            rotations = [Rotary(context)] if rotary else []
            kind = {"layer": FoldedAttention, "stack": SharedAttention}[keys_values]
            return kind(*shape, config.key_dim, Prepare([*norms, *rotations]))
