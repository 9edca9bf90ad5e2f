"""What was published about these models, beside the arithmetic of this code.

Only the claims themselves are written down here. Every figure in an answer is counted when it is asked for.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from stacklm.config.model import Dense, Model, Stacked
from stacklm.config.train import Train
from stacklm.model.build import PRESETS, ModelConfig
from stacklm.model.count import Counts, count
from stacklm.plan.memory import training_memory
from stacklm.units import count as things
from stacklm.units import quantity

WIDE, DEEP = "seed-2x64", "seed-4x8"
FLOAT = 4
"""Bytes of a number."""
HEAD_DIM = 64
"""Of the dense decoders to compare with, whose widths are multiples of it."""
WIDTHS = 512, 1024, 1600, 2048
"""The first is that of the model itself; then those of GPT-2 medium and XL, and of models of about 1 B parameters."""


class Claim(NamedTuple):
    """What was said of which model, whether it holds, and the figures, a sentence each."""

    model: str
    text: str
    verdict: str
    figures: list[str]

    def __str__(self) -> str:
        return "\n".join([f'{self.model}: "{self.text}"', f"  {self.verdict}", *(f"  - {figure}" for figure in self.figures)])


def table() -> str:
    """Every claim, and below it what this code counts."""
    cards = (card(name, 8e9, 2) for name in PRESETS)
    claims = (layers(128), share(WIDE, 128, 10), size(WIDE, 400e6), size(DEEP, 78e6), *cards, context(WIDE), head(WIDE))
    return "\n\n".join(map(str, ("What was claimed, and below it what this code counts", *claims)))


def layers(claimed: int) -> Claim:
    """Layers that read the same input are one layer with more heads."""
    shape = stacked(WIDE)
    stacks = shape.stacks_for(PRESETS[WIDE].context_length)
    verdict = f"{sum(stack.layers for stack in stacks)} layers, {len(stacks)} of them in series"
    numbers = " and ".join(str(stack.layers) for stack in stacks)
    figures = [f"{len(stacks)} stacks of {numbers} layers that all read the same input"]
    figures += [
        f"stack {s} is one attention layer of {stack.layers} * {shape.n_heads} = {stack.layers * shape.n_heads} heads with keys of "
        f"{shape.qk_head_dim} and values of {stack.features}, a map {shape.d_model} -> {stack.width} past it, "
        f"and a feed-forward in {stack.layers} blocks"
        for s, stack in enumerate(stacks, start=1)
    ]
    return Claim(WIDE, f"{claimed} layers", verdict, figures)


def share(name: str, depth: int, factor: int) -> Claim:
    """Against dense decoders that are as deep as the model is said to be."""
    here, width = counts(PRESETS[name]), stacked(name).d_model
    own = body(here)
    fits, fits_whole = (width_of(factor * parameters, depth) for parameters in (own, here.total))
    dense = {w: dense_body(w, depth) for w in WIDTHS}
    verdict = f"against a width of about {fits:,}; at its own width of {width} it is 1/{dense_body(width, depth) / own:.1f}"
    figures = [
        f"its body, all but embedding and head, has {things(own)} parameters",
        *(f"a dense body of {depth} layers of width {w:,} has {things(size)}: 1/{size / own:.1f}" for w, size in dense.items()),
        f"with embedding and head, {things(here.total)}, it is 1/{factor} of a dense body of a width of about {fits_whole:,}",
    ]
    return Claim(name, f"about 1/{factor} of the size of a {depth}-layer decoder", verdict, figures)


def size(name: str, claimed: float) -> Claim:
    """Parameters in all, and where they are."""
    found = counts(PRESETS[name])
    parts, off = found.parameters, found.total / claimed
    verdict = f"{found.total:,}: {off:.1f} times as many" if off > 1.5 else f"{found.total:,}: {off - 1:+.0%}"
    figures = [f"embedding {things(parts['embedding'])}, body {things(body(found))}, head {things(parts['head'])}"]
    return Claim(name, f"about {things(claimed)} parameters", verdict, figures)


def card(name: str, room: float, rows: int) -> Claim:
    """The trainer's step as it is, in float32 with AdamW."""
    config, shape = PRESETS[name], stacked(name)
    train = Train(max_steps=100, context_length=config.context_length, global_batch_size=rows, micro_batch_size=rows)
    needed = training_memory(Model(shape), config.vocab_size, train).tensors
    state = 4 * FLOAT * counts(config).total
    maps = rows * shape.n_heads * max(stack.layers for stack in shape.stacks) * config.context_length**2 * FLOAT
    verdict = f"{'yes' if needed <= room else 'no'}: it takes {quantity(needed, 'B')}, in float32 with AdamW"
    figures = [
        f"weights, gradients and the optimizer's two moments alone are {quantity(state, 'B')}",
        f"written out, the attention maps of one stack would be {quantity(maps, 'B')} more",
    ]
    return Claim(name, f"fits a card of {quantity(room, 'B')} at batch {rows}", verdict, figures)


def context(name: str) -> Claim:
    """The rule is the setting `tokens_per_extra_stack`."""
    every = PRESETS[name].context_length
    shape = replace(stacked(name), tokens_per_extra_stack=every)
    figures = []
    for length in (every, 2 * every, 4 * every):
        parameters = things(count(shape, PRESETS[name].vocab_size, length).total)
        figures.append(f"at a context of {length:,}: {shape.depth(length)} stacks, {parameters} parameters")
    verdict = f"a setting, `tokens_per_extra_stack: {every}`; that it helps is to be measured"
    return Claim(name, f"+{every // 1024}K context: one stack more, in the middle", verdict, figures)


def head(name: str, rows: int = 2) -> Claim:
    """What the map from features to tokens takes."""
    config, found, inputs = PRESETS[name], counts(PRESETS[name]), stacked(name).stacks[-1].width
    own = found.parameters["head"]
    work = 2 * inputs * config.vocab_size / found.forward_flops_per_token
    logits = rows * config.context_length * config.vocab_size * FLOAT
    verdict = f"{own / found.total:.0%} of all parameters, {work:.0%} of the FLOPs of a forward pass"
    figures = [
        f"{inputs:,} features to {config.vocab_size:,} tokens: {things(own)} parameters",
        f"logits of {rows} * {config.context_length:,} tokens in float32: {quantity(logits, 'B')}",
        f"with their softmax and their gradient: {quantity(3 * logits, 'B')}",
    ]
    return Claim(name, "a large linear layer at the end", verdict, figures)


def stacked(name: str) -> Stacked:
    architecture = PRESETS[name].architecture
    assert isinstance(architecture, Stacked)
    return architecture


@cache
def counts(config: ModelConfig) -> Counts:
    return count(config.architecture, config.vocab_size, config.context_length)


def body(found: Counts) -> int:
    """Parameters without embedding and head."""
    return found.total - found.parameters["embedding"] - found.parameters["head"]


@cache
def dense_body(width: int, depth: int) -> int:
    """Parameters of the blocks of a dense decoder, its feed-forward four times as wide as it is."""
    return body(count(Dense(width, width // HEAD_DIM, depth, 4 * width), vocab_size=2, context=2))


def width_of(parameters: int, depth: int) -> int:
    """The least width at which a dense body has that many."""
    widths = range(HEAD_DIM, 2**14, HEAD_DIM)
    return widths[bisect_left(widths, parameters, key=lambda width: dense_body(width, depth))]
