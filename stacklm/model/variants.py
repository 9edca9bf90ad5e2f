"""Variants of a stacked model: changing one setting at a time, and trading depth for parallel layers at a fixed budget."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from stacklm.config.model import FactoredAttention, Stack, Stacked
from stacklm.config.schema import ParamsError
from stacklm.model.count import Counts, count


def variants(base: Stacked, context: int) -> dict[str, Stacked]:
    """Variants of `base` with the same stacks: each changes one setting, and the last two combine several.

    Attention settings change the factored form. At `context` tokens, `extra-stack` has one more stack. Variants that are invalid
    for these stacks are left out.
    """
    half = max(2, base.d_model // base.n_heads // 2)
    factored = FactoredAttention()
    changes = {
        "base": {},
        "residual": {"residual": True, "skip_connections": "input"},
        "dense-skip": {"residual": True, "skip_connections": "dense"},
        "dynamic-skip": {"residual": True, "skip_connections": "dynamic"},
        "relu2": {"ffn": "relu2"},
        "swiglu": {"ffn": "swiglu"},
        "token-shift": {"conv_size": 2},
        "conv": {"conv_size": 4},
        "tied-embeddings": {"tie_embeddings": True},
        "extra-stack": {"tokens_per_extra_stack": max(1, context // 2)},
        "factored": {"attention": factored},
        "narrow-qk": {"attention": replace(factored, qk_head_dim=half)},
        "rope": {"attention": replace(factored, rope=True)},
        "qk-norm": {"attention": replace(factored, qk_norm=True)},
        "kv-sharing": {"attention": replace(factored, kv_sharing="stack")},
        "modern": {
            "attention": FactoredAttention(qk_head_dim=half, rope=True, qk_norm=True),
            "ffn": "relu2",
            "residual": True,
            "skip_connections": "input",
            "conv_size": 4,
            "tie_embeddings": True,
        },
        "modern-shared": {
            "attention": FactoredAttention(rope=True, qk_norm=True, kv_sharing="stack"),
            "ffn": "swiglu",
            "residual": True,
            "skip_connections": "dense",
            "conv_size": 2,
            "tie_embeddings": True,
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
    """A model of the grid, its counts, and its relative deviation from the budget."""

    architecture: Stacked
    counts: Counts
    mismatch: float


def grid(base: Stacked, vocab_size: int, context: int, axis: Axis = "parameters") -> list[Trade]:
    """The shapes (S, N) that cost as much as `base`, from the most parallel layers down to N = 1, a dense decoder.

    The budget is the number of parameters, or the forward FLOPs per token at that context. N runs over the divisors of the width;
    S is the largest number of stacks that fits with the hidden units of `base`, which are then increased to meet the budget. The
    last stack stays as wide as that of `base`. An N for which not even one stack fits is left out.
    """

    def cost(architecture: Stacked) -> int:
        counts = count(architecture, vocab_size, context)
        return counts.total if axis == "parameters" else counts.forward_flops_per_token

    budget, hidden = cost(base), base.stacks[0].d_ff
    found = []
    for layers in (n for n in range(base.d_model, 0, -1) if base.d_model % n == 0 == base.stacks[-1].width % n):
        one, two = (cost(shaped(base, depth, layers, hidden)) for depth in (1, 2))
        if one <= budget:
            depth = 1 + (budget - one) // (two - one)
            plain, doubled = (cost(shaped(base, depth, layers, units)) for units in (hidden, 2 * hidden))
            solved = round(hidden * (1 + (budget - plain) / (doubled - plain)))
            architecture = shaped(base, depth, layers, solved)
            found.append(Trade(architecture, count(architecture, vocab_size, context), cost(architecture) / budget - 1))
    return found


def shaped(base: Stacked, depth: int, layers: int, hidden: int) -> Stacked:
    """`base` with `depth` stacks of `layers` layers and `hidden` units; the last one is wider and has more units, as in `base`."""
    last = base.stacks[-1]
    stack = Stack(layers, base.d_model // layers, hidden)
    wide = Stack(layers, last.width // layers, round(hidden * last.d_ff / base.stacks[0].d_ff))
    reads = base.skip_connections if depth > 1 else "none"
    return replace(base, stacks=(*(stack,) * (depth - 1), wide), skip_connections=reads, tokens_per_extra_stack=0)
