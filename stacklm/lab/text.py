"""Plan, status and results of an experiment, as text for a terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from stacklm.config.schema import listed
from stacklm.console import table
from stacklm.lab.diagnostics import diagnostics
from stacklm.lab.findings import Findings
from stacklm.lab.scaling import DepthFit
from stacklm.lab.schedule import Lab, Planned, Records, Result
from stacklm.lab.speed import Latency, Timing
from stacklm.lab.statistics import ALPHA, Verdict, seeds_needed, smallest_detectable
from stacklm.units import duration, interval, plural

SIGMA = 0.01
"""Relative sd of bits per byte over seeds, used until one is measured: that of short runs of models with half a million parameters
(experiments/default: 1.0%, experiments/aa: 0.7%). It falls with size and length: 0.05% for 124M parameters in public records."""


def arms_table(lab: Lab, latency: Latency | None = None) -> str:
    """The table of `arm_rows` for every arm at every size, then a warning for each arm that misses the budget."""
    columns, rows = arm_rows(lab, latency)
    sized = [[name, f"{arm.size:g}", *cells] for arm, (name, *cells) in zip(lab.arms, rows, strict=True)]
    warnings = [f"warning: {arm.warning}" for arm in lab.arms if arm.warning]
    return "\n".join([table(["arm", "size", *columns], sized), *warnings])


def arm_rows(lab: Lab, latency: Latency | None) -> tuple[list[str], list[list[str]]]:
    """The column names and one row per arm: its name, its costs, and their differences from the baseline of the same size."""
    facts = ["parameters", "training_flops", "tokens", "depth", "kv_bytes"]
    columns = ["parameters", "training FLOPs", "tokens", "depth", "KV bytes per token"]
    rows = []
    for arm in lab.arms:
        baseline = next(one for one in lab.arms_of(arm.size) if one.name == "baseline")
        rows.append([arm.name, *(_against(fact, getattr(arm.cost, fact), getattr(baseline.cost, fact)) for fact in facts)])
        if latency:
            ours, theirs = latency.of(arm), latency.of(baseline)
            against = f" ({ours.median / theirs.median - 1:+.0%})" if ours and theirs and arm is not baseline else ""
            rows[-1].append(milliseconds(ours) + against)
    return columns + ["decoding time per token"] * bool(latency), rows


def milliseconds(timing: Timing | None) -> str:
    """The median with its quartiles, such as `1.20 [1.18, 1.31] ms`."""
    return "{:.2f} [{:.2f}, {:.2f}] ms".format(*(1000 * seconds for seconds in timing)) if timing else "-"


def _against(fact: str, ours: float | None, theirs: float | None) -> str:
    if ours is None:
        return "-"
    shown = f"{ours:.3g}" if fact == "training_flops" else f"{ours:,}"
    return shown if theirs in (None, ours) else f"{shown} ({ours / theirs - 1:+.2%})"


def differences_table(lab: Lab) -> str:
    """The diff of the resolved settings: each key in which a candidate differs from the baseline of the same size."""
    rows = [
        (arm.name, f"{arm.size:g}", key, f"{ours}", f"{theirs}") for arm in lab.arms for key, (theirs, ours) in arm.changed.items()
    ]
    if not rows:
        return "no candidates: an A/A test of the baseline"
    return table(("candidate", "size", "key", "candidate's", "baseline's"), rows, left=3)


def plan_text(lab: Lab, records: Records, workers: int, latency: Latency | None = None) -> str:
    """The arms, number of trials, time and smallest detectable difference of the experiment, before it runs."""
    experiment, arms = lab.experiment, len(lab.arms)
    tune = arms * experiment.rates * len(experiment.seeds.tune)
    judge = arms * len(experiment.seeds.judge)
    each = f"{experiment.rates} learning rates each, more if the best is at an edge"
    tuning = f"{tune} for tuning ({each})" if tune else "none for tuning"
    seeds, margin = len(experiment.seeds.judge), experiment.margin
    sigma, source = measured_sigma(lab, records)
    sd = math.sqrt(2) * sigma
    needed = seeds_needed(margin, sd)
    lines = [
        f"question: {experiment.question}",
        f"refuted by: {experiment.refuted_by}",
        "",
        arms_table(lab, latency),
        f"held equal: {experiment.budget}" + (", using speeds measured at the start" if experiment.budget == "seconds" else ""),
        "",
        f"trials: {tuning}, {judge} for judging",
        f"time: {time_left(lab, records, workers)}",
        f"margin: {margin:.2%}; {seeds} seeds detect differences of {smallest_detectable(seeds, sd):.2%} with 80% power ({source})",
        f"needed to show that equal arms are within the margin: {f'{needed} seeds' if needed else 'more than 1,000 seeds'}",
    ]
    return "\n".join(lines)


def status_text(lab: Lab, records: Records, workers: int) -> str:
    """The trials that are done, diverged and pending, and the time left."""
    pending = lab.pending(records)
    done = lab.done(records)
    diverged = [planned.name for planned in done if "failed" in records[planned.trial.identity]]
    lines = [f"done: {plural(len(done), 'trial')}", *(f"  diverged: {name}" for name in diverged), f"to run now: {len(pending)}"]
    lines += [f"  next: {planned.name} ({planned.purpose})" for planned in pending[:3]]
    if pending:
        lines.append(f"time left: {time_left(lab, records, workers)}")
    return "\n".join(lines)


def result_text(findings: Findings) -> str:
    """The verdicts so far for each size, and the fit over depth and parallel layers if there is one."""
    found = {size: findings.results.get(size) for size in findings.lab.sizes}
    texts = [
        _result(findings, result) if result else f"size {size:g}: not judged yet; at least 3 seeds of all arms are needed"
        for size, result in found.items()
    ]
    return "\n\n".join([*texts, *([depth_text(findings.depth_fit)] if findings.depth_fit else [])])


def depth_text(fit: DepthFit) -> str:
    """The fit over stacks and parallel layers, with intervals and residual."""
    a, b, floor = (f"{one.value:.4f} ({interval(one.low, one.high, '+.4f')})" for one in (fit.serial, fit.parallel, fit.floor))
    return (
        f"over {len(fit.shapes)} shapes of S stacks of N layers, bits per byte = floor + a / S + b / (S N): "
        f"a {a}, b {b}, floor {floor}; residual {fit.residual:.2%} (root mean square, relative to the mean)"
    )


def _result(findings: Findings, result: Result) -> str:
    lab = findings.lab
    if lab.experiment.probe:
        return diagnostics(findings, result.size)
    cells = {name: (f"{one.mean:+.2%}", interval(one.low, one.high), one.outcome) for name, one in result.verdicts.items()}
    rows = [
        (
            name,
            f"{result.rates[name]:.2e}",
            f"{statistics.mean(scores):.4f}",
            *cells.get(name, ("", "", "baseline")),
        )
        for name, scores in result.scores.items()
    ]
    speed = flops_per_second(lab, findings.records)
    flops = sum(arm.cost.training_flops for arm in lab.arms_of(result.size))
    seconds = flops / speed if speed else None
    columns = ("arm", "learning rate", "test bits per byte", "difference", "interval", "verdict")
    lines = [
        f"size {result.size:g}: {len(result.seeds)} seeds, margin {lab.experiment.margin:.2%}, {coverage(result)} intervals",
        table(columns, rows),
        *(sentence(name, verdict, seconds) for name, verdict in result.verdicts.items()),
        f"baseline: sd over seeds {result.sigma:.2%}; smallest difference that these seeds detect: {result.detectable:.2%}",
    ]
    if itself := result.against_itself:
        lines.append(
            f"A/A test of the baseline: {itself.pairs} random pairs of its seeds, sd of differences {itself.sd:.2%}; "
            f"a winner in {itself.false_wins:.1%} of the shuffles ({2 * ALPHA:.0%} expected)"
        )
    if result.left_out:
        lines.append(f"seeds {listed(result.left_out)} excluded, because an arm failed with them")
    return "\n".join(lines)


def short_text(findings: Findings) -> str:
    """The question, and one sentence per candidate with its verdict at the largest size judged."""
    experiment, result = findings.lab.experiment, findings.final
    if result is None:
        found = [f"not judged yet; {plural(len(findings.lab.done(findings.records)), 'trial')} done"]
    elif experiment.probe:
        found = ["a synthetic task; no verdict is based on it"]
    else:
        found = [sentence(name, verdict) for name, verdict in result.verdicts.items()]
        found = found or [f"A/A test of the baseline: sd over seeds {result.sigma:.2%}"]
    return "\n".join([experiment.question, *(f"  {line}" for line in found)])


def coverage(result: Result) -> str:
    """The coverage of the intervals: above 95% if there are several candidates or looks."""
    levels = sorted({verdict.level for verdict in result.verdicts.values()} or {ALPHA})
    return " to ".join(f"{100 * (1 - 2 * level):.3g}%" for level in {levels[-1]: 0, levels[0]: 0})


def sentence(name: str, verdict: Verdict, seconds: float | None = None) -> str:
    """The result for one candidate in one sentence, such as `stacked: 0.4% better (-0.7% to -0.1%): better`."""
    mean = f"{abs(verdict.mean):.2%} {'better' if verdict.mean < 0 else 'worse'}"
    text = f"{name}: {mean} ({interval(verdict.low, verdict.high)}): {verdict.outcome}"
    if verdict.outcome == "not worse":
        return f"{text} than the margin of {verdict.margin:.2%}"
    if verdict.outcome != "no verdict":
        return text
    if verdict.more_seeds is None:
        return f"{text}; more seeds are unlikely to decide"
    time = f", about {duration(verdict.more_seeds * seconds)}" if seconds else ""
    return f"{text}; {plural(verdict.more_seeds, 'more seed')} would probably decide{time}"


def measured_sigma(lab: Lab, records: Records) -> tuple[float, str]:
    """The baseline's relative sd over seeds at the largest size judged, and the source of that number."""
    for size in reversed(lab.sizes):
        if result := lab.result(records, size):
            return result.sigma, f"sd over seeds {result.sigma:.2%}, measured at size {size:g}"
    return SIGMA, f"sd over seeds {SIGMA:.2%}, assumed until it is measured"


