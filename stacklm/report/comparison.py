"""The facts of a comparison as plain data: deterministic, without times, so that equal runs give equal bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from statistics import fmean
from typing import Any

from stacklm.config.model import Dense
from stacklm.config.schema import plain
from stacklm.config.train import Train
from stacklm.report.runs import Result
from stacklm.units import percent

STATEMENT = "one seed: a direction, not a result"
SMALLEST_DIFFERENCE = 0.005
"""Nats per token. Smaller ones are not told apart: equal models of two seeds already differ by a third of it."""
MATCHED = 0.05
"""The relative difference up to which two models count as matched on an axis."""
TRAIN_LOSS_SHARE = 0.05
"""The share of the last steps over which the training loss is averaged; one batch alone is mostly noise."""

MOST_NUMBERS = 30
"""In the headline."""
CURVE_COLUMNS = ("step", "tokens", "train_loss", "valid_loss", "valid_bits_per_byte")

SPLITS = ("valid", "test")
MEASURES = ("loss", "bits_per_byte", "word_perplexity")
MATCH_AXES = {
    "total_parameters": "parameters",
    "body_parameters": "body parameters",
    "forward_flops_per_token": "forward FLOPs per token",
    "training_flops": "training FLOPs",
    "tokens": "training tokens",
}


def build_comparison(results: Sequence[Result], config: Train, manifest: Mapping[str, Any], data_sha256: str) -> dict[str, Any]:
    """Every model's facts, then how each other model differs from the baseline.

    The baseline is the first dense model, or the first model where none is dense. Differences are the other minus the
    baseline, mismatches relative to the baseline. A single seed allows neither an interval nor a verdict.
    """
    baseline = next((result for result in results if isinstance(result.model.architecture, Dense)), results[0]).name
    facts = {result.name: _facts(result, config, manifest) for result in results}
    others = [name for name in facts if name != baseline]
    comparison = {
        "finding": "",
        "statement": STATEMENT,
        "baseline": baseline,
        "models": facts,
        "differences": {name: _differences(facts[name], facts[baseline]) for name in others},
        "mismatch": {name: _mismatch(facts[name], facts[baseline]) for name in others},
        "provenance": {
            "seed": config.seed,
            "data_sha256": data_sha256,
            "tokenizer_sha256": manifest["tokenizer"],
            "vocab_size": manifest["vocab_size"],
            "splits": {
                split: {unit: sizes[unit] for unit in ("documents", "bytes", "words", "tokens")}
                for split, sizes in manifest["splits"].items()
            },
            "train": plain(config),
            "models": {result.name: plain(result.model) for result in results},
        },
    }
    comparison["finding"] = _finding(comparison)
    return comparison


def unmatched(mismatch: Mapping[str, float]) -> dict[str, float]:
    """The axes on which a model and the baseline are further apart than `MATCHED`, in words."""
    return {MATCH_AXES[axis]: share for axis, share in mismatch.items() if abs(share) > MATCHED}


def caveats(comparison: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing a difference."""
    seed = comparison["provenance"]["seed"]
    return [
        f"Every model was trained once, with seed {seed}: no interval can be given, so there is no verdict.",
        f"Models closer than {SMALLEST_DIFFERENCE} nats per token are not told apart; other seeds may move them further than that.",
        "The comparison is as fair as the tuning: each model's learning rate must have been swept with the same effort.",
        *(_match(comparison["baseline"], name, shares) for name, shares in comparison["mismatch"].items()),
    ]


