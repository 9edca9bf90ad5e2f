"""Tables for terminals, rendered by rich."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich.box import Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

RULE = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
"""A line of hyphens below the header and no other lines, in ASCII."""
UNLIMITED = 10_000
"""Console width in characters, so that nothing is wrapped or cut; terminals wrap by themselves."""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a table, every column as wide as its widest cell; the first `left` columns are left-aligned, the others right-aligned.

    If all column names are empty, header and rule are omitted. Cells are plain text: rich's markup is not interpreted.
    """
    grid = Table(box=RULE, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False, show_header=any(columns))
    for number, column in enumerate(columns):
        grid.add_column(Text(column), justify="left" if number < left else "right", no_wrap=True)
    for row in rows:
        grid.add_row(*map(Text, row))
    console = Console(file=io.StringIO(), width=UNLIMITED, color_system=None)
    with console.capture() as captured:
        console.print(grid)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
