"""Text for a terminal: `stacklm plan`, advice after a run was out of memory, and `stacklm variants`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
import torch

from stacklm.config.model import Stacked
from stacklm.config.params import preview, set_values
from stacklm.config.schema import ParamsError, listed
from stacklm.config.train import Train
from stacklm.console import table
from stacklm.files import read_json
from stacklm.model.build import ModelConfig
from stacklm.model.cache import KEYS_AND_VALUES
from stacklm.model.count import count
from stacklm.model.variants import Axis, grid, variants
from stacklm.plan.memory import COMPONENTS, Memory
from stacklm.plan.plan import Change, ModelPlan, Plan, cache_bytes, fit, plan
from stacklm.train.optimizer import lr_factor, plateau_end
from stacklm.units import count as things
from stacklm.units import quantity

LEVELS = " ▁▂▃▄▅▆▇█"
CURVE_WIDTH, CURVE_HEIGHT = 60, 4
VARIANTS = ("", "S x N", "parameters", "MFLOP per token", "cache per token")
SCALES = {"k": 1, "M": 2, "G": 3, "T": 4}


class OutOfMemoryError(MemoryError):
    """A run needs more memory than this machine has; the message names settings that fit."""


def print_plan(file: Path, assignments: list[str], names: list[str], manifest: Path, budget: int | None, write: bool) -> bool:
    """Print the plan of the named models with the settings of `file` and `assignments`; return whether it fits in `budget` bytes.

    With `write`, the assignments, and those that make it fit, are written to the file.
    """
    found = plan(preview(file, assignments), names, read_json(manifest) if manifest.exists() else None)
    print(describe(found))
    changes, fits = [], True
    if budget:
        changes = fit(lambda more: preview(file, [*assignments, *more]), names, budget)
        print("\n" + verdict(found, changes, budget))
        fits = found.largest.total <= budget
        if write and changes:
            fits = changes[-1].peak <= budget
    settings = [*assignments, *(assignment for change in changes for assignment in change.assignments)]
    if write and settings:
        set_values(file, settings)
        print(f"\nparams.yaml: set {', '.join(settings)}")
    elif changes:
        print("\nAdd --write to save these settings to params.yaml.")
    return fits


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of torch or Python means out of memory, on a GPU or on the CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def advice(file: Path, name: str) -> str:
    """Return whether training the named model of a params file fits on this machine, and which settings would."""
    params = preview(file, [])
    budget = available(params.train.device)
    changes = fit(lambda more: preview(file, more), [name], budget)
    return verdict(plan(params, [name], None), changes, budget)


def available(device: str) -> int:
    """Return the bytes available to a process: the memory of the GPU or of the machine, or the limit of the process if lower."""
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    total = psutil.virtual_memory().total
    if sys.platform == "win32":
        return total
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return total if limit == resource.RLIM_INFINITY else min(total, limit)


def size(text: str) -> int:
    """Parse a size such as 8GB (10^9) or 7.5GiB (2^30) to bytes. Raises `ParamsError`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT])(i?)B\s*", text)
    if not found:
        raise ParamsError(f"--memory {text!r}: write a size with its unit, such as 8GB, 7.5GiB or 500MB")
    number, scale, binary = found.groups()
    return round(float(number) * (1024 if binary else 1000) ** SCALES[scale])


def describe(plan: Plan) -> str:
    """Return the whole plan as text."""
    models, memory = _columns(plan.models, MODEL_ROWS), _columns(plan.models, MEMORY_ROWS)
    return "\n\n".join((_budget(plan), _learning_rate(plan), models, _disk(plan), memory))


def verdict(plan: Plan, changes: list[Change], budget: int) -> str:
    """Return whether it fits, and the changes that would make it fit."""
    room, largest = quantity(budget, "B"), _with_interval(plan.largest)
    if plan.largest.total <= budget:
        return f"It fits in {room}: the largest process needs {largest}."
    lines = [f"It does not fit in {room}: the largest process needs {largest}."]
    if changes:
        rows = [(" ".join(change.assignments), quantity(change.peak, "B"), change.cost) for change in changes]
        lines += ["", _aligned([("changes, applied in order", "peak", "cost"), *rows])]
    if not changes or changes[-1].peak > budget:
        lines += [
            "",
            "Still too much: only a smaller model (width, layers, stacks) needs less for weights and optimizer state.",
        ]
    return "\n".join(lines)


