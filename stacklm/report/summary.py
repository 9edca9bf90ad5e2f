"""The few lines that a terminal shows when a comparison is done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stacklm.report.units import count, quantity

_COLUMNS = ("model", "parameters", "body", "forward/token", "tokens", "valid bits/byte", "test bits/byte")


def summary(comparison: Mapping[str, Any], report: Path) -> str:
    """What was compared and found, and where to look: `comparison` as in comparison.json, `report` the folder of the page."""
    return f"{findings(comparison)}\n\n{where(report)}"


def where(report: Path) -> str:
    """Where to look at what was made."""
    return f"read the report:         {report / 'index.html'}\nbrowse the experiments:  stacklm ui   (the pages of `mlflow ui`)"


def findings(comparison: Mapping[str, Any]) -> str:
    """A small table, one line a model, and the finding in words."""
    rows = [_COLUMNS, *(_row(name, facts) for name, facts in comparison["models"].items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", comparison["finding"]])


def _row(name: str, facts: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        name,
        count(facts["total_parameters"]),
        count(facts["body_parameters"]),
        quantity(facts["forward_flops_per_token"], "FLOP"),
        count(facts["tokens"]),
        f"{facts['valid']['bits_per_byte']:.4f}",
        f"{facts['test']['bits_per_byte']:.4f}",
    )
