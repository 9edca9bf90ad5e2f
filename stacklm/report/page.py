"""One report as index.html and as Markdown: both are templates over the same structure.

The page has no scripts and needs nothing from the network; the Markdown shows the drawings that lie beside it.
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
    "seed. Left of zero is better. Shaded: the margin, differences that do not matter."
)
CURVES = (
    "Thick with markers: loss on the validation sample, the mean over seeds with a band from the lowest to the highest. "
    "Thin: training loss, averaged over seeds and neighbouring steps. Lower is better. The horizontal axes are logarithmic and "
    "begin shortly before the first validation."
)
BENCHMARKS = (
    "Means over seeds. An interval over seeds says what to expect of other seeds on these items, one over items what to expect "
    "of this model on other items. docs/benchmarks.md says what each score is, and how far published ones can be compared."
)
HEALTH = (
    "What one optimizer step changed as a share of the weights, by what parameters are for, and the scale of activations behind "
    "each stack or block (of many, some are shown). Parts that lie far apart, or keep rising, deserve a look: docs/training.md."
)
TIMING = (
    "Times and memory depend on the machine and on what else it did, such as training another model at the same time. They are "
    "therefore not part of the report, which is the same for equal runs."
)


@dataclass(frozen=True)
class Card:
    """The one number that decides about a model, and what it cost."""

    name: str
    number: str
    unit: str
    costs: str


@dataclass(frozen=True)
class Section:
    """A heading and what is below it, shown in the order of these fields. On a wide page two `half` sections share a row."""

    heading: str
    note: str = ""
    link: str = ""
    """The folder of another report beside this one."""
    shapes: Sequence[tuple[str, str]] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    samples: Sequence[Mapping[str, str]] = ()
    """What models write: `name`, `prompt` and the `text` after it."""
    half: bool = False


@dataclass(frozen=True)
class Report:
    """All that a page shows, as text."""

    title: str
    finding: str
    cards: Sequence[Card]
    notes: Sequence[str]
    sections: Sequence[Section]


def comparison_report(comparison: Mapping[str, Any], results: Sequence[Result], folder: Path) -> Report:
    """What the models have in common and what sets them apart; its drawings are written to `folder`."""
    cards = [_card(name, facts) for name, facts in comparison["models"].items()]
    sections = list(_sections(comparison, results, folder))
    return Report(title(comparison), comparison["finding"], cards, caveats(comparison), sections)


def _sections(comparison: Mapping[str, Any], results: Sequence[Result], folder: Path) -> Iterator[Section]:
    if any(pair["outcome"] for pair in comparison["pairs"]):  # seeds enough for verdicts
        yield Section("Verdicts", VERDICTS, figures=[draw_verdicts(comparison, folder)], tables=[tables.verdicts(comparison)])
    yield Section("Loss while training", CURVES, figures=draw_curves(results, COUNTED, folder))
    yield Section("Results", tables=[tables.results(comparison)])
    if comparison["differences"]:
        yield Section("Differences", tables=[tables.differences(comparison)], half=True)
        yield Section("How well the models are matched", tables=[tables.matching(comparison)], half=True)
    scored = {name: facts["benchmarks"] for name, facts in comparison["models"].items() if facts["benchmarks"]}
    if scored:
        made = [tables.benchmarks(scored), tables.benchmark_sets(scored), tables.published(scored)]
        yield Section("Benchmarks", BENCHMARKS, tables=[one for one in made if any(one.groups.values())])
    if health := draw_health(results, folder):
        yield Section("Health while training", HEALTH, figures=health)
    yield Section("Times and memory", TIMING, link="speed")
    firsts = [runs[0] for runs in by_model(results).values()]
    yield Section("What the models write", samples=[{"name": first.run, **first.evaluation["sample"]} for first in firsts])
    shapes = [(first.name, tables.describe(first.model.architecture)) for first in firsts]
    yield Section("How it was made", shapes=shapes, tables=[tables.optimizers(comparison), tables.provenance(comparison)])


def speed_report(results: Sequence[Result], folder: Path) -> Report:
    """Times and memory on this machine; its drawing is written to `folder`."""
    curves = draw_curves(results, TIMED, folder)
    measured = Section("Times and memory", TIMING, figures=curves, tables=[tables.speeds(results)])
    return Report("Speed", "", [], [], [measured, Section("The comparison", link="report")])


def title(comparison: Mapping[str, Any]) -> str:
    names = list(comparison["models"])
    return f"{', '.join(names[:-1])} and {names[-1]}, side by side" if len(names) > 1 else f"{names[0]}, on its own"


def write_report(report: Report, folder: Path) -> None:
    """Write index.html, and the Markdown under the folder's own name."""
    for template, file in (("page.html", "index.html"), ("page.md", f"{folder.name}.md")):
        text = templates("stacklm.report").get_template(template).render(report=report, light=LIGHT.lines, dark=DARK.lines)
        write_text(folder / file, text)


@cache
def templates(package: str) -> Environment:
    """Those of a package, in which a name that is not given is an error."""
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
