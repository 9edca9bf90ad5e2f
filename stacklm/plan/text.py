"""A plan on a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable

from stacklm.config.schema import ParamsError, listed
from stacklm.config.train import Train
from stacklm.plan.levers import Move
from stacklm.plan.memory import COMPONENTS, Memory
from stacklm.plan.plan import Corpus, ModelPlan, Plan
from stacklm.report.units import count, quantity
from stacklm.train.schedule import lr_factor
from stacklm.train.trainer import is_milestone

LEVELS = " ▁▂▃▄▅▆▇█"
CURVE_WIDTH, CURVE_HEIGHT = 60, 4
SCALES = {"k": 1, "M": 2, "G": 3, "T": 4}


def size(text: str) -> int:
    """Bytes of a size such as 8GB (10^9) or 7.5GiB (2^30). Raises `ParamsError`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT])(i?)B\s*", text)
    if not found:
        raise ParamsError(f"--memory {text!r}: write a size with its unit, such as 8GB, 7.5GiB or 500MB")
    number, scale, binary = found.groups()
    return round(float(number) * (1024 if binary else 1000) ** SCALES[scale])


def describe(plan: Plan) -> str:
    """The whole plan."""
    sections = (run(plan), learning_rate(plan), table(plan.models, MODEL_ROWS), disk(plan), table(plan.models, MEMORY_ROWS))
    return "\n\n".join(sections)


def run(plan: Plan) -> str:
    """Steps, tokens and the arithmetic of a batch."""
    train = plan.params.train
    rows = [
        ("Run", f"{train.steps:,} steps * {train.tokens_per_step:,} tokens = {plan.tokens:,} tokens{_epochs(plan)}"),
        ("A step", f"{train.batch_arithmetic}, then one update"),
        ("Vocabulary", f"{plan.params.tokenizer.vocab_size:,}"),
    ]
    return aligned(rows)


def learning_rate(plan: Plan) -> str:
    """The curve that all models share, and each one's own numbers."""
    train = plan.params.train
    steps = sorted({1, max(1, train.warmup_steps), (train.warmup_steps + train.steps) // 2, train.steps})
    head = f"Learning rate ({train.schedule}: up over {train.warmup_steps:,} steps, then down to {train.final_lr:g} of its peak)"
    rows = [("", *(f"step {step:,}" for step in steps))]
    for name in plan.models:
        peak = plan.params.models[name].optimizer.peak_lr
        rows.append((name, *(f"{peak * lr_factor(step, train):.2g}" for step in steps)))
    return f"{head}\n{curve(train)}\n{aligned(rows)}"


def curve(train: Train) -> str:
    """The learning rate over the steps as bars of eighths, `CURVE_HEIGHT` lines high."""
    width = min(CURVE_WIDTH, train.steps)
    factors = [lr_factor(1 + round(i * (train.steps - 1) / max(width - 1, 1)), train) for i in range(width)]
    eighths = [round(factor * 8 * CURVE_HEIGHT) for factor in factors]
    lines = ("".join(LEVELS[min(max(height - 8 * line, 0), 8)] for height in eighths) for line in reversed(range(CURVE_HEIGHT)))
    return "\n".join(f"  {line.rstrip()}" for line in lines)


def disk(plan: Plan) -> str:
    """What will lie on the disk."""
    train = plan.params.train
    kept = [f"the last {train.keep_checkpoints}", "the best", "the one being written"]
    count = train.keep_checkpoints + 2
    if milestones := sum(is_milestone(step, train) for step in range(train.last_step + 1)):
        kept.append("1 milestone" if milestones == 1 else f"{milestones:,} milestones")
        count += milestones
    checkpoints = sum(count * model.checkpoint for model in plan.models.values())
    weights = sum(model.weights for model in plan.models.values())
    shards = "unknown before the text is read" if plan.shards is None else quantity(plan.shards, "B")
    about = "" if plan.corpus is None or plan.corpus.counted else "about "
    rows = [
        ("Disk", f"{quantity(checkpoints, 'B')} of checkpoints while training ({listed(kept)})"),
        ("", f"{quantity(2 * weights, 'B')} of trained weights (in out/ and in DVC's cache)"),
        ("", f"{about}{shards} of shards"),
    ]
    return aligned(rows)


def verdict(plan: Plan, moves: list[Move], budget: int) -> str:
    """Whether it fits, and what would make it fit."""
    room, largest = quantity(budget, "B"), quantity(plan.peak, "B")
    if plan.peak <= budget:
        return f"It fits {room}: the largest process takes {largest}."
    lines = [f"It does not fit {room}: the largest process takes {largest}."]
    rows = [(" ".join(move.assignments), quantity(move.peak, "B"), move.price) for move in moves]
    if rows:
        lines += ["", aligned([("change, one after the other", "then", "price"), *rows])]
    if not rows or moves[-1].peak > budget:
        lines += [
            "",
            "That is still too much: only a smaller model (width, layers, stacks) saves its weights and their optimizer state.",
        ]
    return "\n".join(lines)


def table(models: dict[str, ModelPlan], rows: Iterable[tuple]) -> str:
    """One column a model, one row a figure; a row whose figure no model has is left out."""
    lines = [("", *models)]
    for name, figure in rows:
        cells = [figure(model) for model in models.values()]
        if any(cells):
            lines.append((name, *(cell or "-" for cell in cells)))
    return aligned(lines)


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _epochs(plan: Plan) -> str:
    corpus: Corpus | None = plan.corpus
    if corpus is None:
        return ""
    about = "" if corpus.counted else "about "
    return f" ({plan.tokens / corpus.train_tokens:.2g} epochs of {about}{count(corpus.train_tokens)})"


def _share(memory: Memory, component: str) -> str:
    return quantity(memory.parts[component], "B") if memory.parts[component] else ""


MODEL_ROWS = (
    ("Parameters", lambda model: f"{model.counts.total:,}"),
    ("  embedding", lambda model: f"{model.counts.parameters['embedding']:,}"),
    ("  matrices", lambda model: f"{model.counts.parameters['matrix']:,}"),
    ("  gains and biases", lambda model: f"{model.counts.parameters['vector']:,}"),
    ("  head", lambda model: f"{model.counts.parameters['head']:,}"),
    ("Serial depth", lambda model: f"{model.depth:,}"),
    ("Forward, a token", lambda model: quantity(model.counts.forward_flops_per_token, "FLOP")),
    ("Training, a token", lambda model: quantity(model.counts.training_flops_per_token, "FLOP")),
    ("Training, the whole run", lambda model: quantity(model.flops, "FLOP")),
    ("Cache, a token", lambda model: model.cache and f"{quantity(model.cache, 'B')} (keys and values)"),
    ("", lambda model: model.input_cache and f"{quantity(model.input_cache, 'B')} (stack inputs)"),
)
MEMORY_ROWS = (
    ("Memory, training", lambda model: quantity(model.training.total, "B")),
    *((f"  {part}", lambda model, part=part: _share(model.training, part)) for part in COMPONENTS),
    ("Memory, evaluation", lambda model: quantity(model.evaluation.total, "B")),
)
