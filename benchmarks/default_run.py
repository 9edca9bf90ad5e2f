"""The default comparison for the README: run after `make repro`.

    python benchmarks/default_run.py [CHECKOUT]

Reads the results in the checkout's `out/` and the times in `.stacklm/history.jsonl`. Writes docs/measurements/default.md,
docs/measurements/default.svg (validation loss while training) and the part of README.md between the `measured` comments.
"""

from __future__ import annotations

import csv
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from stacklm.files import read_json, read_jsonl, write_text
from stacklm.units import count, duration, quantity

ROOT = Path(__file__).resolve().parents[1]
COLOURS = (("#0072b2", "#56b4e9"), ("#d55e00", "#e69f00"), ("#009e73", "#2fc79a"))
"""Okabe and Ito's, on a light and on a dark page; one pair per model."""


def main() -> None:
    made = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT)
    comparison = read_json(made / "out" / "comparison.json")
    curves = {name: _curve(made / "out" / "curves" / f"{name}.csv") for name in comparison["models"]}
    rows = read_jsonl(made / ".stacklm" / "history.jsonl")
    text = table(comparison) + "\n\n" + _wrap(sentence(comparison, rows))
    folder = ROOT / "docs" / "measurements"
    write_text(folder / "default.svg", plot(curves))
    heading = "# The default comparison\n\nWritten by `python benchmarks/default_run.py` after `make repro`.\n\n"
    write_text(folder / "default.md", f"{heading}{text}\n\n{picture('default.svg')}\n")
    readme = (ROOT / "README.md").read_text()
    block = f"<!-- measured -->\n\n{text}\n\n{picture('docs/measurements/default.svg')}\n\n<!-- /measured -->"
    write_text(ROOT / "README.md", re.sub(r"<!-- measured -->.*<!-- /measured -->", lambda _: block, readme, flags=re.DOTALL))


def table(comparison: Mapping[str, Any]) -> str:
    """The result as Markdown: one row per model."""
    lines = [
        "| model | layers in series | parameters, body | training | tokens | valid, bits/byte | test, bits/byte |",
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
            f"**{facts['test']['bits_per_byte']:.3f}**",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sentence(comparison: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The finding, what the numbers are worth, and how long the stages took on which machine."""
    latest = {row["stage"]: row for row in rows}.values()
    seconds = max(row["started"] + row["seconds"] for row in latest) - min(row["started"] for row in latest)
    day = datetime.fromtimestamp(max(row["started"] for row in latest), UTC).date()
    machine = f"{psutil.cpu_count(logical=False) or psutil.cpu_count()} cores ({platform.machine()}), {day}"
    return f"{comparison['finding']} There are no error bars until several seeds have run. Time: {duration(seconds)} on {machine}."


def picture(path: str) -> str:
    return f"![Validation bits per byte while training, one line per model]({path})"


def plot(curves: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Validation bits per byte against training tokens as an SVG for light and dark pages."""
    width, height, left, right, top, bottom = 640, 300, 56, 90, 36, 44
    points = [point for curve in curves.values() for point in curve]
    most = max(tokens for tokens, _ in points)
    low, high = min(bits for _, bits in points) // 0.25 * 0.25, -(-max(bits for _, bits in points) // 0.25) * 0.25

    def x(tokens: float) -> float:
        return left + (width - left - right) * tokens / most

    def y(bits: float) -> float:
        return top + (height - top - bottom) * (high - bits) / (high - low)

    parts = [f'<rect class="paper" width="{width}" height="{height}" rx="12"/>']
    parts.append(f'<text x="{left}" y="22">Validation bits per byte while training (lower is better)</text>')
    for i in range(round((high - low) / 0.25) + 1):
        level = low + 0.25 * i
        parts.append(f'<path class="grid" d="M{left} {y(level):.1f} H{width - right}"/>')
        parts.append(f'<text class="faint end" x="{left - 8}" y="{y(level) + 4:.1f}">{level:.2f}</text>')
    for i in range(5):
        parts.append(f'<text class="faint middle" x="{x(most * i / 4):.1f}" y="{height - 24}">{count(round(most * i / 4))}</text>')
    parts.append(f'<text class="faint middle" x="{x(most / 2):.1f}" y="{height - 8}">training tokens</text>')
    for i, (name, curve) in enumerate(curves.items()):
        path = " L".join(f"{x(tokens):.1f} {y(bits):.1f}" for tokens, bits in curve)
        parts.append(f'<path class="curve c{i}" d="M{path}"/>')
        parts.append(f'<text class="t{i}" x="{width - right + 8}" y="{y(curve[-1][1]) + 4:.1f}">{name}</text>')
    light = {"paper": "#ffffff", "ink": "#1c2024", "faint": "#5f6770", "grid": "#e3e6e9"}
    dark = {"paper": "#181b1f", "ink": "#e8eaed", "faint": "#a3abb3", "grid": "#33393f"}
    for i, pair in enumerate(COLOURS):
        light[f"c{i}"], dark[f"c{i}"] = pair
    variables = [" ".join(f"--{name}: {colour};" for name, colour in theme.items()) for theme in (light, dark)]
    rules = "".join(f".c{i} {{ stroke: var(--c{i}) }} .t{i} {{ fill: var(--c{i}) }}\n" for i in range(len(curves)))
    style = (
        f"svg {{ {variables[0]} }}\n@media (prefers-color-scheme: dark) {{ svg {{ {variables[1]} }} }}\n"
        "text { font: 13px system-ui, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif; fill: var(--ink) }\n"
        ".faint { fill: var(--faint) } .end { text-anchor: end } .middle { text-anchor: middle }\n"
        ".paper { fill: var(--paper) } .grid { stroke: var(--grid) } .curve { fill: none; stroke-width: 2.5 }\n"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">\n<style>\n{style}{rules}</style>\n'
    return head + "\n".join(parts) + "\n</svg>\n"


def _curve(path: Path) -> list[tuple[int, float]]:
    with path.open() as lines:
        return [
            (int(row["tokens"]), float(row["valid_bits_per_byte"])) for row in csv.DictReader(lines) if row["valid_bits_per_byte"]
        ]


def _wrap(text: str) -> str:
    import textwrap

    return textwrap.fill(text, 120, break_on_hyphens=False)


if __name__ == "__main__":
    main()
