"""Tables of the comparison as text: those of the report, and the summary for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from stacklm.config.model import Architecture, Dense, FactoredAttention, HuggingFace, PublishedAttention, Python, Stacked
from stacklm.config.schema import flatten, listed
from stacklm.console import table
from stacklm.report.benchmarks import PUBLISHED
from stacklm.report.comparison import MATCH_AXES, MATCHED, outcome
from stacklm.report.runs import Result, by_model
from stacklm.units import count, duration, interval, percent, plural, quantity, signed

NOT_MEASURED = "not measured"
_ROLES = {
    "embedding": "embedding",
    "matrix": "matrices of the body",
    "vector": "vectors of the body (gains, biases)",
    "head": "output head",
}


@dataclass(frozen=True)
class Table:
    """The columns after the first, and groups of rows; a row is its label and one cell per column.

    With `prose`, cells hold text, which may be long, rather than numbers.
    """

    columns: Sequence[str]
    groups: Mapping[str, Sequence[Sequence[str]]]
    prose: bool = False


def summary(comparison: Mapping[str, Any], report: Path) -> str:
    """Return the findings and where the report is: `comparison` as in comparison.json, `report` the folder of the page."""
    return f"{findings(comparison)}\n\n{where(report)}"


def where(report: Path) -> str:
    """Return where to read the report and browse the experiments."""
    return f"read the report:         {report / 'index.html'}\nbrowse the experiments:  stacklm ui   (the MLflow UI)"


def findings(comparison: Mapping[str, Any]) -> str:
    """Return a table with one row per model, and the finding in words."""
    columns = ("model", "parameters", "body", "forward/token", "tokens", "valid bits/byte", "test bits/byte")
    rows = [
        (
            name,
            count(facts["total_parameters"]),
            count(facts["body_parameters"]),
            quantity(facts["forward_flops_per_token"], "FLOP"),
            count(facts["tokens"]),
            f"{facts['valid']['bits_per_byte']:.4f}",
            f"{facts['test']['bits_per_byte']:.4f}{_spread(facts)}",
        )
        for name, facts in comparison["models"].items()
    ]
    scored = {name: facts["benchmarks"] for name, facts in comparison["models"].items() if facts["benchmarks"]}
    parts = [table(columns, rows), *([benchmark_text(scored)] if scored else []), comparison["finding"]]
    return "\n\n".join(parts)


def _spread(facts: Mapping[str, Any]) -> str:
    return "" if facts["test_sd"] is None else f" ± {facts['test_sd']:.4f}"


def describe(architecture: Architecture) -> str:
    """Return the architecture of a model in one line."""
    if isinstance(architecture, (Python, HuggingFace)):
        place = f"{architecture.class_} from {architecture.path}" if isinstance(architecture, Python) else architecture.config
        return f"{place}{''.join(f', {name} {value}' for name, value in architecture.settings.items())}"
    if isinstance(architecture, Dense):
        shape = f"{plural(architecture.n_layers, 'dense layer')} of width {architecture.d_model}"
        tied = ", tied head" if architecture.tie_embeddings else ""
        hidden = f"feed-forward {architecture.d_ff} ({architecture.ffn})"
        return f"{shape}, {plural(architecture.n_heads, 'head')}, {hidden}{tied}"
    shape = " + ".join(f"{stack.layers} x {stack.features}" for stack in architecture.stacks)
    stacks = f"{plural(len(architecture.stacks), 'stack')} of {shape} (parallel layers x features per layer)"
    changed = "".join(f", {setting}" for setting in _changed(architecture))
    return f"{stacks}, width {architecture.d_model}, {plural(architecture.n_heads, 'head')} per layer{changed}"


def _changed(settings: Stacked | PublishedAttention | FactoredAttention) -> list[str]:
    """Return the settings of a stacked model that differ from their defaults, such as `residual: true`."""
    found = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.default in (MISSING, value):
            continue
        if hasattr(value, "kind"):
            found += [f"{value.kind} {field.name}", *_changed(value)]
        else:
            found.append(f"{field.name}: {str(value).lower()}")
    return found


def results(comparison: Mapping[str, Any]) -> Table:
    """Return all results except times and memory, with one column per model."""
    facts = list(comparison["models"].values())
    roles = [role for role in _ROLES if any(fact["parameters"].get(role) for fact in facts)]

    def row(label: str, cell: Any) -> list[str]:
        return [label, *map(cell, facts)]

    return Table(
        columns=list(comparison["models"]),
        groups={
            "Quality, lower is better": [
                row("test, bits per byte (± sd over seeds)", lambda f: f"{f['test']['bits_per_byte']:.4f}{_spread(f)}"),
                row("valid, bits per byte", lambda f: f"{f['valid']['bits_per_byte']:.4f}"),
                row("test, perplexity per word", lambda f: _perplexity(f["test"]["word_perplexity"])),
                row("valid, perplexity per word", lambda f: _perplexity(f["valid"]["word_perplexity"])),
                row("test, loss (nats per token)", lambda f: f"{f['test']['loss']:.4f}"),
                row("valid, loss (nats per token)", lambda f: f"{f['valid']['loss']:.4f}"),
                row("final training loss", lambda f: f"{f['train_loss']:.4f}"),
            ],
            "Parameters": [
                *(row(_ROLES[role], lambda f, role=role: count(f["parameters"].get(role, 0))) for role in roles),
                row("body (all but embedding and head)", lambda f: count(f["body_parameters"])),
                row("total", lambda f: count(f["total_parameters"])),
            ],
            "Compute": [
                row("serial depth (stacks or layers)", lambda f: str(f["sequential_depth"] or "-")),
                row("forward pass", lambda f: quantity(f["forward_flops_per_token"], "FLOP/token")),
                row("training", lambda f: quantity(f["training_flops_per_token"], "FLOP/token")),
                row("training, in total", lambda f: quantity(f["training_flops"], "FLOP")),
                row("training tokens", lambda f: count(f["tokens"])),
                row("epochs", lambda f: f"{f['epochs']:.2f}"),
            ],
        },
    )


def speeds(results: Sequence[Result]) -> Table:
    """Return times and memory of one training run on this machine, one column per model: mean over seeds, or highest peak."""
    timed = {name: [run for run in runs if run.timing] for name, runs in by_model(results).items()}

    def row(label: str, cell: Callable[[list[Result]], str]) -> list[str]:
        return [label, *(cell(runs) if runs else NOT_MEASURED for runs in timed.values())]

    def peak(runs: list[Result], key: str) -> str:
        most = max(one.get(key, 0) for run in runs for one in run.timing)
        return quantity(most, "B") if most else NOT_MEASURED

    rows = [
        row("training time", lambda runs: duration(fmean(run.timing[-1]["seconds"] for run in runs))),
        row("tokens per second", lambda runs: count(fmean(run.metrics[-1]["tokens"] / run.timing[-1]["seconds"] for run in runs))),
        row("peak memory", lambda runs: peak(runs, "peak_memory_bytes")),
    ]
    if any("gpu_memory_bytes" in one for runs in timed.values() for run in runs for one in run.timing):
        rows.append(row("peak GPU memory", lambda runs: peak(runs, "gpu_memory_bytes")))
    return Table(columns=list(timed), groups={"Speed on this machine": rows})


def verdicts(comparison: Mapping[str, Any]) -> Table:
    """Return the verdict on each pair of models: relative differences in test bits per byte, lower is better."""
    rows = [
        [
            f"{pair['model']} against {pair['against']}",
            f"{pair['mean']:+.2%}",
            interval(pair["low"], pair["high"]),
            f"{pair['sd']:.2%}",
            outcome(pair),
        ]
        for pair in comparison["pairs"]
    ]
    seeds = f"Over {len(comparison['provenance']['seeds'])} seeds, margin {comparison['provenance']['margin']:.1%}"
    return Table(columns=["difference", "interval", "sd of differences", "verdict"], groups={seeds: rows})


def benchmark_text(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Return benchmark scores by model, as from `over_seeds`, above published scores of the same kinds, for a terminal."""
    made = [benchmarks(models), published(models)]
    return "\n\n".join(
        table(
            ["benchmark", *one.columns],
            [row for rows in one.groups.values() for row in rows],
            left=1 + one.prose * len(one.columns),
        )
        for one in made
        if any(one.groups.values())
    )


