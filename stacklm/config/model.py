"""Section `models`: what is compared, one named entry each.

An entry is an architecture with the optimizer settings tuned for it; everything that a fair comparison
shares (data, budget, seed, schedule) is in section `train`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from stacklm.config.schema import Count, ParamsError, Positive, Range, Share


@dataclass(frozen=True)
class Stack:
    """N = `layers` parallel decoder layers that emit d = `features` each, mixed through `hidden` units."""

    layers: Count
    features: Count
    hidden: Count

    @property
    def width(self) -> int:
        """W, the width of the stack's output."""
        return self.layers * self.features


@dataclass(frozen=True)
class Stacked:
    """The stacked-parallel decoder. Every stack but the last gives `width` features."""

    width: Count
    heads: Count
    stacks: tuple[Stack, ...]
    kind: Literal["stacked"] = "stacked"
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


Architecture = Stacked | Dense


@dataclass(frozen=True)
class Optimizer:
    """AdamW. Weight decay touches matrices only: never embeddings, gains or biases."""

    peak_lr: Positive = 1e-3
    beta1: Share = 0.9
    beta2: Share = 0.95
    weight_decay: Annotated[float, Range(0)] = 0.1
    eps: Positive = 1e-8


@dataclass(frozen=True)
class Model:
    """One entry of the comparison."""

    architecture: Architecture
    optimizer: Optimizer = Optimizer()


def _check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ParamsError(f"heads: {heads} does not divide width {width}")
