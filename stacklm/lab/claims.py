"""The published claims about these models, compared with what this code counts and what the project's experiments found.

Only the claims themselves are stored here. Every figure in an answer is counted, or read from the records of trials, on demand.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from textwrap import fill
from typing import NamedTuple

from stacklm.config.model import Dense, Model, Stack, Stacked
from stacklm.config.optimizer import Adafactor
from stacklm.config.train import Train
from stacklm.lab.findings import Findings
from stacklm.lab.text import coverage, sentence
from stacklm.model.build import PRESETS, ModelConfig
from stacklm.model.cache import KEYS_AND_VALUES
from stacklm.model.count import Counts, count
from stacklm.plan.memory import training_memory
from stacklm.plan.plan import cache_bytes
from stacklm.units import count as things
from stacklm.units import quantity

WIDE, DEEP, WIDEST = "seed-2x64", "seed-4x8", "4 x 64 layers"
FLOAT = 4
"""Bytes per float32 number."""
HEAD_DIM = 64
"""Head dim of the dense decoders to compare with; their widths are multiples of it."""
WIDTHS = 512, 1024, 1600, 2048
"""Widths of the model itself, of GPT-2 medium and XL, and of models of about 1 B parameters."""


MEASURED = "hundred-steps", "published-forms", "forms", "context-256", "context-512"
"""The experiments that test the claims."""
COMMAND = "stacklm claims"


class Claim(NamedTuple):
    """A claim about a model, the verdict on it, and the figures, one sentence each, with the commands that print them."""

    model: str
    text: str
    verdict: str
    figures: list[str]
    commands: Sequence[str] = (COMMAND,)

    def __str__(self) -> str:
        return "\n".join([f'{self.model}: "{self.text}"', f"  {self.verdict}", *(f"  - {figure}" for figure in self.figures)])


def claims(found: Mapping[str, Findings]) -> list[Claim]:
    """All claims. `found` are the experiments named in `MEASURED`, as far as they exist."""
    return [
        layers(128),
        share(WIDE, 128, 10),
        size(WIDE, 400e6),
        size(DEEP, 78e6),
        third_form(1.4e9),
        measured(WIDE, "low loss after 100 steps", {"hundred-steps": ["published"]}, found),
        measured("all", "lower loss than foundational models", {"published-forms": None, "forms": ["stacked"]}, found),
        memory(WIDE),
        *(card(name, 8e9, 2) for name in PRESETS),
        context(WIDE),
        measured(WIDE, "one more stack helps a longer context", {"context-256": None, "context-512": None}, found),
        head(WIDE),
    ]


def page(found: Sequence[Claim]) -> str:
    """The claims as Markdown: a table of verdicts, then the figures of each claim with the commands that print them."""
    rows = [f"| {one.model} | {one.text} | {one.verdict} |" for one in found]
    parts = [
        "# Published claims, and what holds",
        fill(
            f"Written by `{COMMAND} --write docs/claims.md` from the code and from the records in `experiments/`. The experiments "
            "use small copies: fewer than a million parameters, trained on tokens of Python's standard library.",
            120,
        ),
        "\n".join(["| model | claim | finding |", "| -- | -- | -- |", *rows]),
    ]
    for one in found:
        figures = "\n".join(fill(f"- {figure}", 120, subsequent_indent="  ") for figure in one.figures)
        commands = ", ".join(f"`{command}`" for command in one.commands)
        parts += [f"## {one.model}: {one.text}", f"{one.verdict[:1].upper()}{one.verdict[1:]}.", figures, f"Reproduce: {commands}."]
    return "\n\n".join(parts) + "\n"


def measured(model: str, text: str, arms: Mapping[str, Sequence[str] | None], found: Mapping[str, Findings]) -> Claim:
    """A claim about loss, with the verdicts of experiments on some or all of their candidates."""
    figures, outcomes = [], []
    for name, chosen in arms.items():
        result = found[name].final if name in found else None
        if result is None:
            outcomes.append("not measured yet")
            figures.append(f"`stacklm run-flow lab {name}` measures it")
            continue
        picked = {one: result.verdicts[one] for one in chosen or result.verdicts}
        outcomes += [f"{one} {verdict.mean:+.1%}: {verdict.outcome}" for one, verdict in picked.items()]
        figures.append(f"{name}: {found[name].lab.experiment.question}")
        figures += [f"{sentence(one, verdict)}; {verdict.seeds} seeds, {coverage(result)}" for one, verdict in picked.items()]
    return Claim(model, text, "; ".join(outcomes), figures, [f"stacklm lab show {name}" for name in arms])


def third_form(claimed: float) -> Claim:
    """The size of the third form, whose width was not published: the width that comes nearest to the published parameters."""
    widths = {width: count(_four_by_64(width), PRESETS[WIDE].vocab_size, 2048) for width in WIDTHS}
    width, near = min(widths.items(), key=lambda item: abs(item[1].total - claimed))
    figures = [f"width {width:,}: {things(found.total)}" for width, found in widths.items()]
    return Claim(WIDEST, f"about {things(claimed)} parameters", f"{things(near.total)} at width {width:,}", figures)


def _four_by_64(width: int) -> Stacked:
    stack = Stack(64, width // 64, 2048)
    return Stacked(width, 4, (stack, stack, stack, Stack(64, 2 * width // 64, 4096)))


def memory(name: str, rows: int = 2) -> Claim:
    """Memory of a training step, compared with a dense decoder of 12 layers, the usual number, and equal body parameters."""
    config = PRESETS[name]
    own = body(counts(config))
    width = min(
        (max(width_of(own, 12) - step, HEAD_DIM) for step in (0, HEAD_DIM)), key=lambda width: abs(dense_body(width, 12) - own)
    )
    twin = replace(config, architecture=Dense(width, width // HEAD_DIM, 12, 4 * width))
    train = Train(max_steps=100, context_length=config.context_length, global_batch_size=rows, micro_batch_size=rows)
    taken, caches = {}, {}
    for key, one in {name: config, f"dense, 12 layers, width {width:,}": twin}.items():
        parts = training_memory(Model(one.architecture), one.vocab_size, train).parts
        taken[key], caches[key] = parts["saved activations"], cache_bytes(one, KEYS_AND_VALUES)
    (ours, theirs), (kept, kept_dense) = taken.values(), caches.values()
    figures = [f"{key}: activations saved for the backward pass at batch {rows}: {quantity(taken[key], 'B')}" for key in taken]
    figures += [f"{key}: keys and values of {quantity(caches[key], 'B')} per token" for key in caches]
    verdict = f"{ours / theirs:.1f} times the activations and {kept / kept_dense:.1f} times the keys and values of a dense twin"
    return Claim(name, "lower memory overhead for decoder layers", verdict, figures)


def layers(claimed: int) -> Claim:
    """The number of layers; those that read the same input are equivalent to one layer with more heads."""
    shape = stacked(WIDE)
    stacks = shape.stacks_for(PRESETS[WIDE].context_length)
    verdict = f"{sum(stack.layers for stack in stacks)} layers, {len(stacks)} of them in series"
    numbers = " and ".join(str(stack.layers) for stack in stacks)
    figures = [f"{len(stacks)} stacks of {numbers} layers that all read the same input"]
    figures += [
        f"stack {s} is one attention layer of {stack.layers} * {shape.n_heads} = {stack.layers * shape.n_heads} heads with keys of "
        f"{shape.qk_head_dim} and values of {stack.features}, a skip map {shape.d_model} -> "
        f"{stack.width}, and a feed-forward network of {stack.layers} blocks"
        for s, stack in enumerate(stacks, start=1)
    ]
    return Claim(WIDE, f"{claimed} layers", verdict, figures)


def share(name: str, depth: int, factor: int) -> Claim:
    """The size compared with dense decoders as deep as the model is claimed to be."""
    here, width = counts(PRESETS[name]), stacked(name).d_model
    own = body(here)
    fits, fits_whole = (width_of(factor * parameters, depth) for parameters in (own, here.total))
    dense = {w: dense_body(w, depth) for w in WIDTHS}
    verdict = f"holds against a width of about {fits:,}; at its own width of {width} it is 1/{dense_body(width, depth) / own:.1f}"
    figures = [
        f"its body (all parameters except embedding and head) has {things(own)} parameters",
        *(f"a dense body of {depth} layers of width {w:,} has {things(size)}: 1/{size / own:.1f}" for w, size in dense.items()),
        f"with embedding and head ({things(here.total)}) it is 1/{factor} of a dense body of width about {fits_whole:,}",
    ]
    return Claim(name, f"about 1/{factor} of the size of a {depth}-layer decoder", verdict, figures)


def size(name: str, claimed: float) -> Claim:
    """The total number of parameters, and the numbers of embedding, body and head."""
    found = counts(PRESETS[name])
    parts, off = found.parameters, found.total / claimed
    verdict = f"{found.total:,}: {off:.1f} times as many" if off > 1.5 else f"{found.total:,}: {off - 1:+.0%}"
    figures = [f"embedding {things(parts['embedding'])}, body {things(body(found))}, head {things(parts['head'])}"]
    return Claim(name, f"about {things(claimed)} parameters", verdict, figures)


def card(name: str, room: float, rows: int) -> Claim:
    """Memory of the trainer's step in float32 with AdamW."""
    config, shape = PRESETS[name], stacked(name)
    train = Train(max_steps=100, context_length=config.context_length, global_batch_size=rows, micro_batch_size=rows)
    needed = training_memory(Model(shape), config.vocab_size, train).tensors
    state = 4 * FLOAT * counts(config).total
    maps = rows * shape.n_heads * max(stack.layers for stack in shape.stacks) * config.context_length**2 * FLOAT
    verdict = f"{'yes' if needed <= room else 'no'}: it takes {quantity(needed, 'B')}, in float32 with AdamW"
    lean = training_memory(Model(shape, Adafactor()), config.vocab_size, replace(train, micro_batch_size=1)).tensors
    figures = [
        f"with Adafactor and a micro-batch of one sequence, at the same batch size, it takes {quantity(lean, 'B')}",
        f"weights, gradients and the optimizer's two moments alone take {quantity(state, 'B')}",
        f"the attention maps of one stack, if they were materialised, would take another {quantity(maps, 'B')}",
    ]
    return Claim(name, f"fits a card of {quantity(room, 'B')} at batch {rows}", verdict, figures)