def benchmarks(models: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return benchmark scores by model, each with its interval, and chance accuracy."""
    groups: dict[str, list[list[str]]] = {}
    for title, first in next(iter(models.values())).items():
        over = f"intervals over {first['over']}" if first["over"] else "two seeds give no interval"
        rows = groups[f"{title}: {first['items']:,} {first['unit']}; {over}"] = []
        for score in first["scores"]:
            cells = [_scored(score, figures[title]["scores"][score]) for figures in models.values()]
            chance = f"{first['chance']:.1%}" if first["chance"] and score.startswith("accuracy") else "-"
            rows.append([f"{title}, {score.replace('_', ' ')}", *cells, chance])
        if first["ties"] is not None:
            rows.append([f"{title}, ties", *(f"{figures[title]['ties']:.4g}" for figures in models.values()), "-"])
    return Table(columns=[*models, "chance"], groups=groups)


def benchmark_sets(models: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the accuracy on each set of pairs by model."""
    return Table(
        columns=list(models),
        groups={
            f"{title}, by set": [
                [name, *(f"{figures[title]['sets'][name]:.1%}" for figures in models.values())] for name in first["sets"]
            ]
            for title, first in next(iter(models.values())).items()
            if first["sets"]
        },
    )


def published(models: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return published scores on the kinds of benchmarks that were scored."""
    kinds = {figures["kind"] for figures in next(iter(models.values())).values()}
    rows = [
        [f"{one.kind}, {one.score.replace('_', ' ')}", _figure(one.score, one.value), one.model, one.trained_on, one.source]
        for one in PUBLISHED
        if one.kind in kinds
    ]
    return Table(
        columns=["published", "model", "trained on", "source"], groups={"Published scores of other models": rows}, prose=True
    )


def _scored(score: str, figures: Mapping[str, Any]) -> str:
    value, *ends = (None if figures[end] is None else _figure(score, figures[end]) for end in ("value", "low", "high"))
    return f"{value}" if None in ends else f"{value} ({' to '.join(map(str, ends))})"


def _figure(score: str, value: float) -> str:
    return f"{value:.1%}" if score.startswith("accuracy") else f"{value:.4f}" if score == "bits_per_byte" else _perplexity(value)


def matching(comparison: Mapping[str, Any]) -> Table:
    """Return the relative difference of each model from the baseline on the axes of a fair comparison."""
    mismatch = comparison["mismatch"]
    rows = [[label, *(_matched(shares[axis]) for shares in mismatch.values())] for axis, label in MATCH_AXES.items()]
    return Table(columns=list(mismatch), groups={f"Relative to {comparison['baseline']}": rows})


def differences(comparison: Mapping[str, Any]) -> Table:
    """Return the difference of each model from the baseline: worse (+) or better (−)."""
    labels = {"bits_per_byte": "bits per byte", "loss": "loss (nats per token)"}
    others = comparison["differences"]
    rows = [
        [f"{split}, {label}", *(signed(other[split][key], digits=4) for other in others.values())]
        for key, label in labels.items()
        for split in ("test", "valid")
    ]
    return Table(columns=list(others), groups={f"Difference from {comparison['baseline']}; negative is better": rows})


def provenance(comparison: Mapping[str, Any]) -> Table:
    """Return the seeds, data, hashes and training settings."""
    origin = comparison["provenance"]
    rows = [["seeds", listed(origin["seeds"])]]
    rows += [
        [f"{split} text", f"{quantity(s['bytes'], 'B')}, {count(s['documents'])} documents, {count(s['tokens'])} tokens"]
        for split, s in origin["splits"].items()
    ]
    rows += [
        ["vocabulary", f"{origin['vocab_size']:,} tokens"],
        ["data, SHA-256 of the manifest", origin["data_sha256"]],
        ["tokenizer, SHA-256", origin["tokenizer_sha256"]],
    ]
    settings = [[key, f"{value:,}" if type(value) is int else str(value)] for key, value in origin["train"].items()]
    groups = {"Data": rows, "Training settings, the same for every model": settings}
    return Table(columns=[""], groups=groups, prose=True)


def optimizers(comparison: Mapping[str, Any]) -> Table:
    """Return the optimizer settings, one column per model; a dash if its kind of optimizer lacks the setting."""
    settings = {name: flatten(model["optimizer"]) for name, model in comparison["provenance"]["models"].items()}
    keys = dict.fromkeys(key for one in settings.values() for key in one)
    rows = [[key, *(short(one.get(key, "-")) for one in settings.values())] for key in keys]
    return Table(columns=list(settings), groups={"Optimizer": rows})


def short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _matched(share: float) -> str:
    return f"{percent(share)}{'' if abs(share) <= MATCHED else ', not matched'}"


def _perplexity(value: float | None) -> str:
    if value is None:
        return "too large"
    return f"{value:,.1f}" if value < 1e6 else f"{value:.2e}"
