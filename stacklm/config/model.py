"""Section `models`: what is compared, one named entry each.

An entry is an architecture with the optimizer settings tuned for it; everything that a fair comparison
shares (data, budget, seed, schedule) is in section `train`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from stacklm.config.optimizer import DEFAULT_OPTIMIZER, Optimizer
from stacklm.config.schema import Count, Natural, ParamsError, Range


@dataclass(frozen=True)
class Stack:
    """N = `layers` parallel decoder layers that emit d = `features` each, and the `hidden` units of what follows them.

    Those are the mix's where the layers have small feed-forwards of their own, and else those of the one feed-forward.
    """

    layers: Count
    features: Count
    hidden: Count

    @property
    def width(self) -> int:
        """W, the width of the stack's output."""
        return self.layers * self.features


@dataclass(frozen=True)
class PublishedAttention:
    """Queries, keys and values of width / heads a head, an output projection, a reduction to d features; with biases."""

    kind: Literal["published"] = "published"


@dataclass(frozen=True)
class FoldedAttention:
    """Each head maps x to d features by a matrix of its own, which stands for value, output and reduction; no biases.

    `key_dim` is that of queries and keys (default: width / heads). With `rotary`, positions turn queries and keys and are
    not added to the embedding. `keys_values: stack` gives a stack one set of keys and values, which all its layers read.
    """

    kind: Literal["folded"] = "folded"
    key_dim: Count | None = None
    rotary: bool = False
    qk_norm: bool = False
    keys_values: Literal["layer", "stack"] = "layer"


@dataclass(frozen=True)
class Stacked:
    """The stacked-parallel decoder; every setting below `stacks` is by default as published. See docs/family.md.

    Every stack but the last gives `width` features. What may vary:

    `attention`     published, or folded: leaner, with more settings.
    `feed_forward`  micro: a small one in every layer, then a mix of two maps. relu2, swiglu: the mix is one map, and one
                    feed-forward with a residual follows it.
    `join`          replace: a stack's output is the next one's input. residual: it is added to the stack's own input.
    `reads`         what a stack reads: previous: the output of the one before. first: that and x_0. all: those of all before.
    `convolution`   tokens that the short convolution at a stack's input spans. 1: none, 2: a token shift.
    `head`          wide: over the width of the last stack. tied: back to `width`, then the embedding's own rows.
    `stack_every`   one more stack in the middle for each further so many tokens of context. 0: never.
    """

    width: Count
    heads: Count
    stacks: tuple[Stack, ...]
    kind: Literal["stacked"] = "stacked"
    attention: PublishedAttention | FoldedAttention = PublishedAttention()
    feed_forward: Literal["micro", "relu2", "swiglu"] = "micro"
    join: Literal["replace", "residual"] = "replace"
    reads: Literal["previous", "first", "all"] = "previous"
    convolution: Annotated[int, Range(1, 16)] = 1
    head: Literal["wide", "tied"] = "wide"
    stack_every: Natural = 0
    dropout: Annotated[float, Range(0, 0.99)] = 0.0

    def __post_init__(self) -> None:
        _check_heads(self.width, self.heads)
        if not self.stacks:
            raise ParamsError("stacks: [] is not allowed; name at least one stack")
        for i, stack in enumerate(self.stacks[:-1]):
            if stack.width != self.width:
                raise ParamsError(
                    f"stacks[{i}]: features {stack.features} * layers {stack.layers} = {stack.width}, but every stack "
                    f"except the last must give width = {self.width}"
                )
        last = self.stacks[-1].width
        if self.join == "residual" and last < self.width:
            raise ParamsError(f"join: residual adds width {self.width} to the last stack's {last}; it must give at least as much")
        if self.stack_every and len(self.stacks) == 1 and last != self.width:
            raise ParamsError(
                f"stack_every: {self.stack_every} repeats the only stack, so it must give width = {self.width}, not {last}"
            )
        if self.reads != "previous" and len(self.stacks) == 1 and not self.stack_every:
            raise ParamsError(f"reads: {self.reads} needs at least 2 stacks; before the only one there is nothing but x_0")
        if self.rotary and self.key_dim % 2:
            raise ParamsError(f"attention: rotary positions turn pairs, so the key dim must be even, not {self.key_dim}")

    @property
    def key_dim(self) -> int:
        """K, the dim of a head's queries and keys."""
        chosen = self.attention.key_dim if isinstance(self.attention, FoldedAttention) else None
        return chosen or self.width // self.heads

    @property
    def rotary(self) -> bool:
        """Whether positions turn queries and keys."""
        return isinstance(self.attention, FoldedAttention) and self.attention.rotary

    def stacks_for(self, context: int) -> tuple[Stack, ...]:
        """The stacks of a model for that many tokens, those of `stack_every` among them."""
        further = (context - 1) // self.stack_every if self.stack_every else 0
        middle = (len(self.stacks) - 1) // 2
        return (*self.stacks[:middle], *(self.stacks[middle],) * (1 + further), *self.stacks[middle + 1 :])

    def depth(self, context: int) -> int:
        """S, the number of steps that can not run side by side."""
        return len(self.stacks_for(context))


@dataclass(frozen=True)
class Dense:
    """A modern decoder: rotary positions, QK-norm, RMSNorm, no biases. `hidden` is the feed-forward's width."""

    width: Count
    heads: Count
    layers: Count
    hidden: Count
    kind: Literal["dense"] = "dense"
    activation: Literal["relu2", "swiglu"] = "relu2"
    tied: bool = False

    def __post_init__(self) -> None:
        _check_heads(self.width, self.heads)
        if (self.width // self.heads) % 2:
            raise ParamsError(f"width {self.width} / heads {self.heads} is odd; rotary positions need an even head dim")

    def depth(self, context: int) -> int:
        """L, the number of steps that can not run side by side."""
        return self.layers


Architecture = Stacked | Dense


@dataclass(frozen=True)
class Model:
    """One entry of the comparison."""

    architecture: Architecture
    optimizer: Optimizer = DEFAULT_OPTIMIZER


def _check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ParamsError(f"heads: {heads} does not divide width {width}")
