"""A comparison as plain data: deterministic and without times, so that equal runs give equal bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations, islice
from statistics import fmean, stdev
from typing import Any

from stacklm.config.model import Dense
from stacklm.config.schema import plain
from stacklm.config.train import Train
from stacklm.report.benchmarks import ENOUGH, over_seeds
from stacklm.report.runs import Result, by_model
from stacklm.units import percent

MARGIN = 0.005
"""The relative difference in test bits per byte that is considered negligible, declared before any run."""
SMALLEST_DIFFERENCE = 0.005
"""Nats per token. With fewer than `ENOUGH` seeds smaller differences count as none: two seeds of a model differ by a third."""
MATCHED = 0.05
"""The largest relative difference at which two models count as matched on an axis."""
TRAIN_LOSS_SHARE = 0.05
"""The final fraction of the steps over which the training loss is averaged; the loss of a single batch is mostly noise."""

MOST_NUMBERS = 30
"""Maximum in the headline."""
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
    """Return the facts of every model as means over seeds, the differences from the baseline, and a verdict on each pair.

    The baseline is the first dense model, or the first model if none is dense. Differences are the other model minus the
    baseline, mismatches are relative to the baseline. Verdicts come from `stacklm.lab.statistics`, on test bits per byte.
    """
    from stacklm.lab.statistics import ALPHA  # imports scipy, not needed to show a comparison

    models = by_model(results)
    baseline = next((result for result in results if isinstance(result.model.architecture, Dense)), results[0]).name
    facts = {name: _facts(runs, config, manifest) for name, runs in models.items()}
    others = [name for name in facts if name != baseline]
    comparison = {
        "finding": "",
        "baseline": baseline,
        "best": None,
        "models": facts,
        "differences": {name: _differences(facts[name], facts[baseline]) for name in others},
        "mismatch": {name: _mismatch(facts[name], facts[baseline]) for name in others},
        "pairs": _pairs(facts, [baseline, *others]),
        "provenance": {
            "seeds": [result.seed for result in models[baseline]],
            "margin": MARGIN,
            "alpha": ALPHA,
            "data_sha256": data_sha256,
            "tokenizer_sha256": manifest["tokenizer"],
            "vocab_size": manifest["vocab_size"],
            "splits": {
                split: {unit: sizes[unit] for unit in ("documents", "bytes", "words", "tokens")}
                for split, sizes in manifest["splits"].items()
            },
            "train": {key: value for key, value in plain(config).items() if key != "seed"},
            "models": {name: plain(runs[0].model) for name, runs in models.items()},
        },
    }
    return {**comparison, "finding": _finding(comparison), "best": _best(comparison)}


def unmatched(mismatch: Mapping[str, float]) -> dict[str, float]:
    """Return the axes, in words, on which a model differs from the baseline by more than `MATCHED`."""
    return {MATCH_AXES[axis]: share for axis, share in mismatch.items() if abs(share) > MATCHED}


def caveats(comparison: Mapping[str, Any]) -> list[str]:
    """Return the limitations that apply to every difference."""
    seeds = comparison["provenance"]["seeds"]
    if len(seeds) < ENOUGH:
        limits = [
            f"Every model was trained with {_seeds(len(seeds))}: indicative only. A verdict needs {ENOUGH} seeds.",
            f"Differences below {SMALLEST_DIFFERENCE} nats per token count as none; other seeds may change them by more.",
        ]
    else:
        limits = [
            "Intervals are t intervals over the differences of models trained with the same seed. They apply to other seeds on "
            "this text, not to other texts."
        ]
    return [
        *limits,
        "The comparison is as fair as the tuning: each model's learning rate must have been swept with the same effort.",
        *(_match(comparison["baseline"], name, shares) for name, shares in comparison["mismatch"].items()),
    ]


def headline(comparison: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the main numbers of each model for `dvc metrics`, at most `MOST_NUMBERS` in all; of many models, only the first."""
    models = comparison["models"]
    each = max(1, MOST_NUMBERS // len(models))
    return {name: dict(islice(_ranked(facts), each)) for name, facts in islice(models.items(), MOST_NUMBERS)}


def curve(runs: Sequence[Result]) -> str:
    """Return a CSV for `dvc plots` with a row for each validation after the first step; losses are in nats per token.

    `train_loss` is the mean since the previous row; all values are means over the seeds of a model.
    """
    lines, since = [",".join(CURVE_COLUMNS)], []
    for rows in zip(*(run.metrics for run in runs), strict=True):
        if "train_loss" in rows[0]:
            since.append(fmean(row["train_loss"] for row in rows))
        if "valid_loss" in rows[0] and since:
            row = {column: fmean(row[column] for row in rows) for column in ("valid_loss", "valid_bits_per_byte")}
            row |= {"step": rows[0]["step"], "tokens": rows[0]["tokens"], "train_loss": fmean(since)}
            lines.append(",".join(repr(row[column]) for column in CURVE_COLUMNS))
            since = []
    return "\n".join(lines) + "\n"


def _ranked(facts: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    yield "test_bits_per_byte", facts["test"]["bits_per_byte"]
    yield "valid_bits_per_byte", facts["valid"]["bits_per_byte"]
    yield "test_loss", facts["test"]["loss"]
    for title, figures in facts["benchmarks"].items():
        name, score = next(iter(figures["scores"].items()))
        yield f"{title}_{name}", score["value"]
    yield from ((key, facts[key]) for key in ("total_parameters", "tokens", "training_flops"))


def _match(baseline: str, name: str, mismatch: Mapping[str, float]) -> str:
    off = unmatched(mismatch)
    if not off:
        return f"{name} is matched to {baseline} within {MATCHED:.0%} in parameters, compute and tokens."
    return f"{name} is not matched to {baseline} in {', '.join(f'{axis} ({percent(share)})' for axis, share in off.items())}."


def _facts(runs: Sequence[Result], config: Train, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of one model, as means over its seeds."""
    first = runs[0]
    last, architecture, by_role = first.metrics[-1], first.model.architecture, first.counts.parameters
    bits = {str(run.seed): {split: run.evaluation[split]["bits_per_byte"] for split in SPLITS} for run in runs}
    return {
        "kind": architecture.kind,
        "sequential_depth": architecture.depth(config.context_length),
        "parameters": dict(by_role),
        "body_parameters": sum(number for role, number in by_role.items() if role not in ("embedding", "head")),
        "total_parameters": first.counts.total,
        "forward_flops_per_token": first.counts.forward_flops_per_token,
        "training_flops_per_token": first.counts.training_flops_per_token,
        "tokens": last["tokens"],
        "epochs": last["tokens"] / manifest["splits"]["train"]["tokens"],
        "training_flops": last["flops"],
        "train_loss": fmean(_late_loss(run, config) for run in runs),
        **{split: {measure: _mean(run.evaluation[split][measure] for run in runs) for measure in MEASURES} for split in SPLITS},
        "benchmarks": over_seeds([run.evaluation.get("benchmarks", {}) for run in runs]),
        "seeds": bits,
        "test_sd": stdev(one["test"] for one in bits.values()) if len(runs) > 1 else None,
    }


def _late_loss(run: Result, config: Train) -> float:
    return fmean(row["train_loss"] for row in run.metrics[1:] if row["step"] > config.max_steps * (1 - TRAIN_LOSS_SHARE))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]  # a perplexity that overflows is None
    return fmean(known) if known else None


def _pairs(facts: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return a verdict on every pair: each other model against the baseline, the first of `names`, then among each other."""
    from stacklm.lab.statistics import relative_differences, verdicts

    scores = {name: [row["test"] for row in facts[name]["seeds"].values()] for name in names}
    pairs = [(name, other) for other, name in combinations(names, 2)]
    differences = {(a, b): relative_differences(scores[a], scores[b]) for a, b in pairs}
    if pairs and len(differences[pairs[0]]) < ENOUGH:
        return [{"model": a, "against": b, "mean": float(differences[a, b].mean()), "outcome": None} for a, b in pairs]
    found = verdicts({f"{a} {b}": values for (a, b), values in differences.items()}, MARGIN).values()
    return [
        {"model": a, "against": b, **asdict(one), "more_seeds": one.more_seeds, "differences": differences[a, b].tolist()}
        for (a, b), one in zip(pairs, found, strict=True)
    ]


def _best(comparison: Mapping[str, Any]) -> str | None:
    """Return the model with the fewest test bits per byte, if it is better than the second by verdict or `SMALLEST_DIFFERENCE`."""
    ranked = sorted(comparison["models"], key=lambda name: comparison["models"][name]["test"]["bits_per_byte"])
    if len(ranked) < 2:
        return None
    (pair,) = (pair for pair in comparison["pairs"] if {pair["model"], pair["against"]} == {*ranked[:2]})
    if pair["outcome"]:
        decided = pair["outcome"] == ("better" if pair["model"] == ranked[0] else "worse")
    else:
        first, second = (comparison["models"][name]["test"]["loss"] for name in ranked[:2])
        decided = second - first >= SMALLEST_DIFFERENCE
    return ranked[0] if decided else None


def _differences(other: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    def minus(split: str, measure: str) -> float | None:
        pair = other[split][measure], baseline[split][measure]
        return None if None in pair else pair[0] - pair[1]  # a perplexity that overflows is None

    return {split: {measure: minus(split, measure) for measure in MEASURES} for split in SPLITS}


def _mismatch(other: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, float]:
    return {axis: other[axis] / baseline[axis] - 1 for axis in MATCH_AXES}


def _finding(comparison: Mapping[str, Any]) -> str:
    """Return the test results of every pair and how they were tested, as a paragraph."""
    models, pairs, seeds = comparison["models"], comparison["pairs"], len(comparison["provenance"]["seeds"])
    if not pairs:
        bits = models[comparison["baseline"]]["test"]["bits_per_byte"]
        return (
            f"On the test set {comparison['baseline']} needs {bits:.4f} bits per byte; "
            "no comparison, since only one model was evaluated."
        )
    parts = [_part(comparison, pair) + _price(comparison, pair) for pair in pairs]
    if seeds < ENOUGH:
        return f"On the test set {'; '.join(parts)}. {_seeds(seeds).capitalize()}: indicative only, no verdict."
    tested = "1 pair" if len(pairs) == 1 else f"{len(pairs)} pairs (Holm)"
    return (
        f"On the test set, over {seeds} seeds: {'; '.join(parts)}. Tested: relative differences paired by seed, t intervals, "
        f"error rate {comparison['provenance']['alpha']:.1%} in each direction over {tested}, margin {MARGIN:.1%}."
    )


def _part(comparison: Mapping[str, Any], pair: Mapping[str, Any]) -> str:
    name, other = pair["model"], pair["against"]
    ours, theirs = (comparison["models"][one]["test"] for one in (name, other))
    numbers = f"{ours['bits_per_byte']:.4f} against {theirs['bits_per_byte']:.4f}"
    if not pair["outcome"] and abs(ours["loss"] - theirs["loss"]) < SMALLEST_DIFFERENCE:
        return f"{name} shows no difference from {other} ({numbers} bits per byte)"
    text = f"{name} needs {_more_or_fewer(pair['mean'], digits=1)} bits per byte than {other} ({numbers}"
    if not pair["outcome"]:
        return f"{text})"
    return f"{text}; interval {pair['low']:+.1%} to {pair['high']:+.1%}): {outcome(pair)}"


def outcome(pair: Mapping[str, Any]) -> str:
    """Return the verdict in words; without a verdict, with the number of further seeds that would probably decide."""
    if pair["outcome"] == "not worse":
        return f"not worse than the margin of {pair['margin']:.1%}"
    if pair["outcome"] != "no verdict":
        return pair["outcome"]
    return f"no verdict, {_seeds(pair['more_seeds'])} more would probably decide" if pair["more_seeds"] else "no verdict"


def _seeds(number: int) -> str:
    return "one seed" if number == 1 else f"{number} seeds"


def _price(comparison: Mapping[str, Any], pair: Mapping[str, Any]) -> str:
    """Return the difference in parameters and training FLOPs from the other model, if these are not matched."""
    mismatch = _mismatch(*(comparison["models"][pair[side]] for side in ("model", "against")))
    off = unmatched({axis: mismatch[axis] for axis in ("body_parameters", "training_flops")})
    spent = " and ".join(f"{_more_or_fewer(share, digits=0)} {axis}" for axis, share in off.items())
    return f", with {spent}" if spent else ""


def _more_or_fewer(share: float, digits: int) -> str:
    return f"{abs(share):.{digits}%} {'more' if share > 0 else 'fewer'}"
