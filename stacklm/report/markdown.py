"""The comparison as Markdown, to be read where there is no browser."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stacklm.report import tables
from stacklm.report.plots import AXES
from stacklm.report.runs import Run
from stacklm.report.tables import Table
from stacklm.report.wording import CURVES, caveats, title


def markdown(comparison: Mapping[str, Any], runs: Sequence[Run], curves: Sequence[str]) -> str:
    """The text of report.md; `curves` are the axes whose PNGs lie beside it."""
    parts = [f"# {title(comparison)}", f"**{comparison['finding']}**", _list(caveats(comparison))]
    parts += ["## Loss while training", CURVES, *map(_picture, curves)]
    parts += ["## Results", _table(tables.results(comparison, runs))]
    if comparison["differences"]:
        parts += ["## Differences", _table(tables.differences(comparison))]
        parts += ["## How well the models are matched", _table(tables.matching(comparison))]
    parts.append("## What the models write")
    for run in runs:
        sample = run.evaluation["sample"]
        parts += [f"### {run.name}", _code(sample["prompt"] + sample["text"])]
    parts += ["## How it was made", _list(f"{run.name}: {tables.describe(run.model.architecture)}" for run in runs)]
    parts += [_table(tables.optimizers(comparison)), _table(tables.provenance(comparison))]
    return "\n\n".join(parts) + "\n"


def _picture(axis: str) -> str:
    return f"![Loss against {AXES[axis].title}](loss-{axis}-light.png)"


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _table(table: Table) -> str:
    lines = [f"| | {' | '.join(table.columns)} |", f"|---|{'---:|' * len(table.columns)}"]
    for group, rows in table.groups.items():
        lines.append(f"| **{group}** |{' |' * len(table.columns)}")
        lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(lines)


def _code(text: str) -> str:
    """An indented block: unlike a fence, nothing in the text can end it."""
    return textwrap.indent(text.rstrip(), "    ", lambda line: True)
