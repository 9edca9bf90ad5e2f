"""The comparison as one HTML file: no scripts, nothing from the network, light and dark."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from stacklm.report import tables
from stacklm.report.health import KINDS
from stacklm.report.plots import AXES, PALETTES
from stacklm.report.runs import Run
from stacklm.report.speed import speed
from stacklm.report.tables import Table
from stacklm.report.units import count, duration, quantity
from stacklm.report.wording import CURVES, HEALTH, TIMING, caveats, title

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2024; --faint: #5f6770; --line: #e3e6e9; --tint: #f6f7f9;
        --note: #fff6e0 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #181b1f; --ink: #e8eaed; --faint: #a3abb3; --line: #33393f; --tint: #202429; --note: #2d2718 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 72rem; background: var(--paper); color: var(--ink);
       font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
h1 { margin: 0 0 .75rem; font-size: 2rem; line-height: 1.2; letter-spacing: -.02em }
h2 { margin: 3rem 0 .75rem; font-size: 1.3rem; letter-spacing: -.01em }
h3 { margin: 1.25rem 0 .5rem; font-size: 1rem }
p, ul { max-width: 48rem }
.finding { font-size: 1.2rem }
.notes { margin: 1rem 0; padding: .75rem 1rem .75rem 2rem; border-radius: .5rem; background: var(--note) }
.faint { color: var(--faint); font-size: .9rem }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)) }
.card { padding: 1rem 1.25rem; border: 1px solid var(--line); border-top: .3rem solid var(--colour); border-radius: .5rem }
.card b { display: block; font-size: 2.1rem; line-height: 1.2; font-variant-numeric: tabular-nums }
.card h3 { margin: 0; color: var(--colour) }
.card p { margin: .5rem 0 0 }
section, figure { min-width: 0; margin: 0 }
img { display: block; width: 100%; height: auto }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95rem }
th, td { padding: .3rem .75rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top }
@media (max-width: 40rem) { th, td { padding: .3rem .4rem } }
th:first-child { text-align: left; font-weight: normal }
thead th, tbody th[colspan] { font-weight: 650; background: var(--tint) }
td { white-space: nowrap }
.long td { text-align: left; white-space: normal; overflow-wrap: anywhere }
pre { margin: 0; padding: 1rem; max-height: 24rem; overflow: auto; border-radius: .5rem; background: var(--tint);
      font: .85rem/1.5 ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
pre mark { background: none; color: var(--faint) }
"""


def page(
    comparison: Mapping[str, Any], runs: Sequence[Run], curves: Sequence[str], health: Sequence[tuple[str, str]], folder: Path
) -> str:
    """The text of index.html; `curves` are the axes, and `health` kinds and models, whose PNGs in `folder` are taken into it."""
    body = [
        f"<h1>{escape(title(comparison))}</h1>",
        f'<p class="finding">{escape(comparison["finding"])}</p>',
        _grid(_card(i, run, comparison["models"][run.name]) for i, run in enumerate(runs)),
        f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in caveats(comparison))}</ul>',
        "<h2>Loss while training</h2>",
        f'<p class="faint">{CURVES}</p>',
        _grid(_loss_figure(axis, folder) for axis in curves),
        "<h2>Results</h2>",
        _table(tables.results(comparison, runs)),
        f'<p class="faint">{TIMING}</p>',
    ]
    if comparison["differences"]:
        apart = f"<section><h2>Differences</h2>{_table(tables.differences(comparison))}</section>"
        matched = f"<section><h2>How well the models are matched</h2>{_table(tables.matching(comparison))}</section>"
        body.append(_grid([apart, matched]))
    if health:
        body += ["<h2>Health while training</h2>", f'<p class="faint">{HEALTH}</p>']
        body.append(_grid(_health_figure(kind, model, folder) for kind, model in health))
    body += ["<h2>What the models write</h2>", _grid(map(_sample, runs))]
    body += ["<h2>How it was made</h2>", f"<ul>{''.join(map(_shape, runs))}</ul>"]
    body += [_table(tables.optimizers(comparison)), "<p></p>", _table(tables.provenance(comparison), "long")]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title(comparison))}</title>\n<style>{_STYLE}{_colours(len(runs))}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _colours(models: int) -> str:
    """The colours of the plots' lines, by theme, as one class a model."""

    def rules(theme: str) -> str:
        return "".join(f".model-{i} {{ --colour: {PALETTES[theme][i % len(PALETTES[theme])]} }}\n" for i in range(models))

    return f"{rules('light')}@media (prefers-color-scheme: dark) {{\n{rules('dark')}}}\n"


def _grid(items: Any) -> str:
    return f'<div class="grid">\n{chr(10).join(items)}\n</div>'


def _card(i: int, run: Run, facts: Mapping[str, Any]) -> str:
    """The one number that decides, and what it cost."""
    measured = speed(run)
    costs = [
        f"{count(facts['total_parameters'])} parameters ({count(facts['body_parameters'])} in the body)",
        quantity(facts["forward_flops_per_token"], "FLOP/token"),
        "training time not measured" if measured is None else f"trained in {duration(measured.seconds)}",
    ]
    return (
        f'<section class="card model-{i}"><h3>{escape(run.name)}</h3><b>{facts["test"]["bits_per_byte"]:.4f}</b>'
        f'bits per byte on the test set<p class="faint">{" · ".join(costs)}</p></section>'
    )


def _loss_figure(axis: str, folder: Path) -> str:
    return _figure(folder, f"loss-{axis}", f"Training and validation loss of every model against {AXES[axis].title}")


def _health_figure(kind: str, model: str, folder: Path) -> str:
    figure = _figure(folder, f"health-{kind}-{model}", f"{KINDS[kind]} over the steps of {model}")
    return f"<section><h3>{escape(model)}</h3>{figure}</section>"


def _figure(folder: Path, name: str, alternative: str) -> str:
    light, dark = (_inline(folder / f"{name}-{theme}.png") for theme in ("light", "dark"))
    return (
        f'<figure><picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{escape(alternative)}"></picture></figure>'
    )


def _inline(png: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}"


def _table(table: Table, kind: str = "") -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in ["", *table.columns])
    lines = [f'<div class="scroll"><table class="{kind}">', f"<thead><tr>{head}</tr></thead>" if any(table.columns) else ""]
    for group, rows in table.groups.items():
        lines.append(f'<tbody><tr><th colspan="{len(table.columns) + 1}" scope="rowgroup">{escape(group)}</th></tr>')
        for label, *cells in rows:
            lines.append(f'<tr><th scope="row">{escape(label)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>')
        lines.append("</tbody>")
    return "\n".join([*filter(None, lines), "</table></div>"])


def _sample(run: Run) -> str:
    sample = run.evaluation["sample"]
    text = f"<mark>{escape(sample['prompt'])}</mark>{escape(sample['text'])}"
    return f"<section><h3>{escape(run.name)}</h3><pre>{text}</pre></section>"


def _shape(run: Run) -> str:
    return f"<li><b>{escape(run.name)}</b>: {escape(tables.describe(run.model.architecture))}</li>"