def flops_per_second(lab: Lab, records: Records) -> float | None:
    """Median training FLOPs per second of one of the experiment's trials; None before the first."""
    own = [records[planned.trial.identity] for planned in lab.done(records)]
    speeds = [record["flops"] / record["seconds"] for record in own if record.get("seconds")]
    return statistics.median(speeds) if speeds else None


def time_left(lab: Lab, records: Records, workers: int) -> str:
    """The time for the remaining trials with `workers` of them in parallel."""
    flops, speed = lab.flops_to_come(records), flops_per_second(lab, records)
    if not flops:
        return "all trials are done"
    if speed is None:
        return "unknown until the first trial has run"
    return f"about {duration(flops / speed / workers)} with {workers} in parallel"


def shown(planned: Planned, record: Mapping[str, Any], done: int, left: int) -> str:
    """One line about a finished trial."""
    if "failed" in record:
        return f"{planned.name}: {record['failed']} ({done} done, {left} pending)"
    split = "valid" if planned.purpose == "tune" else "test"
    scores = record[split]
    found = (
        f"{scores['accuracy']:.1%} {split} accuracy"
        if "accuracy" in scores
        else f"{scores['bits_per_byte']:.4f} {split} bits per byte"
    )
    return f"{planned.name}: {found}, {duration(record['seconds'])} ({done} done, {left} pending)"
