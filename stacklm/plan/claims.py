"""What was published about these models, beside the arithmetic of this code.

Only the claims themselves are written down here. Every figure in an answer is counted when it is asked for.
"""

from __future__ import annotations

import textwrap
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cache
from itertools import zip_longest

from stacklm.config.model import Dense, Model
from stacklm.config.train import Train
from stacklm.model.build import ModelConfig
from stacklm.model.count import Counts, count
from stacklm.model.presets import PRESETS
from stacklm.plan.memory import training_memory
from stacklm.report.units import count as things
from stacklm.report.units import quantity

WIDE, DEEP = "seed-2x64", "seed-4x8"
FLOAT = 4
"""Bytes of a number."""
HEAD_DIM = 64
"""Of the dense decoders to compare with, whose widths are multiples of it."""
WIDTHS = 512, 1024, 1600, 2048
"""The first is that of the model itself; then those of GPT-2 medium and XL, and of models of about 1 B parameters."""
LEFT, RIGHT = 30, 98
"""Columns of the table, in characters."""


@dataclass(frozen=True)
class Claim:
    """What was said of which model, whether it holds, and the figures, a sentence each."""

    model: str
    text: str
    verdict: str
    figures: tuple[str, ...]


def claims() -> list[Claim]:
    """All of them."""
    return [
        layers(128),
        share(WIDE, 128, 10),
        size(WIDE, 400e6),
        size(DEEP, 78e6),
        *(card(name, 8e9, 2) for name in PRESETS),
        context(WIDE),
        head(WIDE),
    ]


def layers(claimed: int) -> Claim:
    """Layers that read the same input are one layer with more heads."""
    config = PRESETS[WIDE]
    shape, stacks = config.architecture, config.architecture.stacks_for(config.context)
    total, depth = sum(stack.layers for stack in stacks), len(stacks)
    wholes = (
        f"one attention layer of {stack.layers} * {shape.heads} = {stack.layers * shape.heads} heads with keys of {shape.key_dim} "
        f"and values of {stack.features}, a map {shape.width} -> {stack.width} past it, and a feed-forward in {stack.layers} blocks"
        for stack in stacks
    )
    return Claim(
        WIDE,
        f"{claimed} layers",
        f"{total} layers, {depth} of them in series",
        (
            f"{depth} stacks of {' and '.join(str(stack.layers) for stack in stacks)} layers that all read the same input",
            *(f"stack {s} is {whole}" for s, whole in enumerate(wholes, start=1)),
        ),
    )


def share(name: str, depth: int, factor: int) -> Claim:
    """Against dense decoders that are as deep as the model is said to be."""
    here = counts(PRESETS[name])
    own, same = body(here), PRESETS[name].architecture.width
    dense = {width: dense_body(width, depth) for width in WIDTHS}
    fits, fits_whole = (width_of(factor * parameters, depth) for parameters in (own, here.total))
    return Claim(
        name,
        f"about 1/{factor} of the size of a {depth}-layer decoder",
        f"against a width of about {fits:,}; at its own width of {same} it is 1/{dense_body(same, depth) / own:.1f}",
        (
            f"its body, all but embedding and head, has {things(own)} parameters",
            *(
                f"a dense body of {depth} layers of width {width:,} has {things(it)}: 1/{it / own:.1f}"
                for width, it in dense.items()
            ),
            f"with embedding and head, {things(here.total)}, it is 1/{factor} of a dense body of a width of about {fits_whole:,}",
        ),
    )


def size(name: str, claimed: float) -> Claim:
    """Parameters in all, and where they are."""
    found = counts(PRESETS[name])
    parts = found.parameters
    off = found.total / claimed
    return Claim(
        name,
        f"about {things(claimed)} parameters",
        f"{found.total:,}: {off:.1f} times as many" if off > 1.5 else f"{found.total:,}: {off - 1:+.0%}",
        (f"embedding {things(parts['embedding'])}, body {things(body(found))}, head {things(parts['head'])}",),
    )


