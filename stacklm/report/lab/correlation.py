"""The rank correlation of a synthetic task with bits per byte, as a page and Markdown."""

from __future__ import annotations

from pathlib import Path

from stacklm.lab.correlation import DRAWS, Correlation
from stacklm.lab.statistics import ALPHA
from stacklm.report.page import Report, Section, write_report
from stacklm.report.plots import LIGHT, Figure, drawing, nth
from stacklm.report.tables import Table


def sentence(found: Correlation) -> str:
    """Such as `over 9 arms the ranks agree with rho = 0.75 (0.12 to 0.96; p = 0.02)`."""
    interval = f"{found.low:.2f} to {found.high:.2f}"
    return f"over {len(found.arms)} arms the ranks agree with rho = {found.rho:.2f} ({interval}; p = {found.p:.2g})"


def write(found: Correlation, text: str, probe: str, folder: Path) -> None:
    """Write index.html and the Markdown of the experiments `text` and `probe` into a folder."""
    notes = [
        "Spearman's rho between test accuracy on the synthetic task and bits per byte on the test set; +1 means the same ranking.",
        f"The interval of {1 - 2 * ALPHA:.0%} is by a bootstrap over arms and the seeds of each, p by permutation of the arms, "
        f"{DRAWS:,} draws each.",
        "A high correlation says that the task may stand in for training on text among forms like these, and no more.",
    ]
    means = [(name, found.accuracy[i].mean(), found.bits[i].mean()) for i, name in enumerate(found.arms)]
    rows = [[name, f"{accuracy:.1%}", f"{bits:.4f}"] for name, accuracy, bits in sorted(means, key=lambda row: row[2])]
    sections = [
        Section(
            "Arms", figures=[_drawn(found, folder)], tables=[Table(["test accuracy", "test bits per byte"], {"Best first": rows})]
        )
    ]
    write_report(Report(f"Does {probe} predict {text}?", f"{sentence(found).capitalize()}.", [], notes, sections), folder)


def _drawn(found: Correlation, folder: Path) -> Figure:
    figure = Figure(folder / "ranks.svg", "Test accuracy on the synthetic task against test bits per byte, a point for each arm")
    with drawing(figure.path) as axes:
        for i, name in enumerate(found.arms):
            x, y, colour = 100 * found.accuracy[i], found.bits[i], nth(LIGHT.lines, i)
            axes.errorbar(x.mean(), y.mean(), y.std(ddof=1), x.std(ddof=1), fmt="o", color=colour, markersize=6, elinewidth=1)
            axes.annotate(name, (x.mean(), y.mean()), (6, 4), textcoords="offset points", color=colour, size=8)
        axes.set_xlabel("test accuracy (%)")
        axes.set_ylabel("test bits per byte")
        axes.margins(0.15)
    return figure