def headline(comparison: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The most important numbers of each model for `dvc metrics`, at most `MOST_NUMBERS` in all; of many models, the first."""
    models = comparison["models"]
    each = max(1, MOST_NUMBERS // len(models))
    return {name: dict(islice(_ranked(facts), each)) for name, facts in islice(models.items(), MOST_NUMBERS)}


def curve(result: Result) -> str:
    """A CSV for `dvc plots` with a row for each validation after the first step; losses are in nats per token.

    `train_loss` is the mean since the row before.
    """
    lines, since = [",".join(CURVE_COLUMNS)], []
    for row in result.metrics:
        if "train_loss" in row:
            since.append(row["train_loss"])
        if "valid_loss" in row and since:
            lines.append(",".join(repr({**row, "train_loss": fmean(since)}[column]) for column in CURVE_COLUMNS))
            since = []
    return "\n".join(lines) + "\n"


def _ranked(facts: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    yield "test_bits_per_byte", facts["test"]["bits_per_byte"]
    yield "valid_bits_per_byte", facts["valid"]["bits_per_byte"]
    yield "test_loss", facts["test"]["loss"]
    yield from ((key, facts[key]) for key in ("total_parameters", "tokens", "training_flops"))


def _match(baseline: str, name: str, mismatch: Mapping[str, float]) -> str:
    off = unmatched(mismatch)
    if not off:
        return f"{name} is matched to {baseline} within {MATCHED:.0%} in parameters, compute and tokens."
    return f"{name} is not matched to {baseline} in {', '.join(f'{axis} ({percent(share)})' for axis, share in off.items())}."


def _facts(result: Result, config: Train, manifest: Mapping[str, Any]) -> dict[str, Any]:
    last = result.metrics[-1]
    architecture = result.model.architecture
    by_role = result.counts.parameters
    late = [row["train_loss"] for row in result.metrics[1:] if row["step"] > config.max_steps * (1 - TRAIN_LOSS_SHARE)]
    return {
        "kind": architecture.kind,
        "sequential_depth": architecture.depth(config.context_length),
        "parameters": dict(by_role),
        "body_parameters": sum(number for role, number in by_role.items() if role not in ("embedding", "head")),
        "total_parameters": result.counts.total,
        "forward_flops_per_token": result.counts.forward_flops_per_token,
        "training_flops_per_token": result.counts.training_flops_per_token,
        "tokens": last["tokens"],
        "epochs": last["tokens"] / manifest["splits"]["train"]["tokens"],
        "training_flops": last["flops"],
        "train_loss": sum(late) / len(late),
        **{split: {measure: result.evaluation[split][measure] for measure in MEASURES} for split in SPLITS},
    }


def _differences(other: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    def minus(split: str, measure: str) -> float | None:
        pair = other[split][measure], baseline[split][measure]
        return None if None in pair else pair[0] - pair[1]  # a perplexity too large for a number is None

    return {split: {measure: minus(split, measure) for measure in MEASURES} for split in SPLITS}


def _mismatch(other: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, float]:
    return {axis: other[axis] / baseline[axis] - 1 for axis in MATCH_AXES}


def _finding(comparison: Mapping[str, Any]) -> str:
    """One sentence on the test set: what each model needs against the baseline, and what that is worth."""
    baseline = comparison["baseline"]
    bits = {name: facts["test"]["bits_per_byte"] for name, facts in comparison["models"].items()}
    if not comparison["differences"]:
        return f"On the test set {baseline} needs {bits[baseline]:.4f} bits per byte; there is no other model to compare it with."
    parts = []
    for name, difference in comparison["differences"].items():
        if abs(difference["test"]["loss"]) < SMALLEST_DIFFERENCE:
            part = f"{name} shows no difference from {baseline} ({bits[name]:.4f} and {bits[baseline]:.4f} bits per byte)"
        else:
            change = _more_or_fewer(bits[name] / bits[baseline] - 1, digits=1)
            part = f"{name} needs {change} bits per byte than {baseline} ({bits[name]:.4f} against {bits[baseline]:.4f})"
        parts.append(part + _price(comparison["mismatch"][name]))
    return f"On the test set {'; '.join(parts)}. {STATEMENT.capitalize()}."


def _price(mismatch: Mapping[str, float]) -> str:
    """What the model spent more or less than the baseline, where that is not matched."""
    off = unmatched({axis: mismatch[axis] for axis in ("body_parameters", "training_flops")})
    spent = " and ".join(f"{_more_or_fewer(share, digits=0)} {axis}" for axis, share in off.items())
    return f", with {spent}" if spent else ""


def _more_or_fewer(share: float, digits: int) -> str:
    return f"{abs(share):.{digits}%} {'more' if share > 0 else 'fewer'}"
