"""The report of an experiment, verdict first, as index.html and as Markdown."""

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
    "Dots are means over seeds, thick lines t intervals over seeds, on which the verdict rests; ticks above are single seeds. "
    "Thin lines are bootstrap intervals over seeds and documents, which say what to expect on other text of the same kind; with "
    "few seeds they are too narrow. Left of zero is better; an interval that ends within the grey band is not worse by the margin."
)
BUDGETS = "Means over the judging seeds; bars and bands are one standard deviation. Times are of the machines named below."
RATES = (
    "Mean over the tuning seeds on the valid set. The star is the minimum of the parabola through the best three, the learning "
    "rate with which the arm was judged. All arms had equally many trials."
)
NOISE = (
    "Relative standard deviations over seeds, and of the differences of pairs with the same seed; below 1, pairing has helped. The "
    "smallest difference that these seeds see with 80% power: of the baseline's row without pairs, of a candidate's with them. "
    "Wins by chance: how often the test would find a winner between two halves of the baseline's own seeds, over all flips of "
    "their signs; 5% are expected, and few seeds allow coarse steps alone (from 4 seeds on)."
)


SCALING = (
    "A power law through all sizes (dotted above), by least squares; intervals by a bootstrap over seeds. The last columns say "
    "what is left of the difference at four times the largest size: a gain that shrinks to zero is not one."
)
DEPTH = (
    "What S serial stacks and N parallel layers in each do at one budget, by least squares over the stacked arms (dotted). "
    "With b alone layers would average, wherever they are; with a alone only depth counts. Intervals are t intervals over "
    "seeds; that the form may be wrong is not in them: it misses the means by {}, root mean square."
)
DECODING = (
    "Decoding: the last token of {context:,} of one sequence, on one CPU thread of the machine named below, {measured}; median and "
    "quartiles of {rounds} rounds in which all arms took turns."
)


def write(findings: Findings, folder: Path) -> None:
    """Write index.html, which needs no other file, and the Markdown with drawings beside it; equal records give equal bytes."""
    write_report(report(findings, folder), folder)


def report(findings: Findings, folder: Path) -> Report:
    """What an experiment found so far; its drawings are written to `folder`."""
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
        note = f"{BUDGETS} Equal within {plots.EQUAL:.0%} for all, and not drawn: {', '.join(equal)}." if equal else BUDGETS
        yield Section("Loss against the budgets", note, figures=[plots.draw_budget(findings, axis, folder) for axis in axes])
    if found := findings.scaling:
        yield Section("Scaling", SCALING, tables=[tables.scaling(found)])
    if fit := findings.depth_fit:
        note, drawn = DEPTH.format(f"{fit.residual:.2%}"), [plots.draw_depth(findings, fit, folder)]
        yield Section("Depth and parallel layers", note, figures=drawn, tables=[tables.depth(fit)])
    tuned = [size for size, tuning in findings.tunings.items() if any(tuning.scores.values())]
    yield Section("Learning rates", RATES, figures=[plots.draw_rates(findings, size, folder) for size in tuned])
    if judged:
        yield Section("What seeds alone do", NOISE, tables=[tables.noise(findings)])
    note = DECODING.format(**vars(findings.latency)) if findings.latency else ""
    yield Section("Arms", note, tables=[tables.arms(findings)])
    yield Section(
        "What differs", "At the smallest size; other sizes differ in widths alone.", tables=[tables.differences(findings)]
    )
    yield Section("How it was made", tables=[tables.provenance(findings)])
    if judged:
        yield Section("Trials", tables=[tables.trials(findings)])


def finding(findings: Findings) -> str:
    """One sentence per candidate, at the largest size judged."""
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
        yield f"{len(pending)} trials are still to run; figures may change."
    for size, result in findings.results.items():
        if result.left_out:
            yield f"Size {size:g}: seeds {listed(result.left_out)} are left out, with which an arm failed."
    yield from (f"{arm.warning}." for arm in findings.lab.arms if arm.warning)


def write_ranks(found: Correlation, text: str, probe: str, folder: Path) -> None:
    """How well a synthetic task ranks the arms of an experiment on text, as index.html and Markdown in a folder."""
    notes = [
        "Spearman's rho between test accuracy on the synthetic task and bits per byte on the test set; +1 means the same ranking.",
        f"The interval of {1 - 2 * ALPHA:.0%} is by a bootstrap over arms and the seeds of each, p by permutation of the arms, "
        f"{DRAWS:,} draws each.",
        "A high correlation says that the task may stand in for training on text among forms like these, and no more.",
    ]
    means = [(name, found.accuracy[i].mean(), found.bits[i].mean()) for i, name in enumerate(found.arms)]
    rows = [[name, f"{accuracy:.1%}", f"{bits:.4f}"] for name, accuracy, bits in sorted(means, key=lambda row: row[2])]
    table = Table(["test accuracy", "test bits per byte"], {"Best first": rows})
    arms = Section("Arms", figures=[plots.draw_ranks(found, folder)], tables=[table])
    write_report(Report(f"Does {probe} predict {text}?", f"{str(found).capitalize()}.", [], notes, [arms]), folder)
