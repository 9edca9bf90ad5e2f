"""The family around a stacked model: one setting changed at a time, and depth traded for parallel layers at one budget."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from stacklm.config.model import FoldedAttention, Stack, Stacked
from stacklm.config.schema import ParamsError
from stacklm.model.count import Counts, count


def variants(base: Stacked, context: int) -> dict[str, Stacked]:
    """Each setting of the family on its own, on the stacks of `base`, and two models in which they meet.

    The settings of attention change the folded form. At `context` tokens, `growing` has one stack more. What these stacks
    can not have is left out.
    """
    half = max(2, base.width // base.heads // 2)
    folded = FoldedAttention()
    changes = {
        "base": {},
        "residual": {"join": "residual", "reads": "first"},
        "cross-reads": {"join": "residual", "reads": "all"},
        "relu2": {"feed_forward": "relu2"},
        "swiglu": {"feed_forward": "swiglu"},
        "shift": {"convolution": 2},
        "convolution": {"convolution": 4},
        "tied": {"head": "tied"},
        "growing": {"stack_every": max(1, context // 2)},
        "folded": {"attention": folded},
        "small-keys": {"attention": replace(folded, key_dim=half)},
        "rotary": {"attention": replace(folded, rotary=True)},
        "qk-norm": {"attention": replace(folded, qk_norm=True)},
        "shared-keys": {"attention": replace(folded, keys_values="stack")},
        "modern": {
            "attention": FoldedAttention(key_dim=half, rotary=True, qk_norm=True),
            "feed_forward": "relu2",
            "join": "residual",
            "reads": "first",
            "convolution": 4,
            "head": "tied",
        },
        "modern-shared": {
            "attention": FoldedAttention(rotary=True, qk_norm=True, keys_values="stack"),
            "feed_forward": "swiglu",
            "join": "residual",
            "reads": "all",
            "convolution": 2,
            "head": "tied",
        },
    }
    found = {}
    for name, change in changes.items():
        with suppress(ParamsError):
            found[name] = replace(base, **change)
    return found


Axis = Literal["parameters", "flops"]


@dataclass(frozen=True)
class Trade:
    """A member of a grid, what it costs on every axis, and by what share it is off the budget on the one that was held."""

    architecture: Stacked
    counts: Counts
    mismatch: float


def grid(base: Stacked, vocab_size: int, context: int, axis: Axis = "parameters") -> list[Trade]:
    """The (S, N) that cost what `base` costs, from the most layers side by side down to N = 1, a dense decoder.

    The budget is all parameters, or the operations of a forward at that context. N runs over the divisors of the width; S is
    the most stacks that fit with the hidden units of `base`, which are then raised to meet the budget. The last stack
    stays as wide as that of `base`. An N of which not even one stack fits is left out.
    """

    def cost(architecture: Stacked) -> int:
        counts = count(architecture, vocab_size, context)
        return counts.total if axis == "parameters" else counts.forward_flops_per_token

    budget, hidden = cost(base), base.stacks[0].hidden
    found = []
    for layers in (n for n in range(base.width, 0, -1) if base.width % n == 0 == base.stacks[-1].width % n):
        one, two = (cost(shaped(base, depth, layers, hidden)) for depth in (1, 2))
        if one <= budget:
            depth = 1 + (budget - one) // (two - one)
            plain, doubled = (cost(shaped(base, depth, layers, units)) for units in (hidden, 2 * hidden))
            solved = round(hidden * (1 + (budget - plain) / (doubled - plain)))
            architecture = shaped(base, depth, layers, solved)
            found.append(Trade(architecture, count(architecture, vocab_size, context), cost(architecture) / budget - 1))
    return found


def shaped(base: Stacked, depth: int, layers: int, hidden: int) -> Stacked:
    """`base` as `depth` stacks of `layers` layers and `hidden` units; the last one is wider, and has more, as in `base`."""
    last = base.stacks[-1]
    stack = Stack(layers, base.width // layers, hidden)
    wide = Stack(layers, last.width // layers, round(hidden * last.hidden / base.stacks[0].hidden))
    reads = base.reads if depth > 1 else "previous"
    return replace(base, stacks=(*(stack,) * (depth - 1), wide), reads=reads, stack_every=0)