def card(name: str, room: float, rows: int) -> Claim:
    """The trainer's step as it is, in float32 with AdamW."""
    config = PRESETS[name]
    shape = config.architecture
    train = Train(steps=100, context=config.context, batch_size=rows, micro_batch=rows)
    memory = training_memory(Model(shape), config.vocab_size, train)
    state = 4 * FLOAT * counts(config).total
    maps = rows * shape.heads * max(stack.layers for stack in shape.stacks) * config.context**2 * FLOAT
    return Claim(
        name,
        f"fits a card of {quantity(room, 'B')} at batch {rows}",
        f"{'yes' if memory.tensors <= room else 'no'}: it takes {quantity(memory.tensors, 'B')}, in float32 with AdamW",
        (
            f"weights, gradients and the optimizer's two moments alone are {quantity(state, 'B')}",
            f"written out, the attention maps of one stack would be {quantity(maps, 'B')} more",
        ),
    )


def context(name: str) -> Claim:
    """The rule is the setting `stack_every`."""
    config = PRESETS[name]
    every = config.context
    grown = replace(config, architecture=replace(config.architecture, stack_every=every))
    grown_to = {length: replace(grown, context=length) for length in (every, 2 * every, 4 * every)}
    return Claim(
        name,
        f"+{every // 1024}K context: one stack more, in the middle",
        f"a setting, `stack_every: {every}`; that it helps is to be measured",
        tuple(
            f"at a context of {length:,}: {model.architecture.depth(length)} stacks, {things(counts(model).total)} parameters"
            for length, model in grown_to.items()
        ),
    )


def head(name: str, rows: int = 2) -> Claim:
    """What the map from features to tokens takes."""
    config = PRESETS[name]
    found = counts(config)
    inputs, own = config.architecture.stacks[-1].width, found.parameters["head"]
    work = 2 * inputs * config.vocab_size / found.forward_flops_per_token
    logits = rows * config.context * config.vocab_size * FLOAT
    return Claim(
        name,
        "a large linear layer at the end",
        f"{own / found.total:.0%} of all parameters, {work:.0%} of the operations of a forward pass",
        (
            f"{inputs:,} features to {config.vocab_size:,} tokens: {things(own)} parameters",
            f"logits of {rows} * {config.context:,} tokens in float32: {quantity(logits, 'B')}",
            f"with their softmax and their gradient: {quantity(3 * logits, 'B')}",
        ),
    )


@cache
def counts(config: ModelConfig) -> Counts:
    return count(config.architecture, config.vocab_size, config.context)


def body(found: Counts) -> int:
    """Parameters without embedding and head."""
    return found.total - found.parameters["embedding"] - found.parameters["head"]


@cache
def dense_body(width: int, depth: int) -> int:
    """Parameters of the blocks of a dense decoder, its feed-forward four times as wide as it is."""
    return body(count(Dense(width, width // HEAD_DIM, depth, 4 * width), vocab_size=2, context=2))


def width_of(parameters: int, depth: int) -> int:
    """The least width at which a dense body has so many."""
    widths = range(HEAD_DIM, 2**14, HEAD_DIM)
    return widths[bisect_left(widths, parameters, key=lambda width: dense_body(width, depth))]


def table() -> str:
    """Two columns: what was said of which model, and what it comes to, the figures behind it below."""
    blocks = [_row("claimed", ["counted by this code"])]
    for claim in claims():
        blocks.append(_row(f'{claim.model}: "{claim.text}"', [claim.verdict, *(f"- {figure}" for figure in claim.figures)]))
    return "\n\n".join(blocks)


def _row(left: str, right: list[str]) -> str:
    lefts = textwrap.wrap(left, LEFT)
    rights = [line for text in right for line in textwrap.wrap(text, RIGHT, subsequent_indent="  " if text[:2] == "- " else "")]
    return "\n".join(f"{one:<{LEFT}}  {two}".rstrip() for one, two in zip_longest(lefts, rights, fillvalue=""))