def _budget(plan: Plan) -> str:
    """Return steps, tokens and how a batch is divided."""
    train, corpus, epochs = plan.params.train, plan.corpus, ""
    if corpus:
        about = "" if corpus.counted else "about "
        epochs = f" ({plan.tokens / corpus.train_tokens:.2g} epochs of {about}{things(corpus.train_tokens)})"
    return _aligned(
        [
            ("Run", f"{train.max_steps:,} steps * {train.tokens_per_step:,} tokens = {plan.tokens:,} tokens{epochs}"),
            ("Step", f"{train.batch_arithmetic}, then one update"),
            ("Vocabulary", f"{plan.params.tokenizer.vocab_size:,}"),
        ]
    )


def _learning_rate(plan: Plan) -> str:
    """Return the schedule shared by all models, and the learning rates of each."""
    train = plan.params.train
    steps = sorted({1, max(1, train.warmup_steps), (train.warmup_steps + train.max_steps) // 2, train.max_steps})
    final = f"{train.final_lr_fraction:g} of the peak"
    head = f"Learning rate ({train.lr_schedule}: warm-up over {train.warmup_steps:,} steps, then decay to {final})"
    rows = [("", *(f"step {step:,}" for step in steps))]
    for name in plan.models:
        peak = plan.params.models[name].optimizer.peak_lr
        rows.append((name, *(f"{peak * lr_factor(step, train):.2g}" for step in steps)))
    return f"{head}\n{_curve(train)}\n{_aligned(rows)}"


def _curve(train: Train) -> str:
    """Return the learning rate over the steps as block characters, `CURVE_HEIGHT` lines high."""
    width = min(CURVE_WIDTH, train.max_steps)
    factors = [lr_factor(1 + round(i * (train.max_steps - 1) / max(width - 1, 1)), train) for i in range(width)]
    eighths = [round(factor * 8 * CURVE_HEIGHT) for factor in factors]
    lines = ("".join(LEVELS[min(max(height - 8 * line, 0), 8)] for height in eighths) for line in reversed(range(CURVE_HEIGHT)))
    return "\n".join(f"  {line.rstrip()}" for line in lines)


def _disk(plan: Plan) -> str:
    """Return the disk space of checkpoints, trained weights and shards."""
    train, seeds = plan.params.train, len(plan.params.seeds)
    kept = [f"the last {train.keep_checkpoints}", "the best", "the one being written"]
    milestones = milestones_of(train)
    if milestones:
        kept.append("1 kept permanently" if milestones == 1 else f"{milestones:,} kept permanently")
    checkpoints = seeds * sum((train.keep_checkpoints + 2 + milestones) * model.checkpoint for model in plan.models.values())
    weights = seeds * sum(model.weights for model in plan.models.values())
    of = f", for {seeds} seeds" if seeds > 1 else ""
    shards = "an unknown amount (until the text is read)" if plan.shards is None else quantity(plan.shards, "B")
    about = "" if plan.corpus is None or plan.corpus.counted else "about "
    return _aligned(
        [
            ("Disk", f"{quantity(checkpoints, 'B')} of checkpoints while training ({listed(kept)}{of})"),
            ("", f"{quantity(2 * weights, 'B')} of trained weights (in out/ and in DVC's cache{of})"),
            ("", f"{about}{shards} of shards"),
        ]
    )


def milestones_of(train: Train) -> int:
    """Return the number of steps, from 0 to the last, for which `stacklm.train.trainer.is_milestone` is true."""
    every, plateau = train.keep_every, plateau_end(train)
    multiples = train.last_step // every + 1 if every else 0
    extra = train.lr_schedule == "wsd" and plateau <= train.last_step and not (every and plateau % every == 0)
    return multiples + extra


def _with_interval(memory: Memory) -> str:
    """Format an estimate, such as 1.2 GB (1 GB to 1.4 GB)."""
    low, high = (quantity(bound, "B") for bound in memory.interval)
    return f"{quantity(memory.total, 'B')} ({low} to {high})"


def variants_table(base: Stacked, vocab_size: int, context: int, axis: Axis) -> str:
    """Return a table of all variants of `base`, then the grid of depth against parallel layers at its budget on that axis."""

    def row(architecture: Stacked) -> tuple[str, ...]:
        counts = count(architecture, vocab_size, context)
        kept = (cache_bytes(ModelConfig(architecture, vocab_size, context), KEYS_AND_VALUES) or 0) // torch.float32.itemsize
        shape = f"{architecture.depth(context)} x {architecture.stacks[0].layers}"
        return shape, f"{counts.total:,}", f"{counts.forward_flops_per_token / 1e6:,.2f}", f"{kept:,}"

    budget = {"parameters": "parameters", "flops": "forward FLOPs per token"}[axis]
    named = [(name, *row(architecture)) for name, architecture in variants(base, context).items()]
    trades = [
        (*row(trade.architecture), f"{trade.architecture.stacks[0].d_ff:,}", f"{trade.mismatch:+.4%}")
        for trade in grid(base, vocab_size, context, axis)
    ]
    return (
        f"One setting changed at a time; vocabulary {vocab_size:,}, context {context:,}; the cache in numbers\n"
        f"{table(VARIANTS, named)}\n\n"
        f"S stacks of N layers with as many {budget}, d_ff solved for\n"
        f"{table((*VARIANTS[1:], 'd_ff', 'off by'), trades, left=0)}"
    )


Figure = Callable[[ModelPlan], str | None]


def _columns(models: dict[str, ModelPlan], rows: Iterable[tuple[str, Figure]]) -> str:
    """Return a table with one column per model and one row per figure, without rows that no model has a figure for."""
    lines = [("", *models)]
    for name, figure in rows:
        cells = [figure(model) for model in models.values()]
        if any(cells):
            lines.append((name, *(cell or "-" for cell in cells)))
    return _aligned(lines)


def _aligned(rows: list[tuple[str, ...]]) -> str:
    columns = [""] * len(rows[0])
    return table(columns, rows, left=len(columns))


def _part(component: str) -> Figure:
    return lambda model: quantity(size, "B") if (size := model.training.parts[component]) else None


MODEL_ROWS: tuple[tuple[str, Figure], ...] = (
    ("Parameters", lambda model: f"{model.counts.total:,}"),
    ("  embedding", lambda model: f"{model.counts.parameters['embedding']:,}"),
    ("  matrices", lambda model: f"{model.counts.parameters['matrix']:,}"),
    ("  gains and biases", lambda model: f"{model.counts.parameters['vector']:,}"),
    ("  head", lambda model: f"{model.counts.parameters['head']:,}"),
    ("Serial depth", lambda model: f"{model.depth:,}" if model.depth else None),
    ("Forward FLOPs per token", lambda model: quantity(model.counts.forward_flops_per_token, "FLOP")),
    ("Training FLOPs per token", lambda model: quantity(model.counts.training_flops_per_token, "FLOP")),
    ("Training FLOPs, whole run", lambda model: quantity(model.flops, "FLOP")),
    ("Cache per token", lambda model: f"{quantity(model.cache, 'B')} (keys and values)" if model.cache else None),
    ("", lambda model: f"{quantity(model.input_cache, 'B')} (stack inputs)" if model.input_cache else None),
)
MEMORY_ROWS: tuple[tuple[str, Figure], ...] = (
    ("Memory, training", lambda model: _with_interval(model.training)),
    *((f"  {part}", _part(part)) for part in COMPONENTS),
    ("Memory, evaluation", lambda model: _with_interval(model.evaluation)),
)
