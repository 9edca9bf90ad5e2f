"""The facts of a comparison as plain data: deterministic, without times, so that equal runs give equal bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stacklm.config.model import Dense
from stacklm.config.schema import plain
from stacklm.config.train import Train
from stacklm.report.runs import Run

STATEMENT = "one seed: a direction, not a result"
SMALLEST_DIFFERENCE = 0.005
"""Nats a token. Smaller ones are not told apart: equal models of two seeds already differ by a third of it."""
MATCHED = 0.05
"""The relative difference up to which two models count as matched on an axis."""
TRAIN_LOSS_SHARE = 0.05
"""The share of the last steps over which the training loss is averaged; one batch alone is mostly noise."""

SPLITS = ("valid", "test")
MEASURES = ("loss", "bits_per_byte", "word_perplexity")
MATCH_AXES = {
    "total_parameters": "parameters",
    "body_parameters": "body parameters",
    "forward_flops_per_token": "forward FLOPs per token",
    "training_flops": "training FLOPs",
    "tokens": "training tokens",
}


def build_comparison(runs: Sequence[Run], config: Train, manifest: Mapping[str, Any], data_sha256: str) -> dict[str, Any]:
    """Every model's facts, then how each other model differs from the baseline.

    The baseline is the first dense model, or the first model where none is dense. Differences are the other minus the
    baseline, mismatches relative to the baseline. A single seed allows neither an interval nor a verdict.
    """
    baseline = next((run for run in runs if isinstance(run.model.architecture, Dense)), runs[0]).name
    facts = {run.name: _facts(run, config, manifest) for run in runs}
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
            "models": {run.name: plain(run.model) for run in runs},
        },
    }
    comparison["finding"] = _finding(comparison)
    return comparison


def unmatched(mismatch: Mapping[str, float]) -> dict[str, float]:
    """The axes on which a model and the baseline are further apart than `MATCHED`, in words."""
    return {MATCH_AXES[axis]: share for axis, share in mismatch.items() if abs(share) > MATCHED}


def _facts(run: Run, config: Train, manifest: Mapping[str, Any]) -> dict[str, Any]:
    last = run.metrics[-1]
    architecture = run.model.architecture
    by_role = run.counts.parameters
    late = [row["train_loss"] for row in run.metrics[1:] if row["step"] > config.steps * (1 - TRAIN_LOSS_SHARE)]
    return {
        "kind": architecture.kind,
        "sequential_depth": architecture.depth(config.context),
        "parameters": dict(by_role),
        "body_parameters": sum(number for role, number in by_role.items() if role not in ("embedding", "head")),
        "total_parameters": run.counts.total,
        "forward_flops_per_token": run.counts.forward_flops_per_token,
        "training_flops_per_token": run.counts.training_flops_per_token,
        "tokens": last["tokens"],
        "epochs": last["tokens"] / manifest["splits"]["train"]["tokens"],
        "training_flops": last["flops"],
        "train_loss": sum(late) / len(late),
        **{split: {measure: run.evaluation[split][measure] for measure in MEASURES} for split in SPLITS},
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
