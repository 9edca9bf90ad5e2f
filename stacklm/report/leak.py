"""What leaks pretend to gain: a page with the curves and the certificates, and a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stacklm.console import table
from stacklm.lab.leak import CONTEXT, FLOOR, MODEL, TEXT, Outcome
from stacklm.report.page import Card, Report, Section, write_report
from stacklm.report.plots import LIGHT, MARKERS, End, Figure, drawing
from stacklm.report.tables import Table

TITLE = "What leaks pretend to gain"
FINDING = (
    f"Each token of the text is drawn from {TEXT} equally likely ones, so no model can expect a loss below ln {TEXT} = "
    f"{FLOOR:.2f} nats per token. Whatever is reported below that is a leak."
)
HONEST = (
    "Honest: text that was not trained on, each token predicted from the tokens before it by a pass that is given no others, "
    "padding left out."
)
SAME = (
    f"The same model in all cases: dense, {MODEL.n_layers} layers, width {MODEL.d_model}, context {CONTEXT}, same seed, steps and "
    "optimizer. The faults are planted from outside; no setting has them."
)
LINES = {"train": "training, as reported", "valid": "validation, as reported", "honest": "honest"}


def write_page(outcomes: Sequence[Outcome], folder: Path) -> Path:
    """Write index.html, which needs no other file, and Markdown with its drawings; the page. Equal outcomes give equal bytes."""
    sections = [
        Section(one.case.capitalize(), sentences(one), figures=[_draw(one, folder)], tables=[_faults(one)], half=True)
        for one in outcomes
    ]
    cards = [Card(one.case, f"{one.reported:.2f}", "nats per token reported", f"honest: {one.last.honest:.2f}") for one in outcomes]
    write_report(Report(TITLE, FINDING, cards, [HONEST, SAME], sections), folder)
    return folder / "index.html"


def sentences(outcome: Outcome) -> str:
    """What the case pretends to gain and why; and what an honest evaluation says."""
    last = outcome.last
    gain = f"pretends to know {1 - outcome.reported / FLOOR:.0%} of every token (a loss of {outcome.reported:.2f})"
    verdict = "worse than guessing" if last.honest > 1.02 * FLOOR else "which is guessing"
    return (
        f"It {gain if outcome.faults else 'pretends to know nothing'}: {outcome.why[0].lower()}{outcome.why[1:]} "
        f"An honest evaluation says {last.honest:.2f}, {verdict}."
    )


def summary(outcomes: Sequence[Outcome]) -> str:
    """A row for every case: losses as reported, the honest one, and what the certificate says."""
    rows = [
        (one.case, f"{one.last.train:.2f}", f"{one.last.valid:.2f}", f"{one.last.honest:.2f}", certificate(one)) for one in outcomes
    ]
    columns = ("", "training", "validation", "honest", "certificate")
    return f"nats per token; {FLOOR:.2f} is guessing, and nothing can be learned\n\n{table(columns, rows)}"


def certificate(outcome: Outcome) -> str:
    """Passed, or the name of the fault and how many checks found one."""
    count = len(outcome.faults)
    return f"{outcome.named}; {count} of {outcome.checks} checks failed" if count else f"all {outcome.checks} checks passed"


def _faults(outcome: Outcome) -> Table:
    rows = [[f"{one.name} of {one.of}", one.finding] for one in outcome.faults]
    return Table(("",), {f"Certificate: {certificate(outcome)}": rows}, prose=True)


def _draw(outcome: Outcome, folder: Path) -> Figure:
    path = folder / f"{outcome.case.replace(' ', '-')}.svg"
    steps = [point.step for point in outcome.points]
    with drawing(path, "step", "loss (nats per token)") as (axes, ends):
        axes.axhline(FLOOR, color=LIGHT.faint, linewidth=1, linestyle="--")
        for colour, marker, (key, name) in zip(LIGHT.lines, MARKERS, LINES.items(), strict=False):
            values = np.array([getattr(point, key) for point in outcome.points])
            axes.plot(steps, values, color=colour, linewidth=2, marker=marker, markersize=4)
            ends.append(End(name, steps[-1], float(values[-1]), colour))
        axes.set_ylim(bottom=0, top=max(axes.get_ylim()[1], 1.3 * FLOOR))
    return Figure(path, f"Losses of {outcome.case}, reported and honest; the dashed line is guessing")
