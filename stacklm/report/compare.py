"""The stage `compare`: the models side by side, as data, as a page and as Markdown."""

from __future__ import annotations

from pathlib import Path

from stacklm.config.model import Model
from stacklm.config.train import Train
from stacklm.files import read_json, sha256, write_json, write_text
from stacklm.report.comparison import build_comparison
from stacklm.report.health import draw_health
from stacklm.report.markdown import markdown
from stacklm.report.page import page
from stacklm.report.plots import draw_curves
from stacklm.report.runs import load_runs
from stacklm.report.summary import findings


def compare(
    models: dict[str, Model],
    config: Train,
    trained: Path,
    evaluations: Path,
    shards: Path,
    timing: Path,
    comparison: Path,
    report: Path,
) -> None:
    """Compare the named models and no others: write comparison.json (no times) and the folder of the page (with times).

    Raises `FileNotFoundError` naming a model without results, and `ValueError` where results cannot stand side by side.
    """
    manifest = read_json(shards / "manifest.json")
    runs = load_runs(models, config, manifest, trained, evaluations, timing)
    facts = build_comparison(runs, config, manifest, data_sha256=sha256(shards / "manifest.json"))
    report.mkdir(parents=True)
    curves = draw_curves(runs, report)
    write_text(report / "index.html", page(facts, runs, curves, draw_health(runs, report), report))
    write_text(report / "report.md", markdown(facts, runs, curves))
    write_json(comparison, facts)
    print(findings(facts))