def context(name: str) -> Claim:
    """Stacks by context length: the rule is the setting `tokens_per_extra_stack`."""
    every = PRESETS[name].context_length
    shape = replace(stacked(name), tokens_per_extra_stack=every)
    figures = []
    for length in (every, 2 * every, 4 * every):
        parameters = things(count(shape, PRESETS[name].vocab_size, length).total)
        figures.append(f"at a context of {length:,}: {shape.depth(length)} stacks, {parameters} parameters")
    verdict = f"a setting, `tokens_per_extra_stack: {every}`"
    return Claim(name, f"+{every // 1024}K context: one stack more, in the middle", verdict, figures)


def head(name: str, rows: int = 2) -> Claim:
    """Parameters, FLOPs and memory of the linear map from features to logits."""
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
    """The parameters without embedding and head."""
    return found.total - found.parameters["embedding"] - found.parameters["head"]


@cache
def dense_body(width: int, depth: int) -> int:
    """Parameters of the blocks of a dense decoder with `d_ff` of four times its width."""
    return body(count(Dense(width, width // HEAD_DIM, depth, 4 * width), vocab_size=2, context=2))


def width_of(parameters: int, depth: int) -> int:
    """The smallest width at which a dense body has at least that many parameters."""
    widths = range(HEAD_DIM, 2**14, HEAD_DIM)
    return widths[bisect_left(widths, parameters, key=lambda width: dense_body(width, depth))]
