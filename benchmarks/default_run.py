"""Write the default comparison to the README, after `make repro`.

    python benchmarks/default_run.py [CHECKOUT]

Reads the results in the checkout's `out/` and the times in `.stacklm/history.jsonl`. Writes docs/measurements/default.md, the
report's plot of verdicts as default.svg beside it, and the part of README.md between the `measured` comments.
"""

from __future__ import annotations

import platform
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from stacklm.files import read_json, read_jsonl, write_text
from stacklm.units import count, duration, quantity

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    made = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT)
    comparison = read_json(made / "out" / "comparison.json")
    rows = read_jsonl(made / ".stacklm" / "history.jsonl")
    text = table(comparison) + "\n\n" + textwrap.fill(sentence(comparison, rows), 120, break_on_hyphens=False)
    folder = ROOT / "docs" / "measurements"
    write_text(folder / "default.svg", (made / "out" / "report" / "verdicts.svg").read_text(encoding="utf-8"))
    heading = "# The default comparison\n\nWritten by `python benchmarks/default_run.py` after `make repro`.\n\n"
    write_text(folder / "default.md", f"{heading}{text}\n\n{picture('default.svg')}\n")
    readme = (ROOT / "README.md").read_text()
    block = f"<!-- measured -->\n\n{text}\n\n{picture('docs/measurements/default.svg')}\n\n<!-- /measured -->"
    write_text(ROOT / "README.md", re.sub(r"<!-- measured -->.*<!-- /measured -->", lambda _: block, readme, flags=re.DOTALL))


def table(comparison: Mapping[str, Any]) -> str:
    """The result as Markdown: one row per model."""
    lines = [
        "| model | layers in series | parameters, body | training | tokens | valid, bits/byte | test, bits/byte ± sd over seeds |",
        "| -- " * 7 + "|",
    ]
    for name, facts in comparison["models"].items():
        cells = [
            f"`{name}`",
            str(facts["sequential_depth"]),
            f"{count(facts['total_parameters'])}, {count(facts['body_parameters'])}",
            quantity(facts["training_flops"], "FLOP"),
            count(facts["tokens"]),
            f"{facts['valid']['bits_per_byte']:.3f}",
            f"**{facts['test']['bits_per_byte']:.3f}** ± {facts['test_sd']:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sentence(comparison: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The finding with its statistics, and the duration of the stages, the machine and the date."""
    latest = {row["stage"]: row for row in rows}.values()
    seconds = max(row["started"] + row["seconds"] for row in latest) - min(row["started"] for row in latest)
    day = datetime.fromtimestamp(max(row["started"] for row in latest), UTC).date()
    machine = f"{psutil.cpu_count(logical=False) or psutil.cpu_count()} cores ({platform.machine()}), {day}"
    return f"{comparison['finding']} Time: {duration(seconds)} on {machine}."


def picture(path: str) -> str:
    return f"![Relative differences of every pair in test bits per byte, with intervals and the margin]({path})"


if __name__ == "__main__":
    main()
