"""A report as index.html and as Markdown, rendered from the same structure by two templates.

The HTML is self-contained and has no scripts; the Markdown refers to the plots in the same folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from stacklm.files import write_text
from stacklm.report import tables
from stacklm.report.comparison import caveats
from stacklm.report.plots import COUNTED, DARK, LIGHT, TIMED, Figure, draw_curves, draw_health, draw_verdicts
from stacklm.report.runs import Result, by_model
from stacklm.report.tables import Table
from stacklm.units import count, quantity

VERDICTS = (
    "Relative differences in test bits per byte between models trained with the same seed: mean, interval, and a tick for each "
    "seed. Left of zero is better. Shaded: the margin, a difference that is considered negligible."
)
CURVES = (
    "Thick lines with markers: loss on the validation sample, mean over seeds with a band from the lowest to the highest. "
    "Thin lines: training loss, averaged over seeds and neighbouring steps. Lower is better. The horizontal axes are logarithmic "
    "and start shortly before the first validation."
)
BENCHMARKS = (
    "Means over seeds. An interval over seeds applies to other seeds on these items, an interval over items to this model on "
    "other items. docs/benchmarks.md defines the scores and says how far they are comparable with published ones."
)
HEALTH = (
    "Relative update of one optimizer step (change / weights) by parameter role, and RMS of the activations after each stack or "
    "block (of many, some are shown). Check lines that are far from the others or keep rising: docs/training.md."
)
TIMING = (
    "Times and memory depend on the machine and its other load, such as training another model at the same time. They are "
    "therefore not part of the report, which is the same for equal runs."
)


@dataclass(frozen=True)
class Card:
    """The main result of a model, and its cost."""

    name: str
    number: str
    unit: str
    costs: str


@dataclass(frozen=True)
class Section:
    """A section with its content, shown in the order of these fields. On a wide page two `half` sections share a row."""

    heading: str
    note: str = ""
    link: str = ""
    """The folder of another report, next to this one."""
    shapes: Sequence[tuple[str, str]] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    samples: Sequence[Mapping[str, str]] = ()
    """Generated text of each model: `name`, `prompt` and the `text` after it."""
    half: bool = False


@dataclass(frozen=True)
class Report:
    """The content of a report."""

    title: str
    finding: str
    cards: Sequence[Card]
    notes: Sequence[str]
    sections: Sequence[Section]


def comparison_report(comparison: Mapping[str, Any], results: Sequence[Result], folder: Path) -> Report:
    """Return the report of a comparison; its plots are written to `folder`."""
    cards = [_card(name, facts) for name, facts in comparison["models"].items()]
    sections = list(_sections(comparison, results, folder))
    return Report(title(comparison), comparison["finding"], cards, caveats(comparison), sections)


def _sections(comparison: Mapping[str, Any], results: Sequence[Result], folder: Path) -> Iterator[Section]:
    if any(pair["outcome"] for pair in comparison["pairs"]):  # enough seeds for verdicts
        yield Section("Verdicts", VERDICTS, figures=[draw_verdicts(comparison, folder)], tables=[tables.verdicts(comparison)])
    yield Section("Loss during training", CURVES, figures=draw_curves(results, COUNTED, folder))
    yield Section("Results", tables=[tables.results(comparison)])
    if comparison["differences"]:
        yield Section("Differences", tables=[tables.differences(comparison)], half=True)
        yield Section("Matching of the models", tables=[tables.matching(comparison)], half=True)
    scored = {name: facts["benchmarks"] for name, facts in comparison["models"].items() if facts["benchmarks"]}
    if scored:
        made = [tables.benchmarks(scored), tables.benchmark_sets(scored), tables.published(scored)]
        yield Section("Benchmarks", BENCHMARKS, tables=[one for one in made if any(one.groups.values())])
    if health := draw_health(results, folder):
        yield Section("Training health", HEALTH, figures=health)
    yield Section("Times and memory", TIMING, link="speed")
    firsts = [runs[0] for runs in by_model(results).values()]
    yield Section("Generated text", samples=[{"name": first.run, **first.evaluation["sample"]} for first in firsts])
    shapes = [(first.name, tables.describe(first.model.architecture)) for first in firsts]
    yield Section("Models, settings and data", shapes=shapes, tables=[tables.optimizers(comparison), tables.provenance(comparison)])


def speed_report(results: Sequence[Result], folder: Path) -> Report:
    """Return the report of times and memory on this machine; its plot is written to `folder`."""
    curves = draw_curves(results, TIMED, folder)
    measured = Section("Times and memory", TIMING, figures=curves, tables=[tables.speeds(results)])
    return Report("Speed", "", [], [], [measured, Section("The comparison", link="report")])


def title(comparison: Mapping[str, Any]) -> str:
    names = list(comparison["models"])
    return f"Comparison of {', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else f"Report on {names[0]}"


def write_report(report: Report, folder: Path) -> None:
    """Write index.html, and the Markdown as FOLDER.md, with the name of the folder."""
    for template, file in (("page.html", "index.html"), ("page.md", f"{folder.name}.md")):
        text = templates("stacklm.report").get_template(template).render(report=report, light=LIGHT.lines, dark=DARK.lines)
        write_text(folder / file, text)


@cache
def templates(package: str) -> Environment:
    """Return the templates of a package; an undefined name in a template is an error."""
    environment = Environment(
        loader=PackageLoader(package),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["number"] = "{:,}".format
    return environment


def _card(name: str, facts: Mapping[str, Any]) -> Card:
    parameters = f"{count(facts['total_parameters'])} parameters ({count(facts['body_parameters'])} in the body)"
    flops = quantity(facts["forward_flops_per_token"], "FLOP/token")
    seeds = f", mean of {len(facts['seeds'])} seeds" if len(facts["seeds"]) > 1 else ""
    return Card(name, f"{facts['test']['bits_per_byte']:.4f}", f"bits per byte on the test set{seeds}", f"{parameters} · {flops}")
