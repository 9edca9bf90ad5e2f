"""The report of an experiment as index.html and as Markdown, with the verdict first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stacklm.config.schema import listed
from stacklm.lab.diagnostics import DRAWS, Correlation
from stacklm.lab.findings import Findings
from stacklm.lab.statistics import ALPHA
from stacklm.lab.text import coverage, sentence
from stacklm.report.lab import plots, tables
from stacklm.report.page import Card, Report, Section, write_report
from stacklm.report.tables import Table
from stacklm.units import interval

INTERVALS = (
    "Dots are means over seeds, thick lines t intervals over seeds, on which the verdict is based; ticks above are single seeds. "
    "Thin lines are bootstrap intervals over seeds and documents, for other text of the same kind; with few seeds they are too "
    "narrow. Left of zero is better; an interval that ends within the grey band is not worse by the margin."
)
BUDGETS = (
    "Means over the judging seeds; bars and bands are one standard deviation. Times were measured on the machines listed below."
)
RATES = (
    "Means over the tuning seeds on the valid set. The star is the minimum of the parabola through the best three rates: the "
    "learning rate used for judging. All arms had the same number of trials."
)
NOISE = (
    "Relative standard deviations over seeds, and of the differences of pairs with the same seed, and the ratio of paired to "
    "unpaired: below 1, pairing helps. Detectable: the smallest difference detected with 80% power, for the baseline without "
    "pairing, for a candidate with pairing. A/A false positives: how often the test finds a winner between two halves of the "
    "baseline's own seeds, over all sign flips (at least 4 seeds); 5% are expected, and with few seeds the share is coarse."
)


SCALING = (
    "A power law through all sizes (dotted above), by least squares; intervals by a bootstrap over seeds. The last columns "
    "predict the difference at four times the largest size: a gain that shrinks to zero does not scale."
)
DEPTH = (
    "The effect of S serial stacks and N parallel layers in each at one budget, by least squares over the stacked arms (dotted). "
    "With b alone, only the total number of layers matters; with a alone, only depth does. Intervals are t intervals over seeds "
    "and do not include the error of the formula, whose root-mean-square residual is {}."
)
DECODING = (
    "Decoding: time of the last of {context:,} tokens of one sequence, on one CPU thread of the machine listed below, measured "
    "on {measured}; median and quartiles of {rounds} rounds, with arms interleaved."
)


def write(findings: Findings, folder: Path) -> None:
    """Write a self-contained index.html, and Markdown with its plots; equal records give equal bytes."""
    write_report(report(findings, folder), folder)


def report(findings: Findings, folder: Path) -> Report:
    """Return the report of an experiment so far; its plots are written to `folder`."""
    sections = list(_sections(findings, folder))
    return Report(findings.lab.experiment.question, finding(findings), _cards(findings), list(_notes(findings)), sections)


def _sections(findings: Findings, folder: Path) -> Iterator[Section]:
    judged = bool(findings.results)
    if judged and findings.candidates:
        drawn = [plots.draw_candidates(findings, folder)]
        yield Section("Differences", INTERVALS, figures=drawn, tables=[tables.verdicts(findings)])
    if judged:
        axes = [axis for axis in plots.BUDGETS if plots.differs(findings, axis)]
        equal = [title for axis, (title, _) in plots.BUDGETS.items() if axis not in axes]
        note = f"{BUDGETS} Equal within {plots.EQUAL:.0%} for all, and not plotted: {', '.join(equal)}." if equal else BUDGETS
        yield Section("Loss against the budgets", note, figures=[plots.draw_budget(findings, axis, folder) for axis in axes])
    if found := findings.scaling:
        yield Section("Scaling", SCALING, tables=[tables.scaling(found)])
    if fit := findings.depth_fit:
        note, drawn = DEPTH.format(f"{fit.residual:.2%}"), [plots.draw_depth(findings, fit, folder)]
        yield Section("Depth and parallel layers", note, figures=drawn, tables=[tables.depth(fit)])
    tuned = [size for size, tuning in findings.tunings.items() if any(tuning.scores.values())]
    yield Section("Learning rates", RATES, figures=[plots.draw_rates(findings, size, folder) for size in tuned])
    if judged:
        yield Section("Noise over seeds", NOISE, tables=[tables.noise(findings)])
    note = DECODING.format(**vars(findings.latency)) if findings.latency else ""
    yield Section("Arms", note, tables=[tables.arms(findings)])
    yield Section(
        "Differences between arms",
        "At the smallest size; other sizes differ only in their widths.",
        tables=[tables.differences(findings)],
    )
    yield Section("Data, code, versions and machines", tables=[tables.provenance(findings)])
    if judged:
        yield Section("Trials", tables=[tables.trials(findings)])


def finding(findings: Findings) -> str:
    """Return one sentence per candidate, at the largest size judged."""
    if findings.final is None:
        return "Not judged yet: at least 3 seeds of all arms are needed."
    return " ".join(f"{sentence(name, verdict)}." for name, verdict in findings.final.verdicts.items())


def _cards(findings: Findings) -> list[Card]:
    if findings.final is None:
        return []
    return [
        Card(
            name,
            f"{verdict.mean:+.2%}",
            "test bits per byte against the baseline",
            f"{interval(verdict.low, verdict.high)} over {verdict.seeds} seeds: {verdict.outcome}",
        )
        for name, verdict in findings.final.verdicts.items()
    ]


def _notes(findings: Findings) -> Iterator[str]:
    experiment, looks = findings.lab.experiment, findings.lab.experiment.seeds.looks
    yield f"Refuted by: {experiment.refuted_by}."
    yield f"Held equal: {experiment.budget.replace('_', ' ')}. Margin: {experiment.margin:.2%} of test bits per byte."
    if findings.final:
        declared = f"Looks were declared at {listed(looks)} seeds; the error rate is over all of them. " if looks else ""
        yield f"{declared}Intervals: {coverage(findings.final)}."
    if missing := [f"{size:g}" for size in findings.lab.sizes if size not in findings.results]:
        yield f"Sizes not judged yet: {', '.join(missing)}."
    if pending := findings.lab.pending(findings.records):
        yield f"{len(pending)} trials still to run; results may change."
    for size, result in findings.results.items():
        if result.left_out:
            yield f"Size {size:g}: seeds {listed(result.left_out)} are excluded, because an arm failed with them."
    yield from (f"{arm.warning}." for arm in findings.lab.arms if arm.warning)


def write_ranks(found: Correlation, text: str, probe: str, folder: Path) -> None:
    """Write how well a synthetic task ranks the arms of an experiment on text, as index.html and Markdown in a folder."""
    notes = [
        "Spearman's rho between test accuracy on the synthetic task and bits per byte on the test set; +1 means the same ranking.",
        f"The {1 - 2 * ALPHA:.0%} interval is from a bootstrap over arms and the seeds of each, p from permutations of the arms, "
        f"{DRAWS:,} draws each.",
        "A high correlation only means that the task may predict results on text for architectures like these.",
    ]
    means = [(name, found.accuracy[i].mean(), found.bits[i].mean()) for i, name in enumerate(found.arms)]
    rows = [[name, f"{accuracy:.1%}", f"{bits:.4f}"] for name, accuracy, bits in sorted(means, key=lambda row: row[2])]
    table = Table(["test accuracy", "test bits per byte"], {"Best first": rows})
    arms = Section("Arms", figures=[plots.draw_ranks(found, folder)], tables=[table])
    write_report(Report(f"Does {probe} predict {text}?", f"{str(found).capitalize()}.", [], notes, [arms]), folder)
