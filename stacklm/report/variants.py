"""The variants of a stacked model as a table, before anything is trained: what each member has, costs and keeps."""

from __future__ import annotations

import torch

from stacklm.config.model import Stacked
from stacklm.console import table
from stacklm.model.build import build
from stacklm.model.cache import Decoder
from stacklm.model.count import count
from stacklm.model.variants import Axis, grid, variants

COLUMNS = ("", "S x N", "parameters", "MFLOP per token", "cache per token")


def variants_table(base: Stacked, vocab_size: int, context: int, axis: Axis) -> str:
    """Every variant of `base`, then the grid of depth against parallel layers at its budget on that axis."""
    budget = {"parameters": "parameters", "flops": "forward FLOPs per token"}[axis]
    named = [_row(name, architecture, vocab_size, context) for name, architecture in variants(base, context).items()]
    trades = [
        (
            *_row("", trade.architecture, vocab_size, context)[1:],
            f"{trade.architecture.stacks[0].d_ff:,}",
            f"{trade.mismatch:+.4%}",
        )
        for trade in grid(base, vocab_size, context, axis)
    ]
    return (
        f"One setting changed at a time; vocabulary {vocab_size:,}, context {context:,}; the cache in numbers\n"
        f"{table(COLUMNS, named)}\n\n"
        f"S stacks of N layers with as many {budget}, d_ff solved for\n"
        f"{table((*COLUMNS[1:], 'd_ff', 'off by'), trades, left=0)}"
    )


def cache_per_token(architecture: Stacked, vocab_size: int, context: int) -> int:
    """How many numbers decoding keeps of each token, as keys and values."""
    with torch.device("meta"):
        decoder = Decoder(build(architecture, vocab_size, context).eval(), context)
        decoder.features(torch.zeros(1, 1, dtype=torch.long))
    return decoder.cache.bytes_per_token // torch.float32.itemsize


def _row(name: str, architecture: Stacked, vocab_size: int, context: int) -> tuple[str, ...]:
    counts = count(architecture, vocab_size, context)
    shape = f"{architecture.depth(context)} x {architecture.stacks[0].layers}"
    flops, kept = counts.forward_flops_per_token / 1e6, cache_per_token(architecture, vocab_size, context)
    return name, shape, f"{counts.total:,}", f"{flops:,.2f}", f"{kept:,}"
