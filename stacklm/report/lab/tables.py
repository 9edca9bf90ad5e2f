"""Tables of an experiment as text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

from stacklm.config.schema import listed
from stacklm.lab.findings import Findings
from stacklm.lab.scaling import DepthFit, Scaling
from stacklm.lab.schedule import score
from stacklm.lab.statistics import smallest_detectable
from stacklm.lab.text import arm_rows
from stacklm.report.tables import Table, short
from stacklm.units import count, duration, interval


def verdicts(findings: Findings) -> Table:
    """Return scores, differences, both intervals and verdicts by size."""
    groups = {}
    for size, result in findings.results.items():
        rows = [["baseline", f"{fmean(result.scores['baseline']):.4f}", "", "", "", f"{result.rates['baseline']:.2e}", ""]]
        for name, verdict in result.verdicts.items():
            wider = findings.over_documents(name, size)
            rows.append(
                [
                    name,
                    f"{fmean(result.scores[name]):.4f}",
                    f"{verdict.mean:+.2%}",
                    interval(verdict.low, verdict.high),
                    interval(*wider) if wider else "not recorded",
                    f"{result.rates[name]:.2e}",
                    verdict.outcome,
                ]
            )
        groups[f"size {size:g}, {len(result.seeds)} seeds"] = rows
    columns = ("test bits per byte", "difference", "interval over seeds", "over seeds and documents", "learning rate", "verdict")
    return Table(columns, groups)


def arms(findings: Findings) -> Table:
    """Return the cost of every arm, by size."""
    columns, rows = arm_rows(findings.lab, findings.latency)
    groups: dict[str, list[list[str]]] = {}
    for arm, (name, *cells) in zip(findings.lab.arms, rows, strict=True):
        time = duration(findings.seconds(name, arm.size)) if arm.size in findings.results else "-"
        groups.setdefault(f"size {arm.size:g}", []).append([name, time, *cells])
    return Table(("time per trial", *columns), groups)


def differences(findings: Findings) -> Table:
    """Return the keys in which each candidate differs from the baseline, at the smallest size."""
    smallest = [arm for arm in findings.lab.arms_of(findings.lab.sizes[0]) if arm.changed]
    groups = {
        arm.name: [[key, short(theirs), short(ours)] for key, (theirs, ours) in sorted(arm.changed.items())] for arm in smallest
    }
    return Table(("baseline", "candidate"), groups, prose=True)


def noise(findings: Findings) -> Table:
    """Return the noise over seeds: A/A test of the baseline, effect of pairing, and detectable differences."""
    groups = {}
    for size, result in findings.results.items():
        itself = result.against_itself
        sd, wins = (f"{itself.sd:.3%}", f"{itself.false_wins:.1%}") if itself else ("-", "-")
        rows = [["baseline", f"{result.sigma:.3%}", sd, "-", f"{result.detectable:.2%}", wins]]
        for name, verdict in result.verdicts.items():
            scores, seen = result.scores[name], smallest_detectable(verdict.seeds, verdict.sd, verdict.level)
            own = stdev(scores) / fmean(scores)
            rows.append([name, f"{own:.3%}", f"{verdict.sd:.3%}", f"{result.pairing(name):.2f}", f"{seen:.2%}", ""])
        groups[f"size {size:g}, {len(result.seeds)} seeds"] = rows
    columns = ("sd over seeds", "sd of pairs", "paired / unpaired", "detectable, 80% power", "A/A false positives")
    return Table(columns, groups)


def scaling(found: Scaling) -> Table:
    """Return fitted power laws with intervals, and predicted differences at a larger size."""
    rows = [
        [
            name,
            f"{law.floor:.4f}",
            f"{found.exponents[name].value:.3f}",
            interval(found.exponents[name].low, found.exponents[name].high, ".3f"),
            f"{found.beyond[name].value:+.2%}" if name in found.beyond else "",
            interval(found.beyond[name].low, found.beyond[name].high) if name in found.beyond else "",
        ]
        for name, law in found.laws.items()
    ]
    columns = ("floor", "exponent", "interval", f"difference at {count(found.size)} parameters", "its interval")
    return Table(columns, {"floor + scale * parameters ^ -exponent": rows})


def depth(fit: DepthFit) -> Table:
    """Return the terms of the fit over stacks and parallel layers, and measured and fitted losses by shape."""
    terms = {"floor": fit.floor, "a (of 1 / S)": fit.serial, "b (of 1 / (S N))": fit.parallel}
    rows = [[name, f"{one.value:.4f}", interval(one.low, one.high, "+.4f")] for name, one in terms.items()]
    fitted = fit.at(*zip(*fit.shapes, strict=True))
    means = [
        [f"{S} x {N}", f"{loss:.4f}", f"{fitted[i]:.4f} ({loss / fitted[i] - 1:+.2%})"]
        for i, ((S, N), loss) in enumerate(zip(fit.shapes, fit.losses, strict=True))
    ]
    return Table(("bits per byte", "interval or fit"), {"floor + a / S + b / (S N)": rows, "S x N, mean over seeds": means})


def trials(findings: Findings) -> Table:
    """Return every judging trial, with a prefix of its identity."""
    groups: dict[str, list[list[str]]] = {}
    for planned in findings.lab.done(findings.records):
        record = findings.records[planned.trial.identity]
        if planned.purpose == "judge":
            bits = score(record, "test")
            row = [
                f"{planned.arm.name}, seed {planned.trial.train.seed}",
                f"{bits:.4f}" if math.isfinite(bits) else "diverged",
                duration(record["seconds"]) if "seconds" in record else "-",
                planned.trial.identity[:8],
            ]
            groups.setdefault(f"size {planned.arm.size:g}", []).append(row)
    return Table(("test bits per byte", "time", "trial"), groups)


def provenance(findings: Findings) -> Table:
    """Return the data, code, versions and machines, and the commands that repeat the experiment."""
    own = [findings.records[planned.trial.identity] for planned in findings.lab.done(findings.records)]
    machines = Counter(_machine(record["machine"]) for record in own if "machine" in record)
    began = sorted(record["began"] for record in own if "began" in record)
    experiment = findings.lab.experiment
    rows = [
        ["tokens, SHA-256 of the manifest", findings.lab.data or "not started"],
        ["code, SHA-256 of everything that a trial can execute", findings.lab.code],
        ["seeds", f"tuned with {listed(experiment.seeds.tune)}, judged with {listed(experiment.seeds.judge)}"],
        ["trials", f"{len(own)}, {duration(sum(record.get('seconds', 0) for record in own))} of training in total"],
        *([["trained", f"{began[0]} to {began[-1]}"]] if began else []),
        *([f"machine of {number} trials", machine] for machine, number in machines.items()),
        *([["machine of decoding", _machine(findings.latency.machine)]] if findings.latency else []),
        ["train", ", ".join(f"{key} {short(value)}" for key, value in (experiment.train or {}).items()) or "as in params.yaml"],
    ]
    commands = [
        ["run or resume", f"stacklm run-flow lab {findings.name}"],
        ["write this report again, without training", f"stacklm lab show {findings.name}"],
        ["repeat one trial and compare it with its record", f"stacklm verify {findings.name} TRIAL"],
    ]
    return Table(("",), {"Origin": rows, "Commands": commands}, prose=True)


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ("kernels", "python", "torch", "numpy")
    return ", ".join(f"{name} {value}" if name in versions else str(value) for name, value in machine.items())
