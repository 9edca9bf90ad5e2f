"""The report of `stacklm leak`: a page with curves and certificates, and a table for a terminal."""

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
    f"Each token of the text is drawn uniformly from {TEXT}, so no model can have an expected loss below ln {TEXT} = "
    f"{FLOOR:.2f} nats per token. A lower reported loss is a leak."
)
HONEST = "Honest: on held-out text without padding, each token predicted by a forward pass over the preceding tokens only."
SAME = (
    f"All cases have the same model (dense, {MODEL.n_layers} layers, width {MODEL.d_model}, context {CONTEXT}), seed, steps and "
    "optimizer. The faults are planted from outside; no setting can cause them."
)
LINES = {"train": "training, as reported", "valid": "validation, as reported", "honest": "honest"}


def write_page(outcomes: Sequence[Outcome], folder: Path) -> Path:
    """Write a self-contained index.html, and Markdown with its plots; return the page. Equal outcomes give equal bytes."""
    sections = [
        Section(one.case.capitalize(), sentences(one), figures=[_draw(one, folder)], tables=[_faults(one)], half=True)
        for one in outcomes
    ]
    cards = [Card(one.case, f"{one.reported:.2f}", "nats per token reported", f"honest: {one.last.honest:.2f}") for one in outcomes]
    write_report(Report(TITLE, FINDING, cards, [HONEST, SAME], sections), folder)
    return folder / "index.html"


def sentences(outcome: Outcome) -> str:
    """Return what the case appears to gain, why, and the honest loss, as two sentences."""
    last = outcome.last
    gain = f"appears to know {1 - outcome.reported / FLOOR:.0%} of every token (reported loss {outcome.reported:.2f})"
    verdict = "worse than guessing" if last.honest > 1.02 * FLOOR else "equal to guessing"
    return (
        f"It {gain if outcome.faults else 'appears to know nothing'}: {outcome.why[0].lower()}{outcome.why[1:]} "
        f"An honest evaluation gives {last.honest:.2f}, {verdict}."
    )


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return a table with one row per case: reported losses, honest loss, and the result of the certificate."""
    rows = [
        (one.case, f"{one.last.train:.2f}", f"{one.last.valid:.2f}", f"{one.last.honest:.2f}", certificate(one)) for one in outcomes
    ]
    columns = ("", "training", "validation", "honest", "certificate")
    return f"nats per token; {FLOOR:.2f} is guessing, and nothing can be learned\n\n{table(columns, rows)}"


def certificate(outcome: Outcome) -> str:
    """Return that all checks passed, or the name of the fault and the number of failed checks."""
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
