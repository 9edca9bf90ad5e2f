"""The family around a stacked model as a table, before anything is trained: what each member has, costs and keeps."""

from __future__ import annotations

import torch

from stacklm.config.model import Stacked
from stacklm.model.build import build
from stacklm.model.cache import Decoder
from stacklm.model.count import count
from stacklm.model.family import Axis, grid, variants

HEADER = f"{'':<16}{'S x N':>9}{'parameters':>14}{'MFLOP a token':>15}{'cache a token':>15}"


def family(base: Stacked, vocab_size: int, context: int, axis: Axis) -> str:
    """Every variant of `base`, then the grid of depth against parallel layers at its budget on that axis."""
    budget = {"parameters": "parameters", "flops": "operations of a forward"}[axis]
    lines = [
        f"One setting changed at a time; vocabulary {vocab_size:,}, context {context:,}; the cache in numbers",
        HEADER,
        *(_row(name, architecture, vocab_size, context) for name, architecture in variants(base, context).items()),
        "",
        f"S stacks of N layers with as many {budget}, the hidden units solved for",
        f"{HEADER}{'hidden':>9}{'off by':>10}",
    ]
    for trade in grid(base, vocab_size, context, axis):
        row = _row("", trade.architecture, vocab_size, context)
        lines.append(f"{row}{trade.architecture.stacks[0].hidden:>9,}{trade.mismatch:>+10.4%}")
    return "\n".join(lines)


def cache_per_token(architecture: Stacked, vocab_size: int, context: int) -> int:
    """How many numbers decoding keeps of each token, as keys and values."""
    with torch.device("meta"):
        decoder = Decoder(build(architecture, vocab_size, context).eval(), context)
        decoder.features(torch.zeros(1, 1, dtype=torch.long))
    return decoder.cache.bytes_per_token // torch.float32.itemsize


def _row(name: str, architecture: Stacked, vocab_size: int, context: int) -> str:
    counts = count(architecture, vocab_size, context)
    shape = f"{architecture.depth(context)} x {architecture.stacks[0].layers}"
    kept = cache_per_token(architecture, vocab_size, context)
    return f"{name:<16}{shape:>9}{counts.total:>14,}{counts.forward_flops_per_token / 1e6:>15,.2f}{kept:>15,}"
