"""The stage `compare`: a comparison of the models as data, as HTML and as Markdown."""

from __future__ import annotations

from pathlib import Path

from stacklm.config.model import Model
from stacklm.config.train import Train
from stacklm.files import read_json, sha256, write_json, write_text
from stacklm.report.comparison import build_comparison, curve, headline
from stacklm.report.page import comparison_report, speed_report, write_report
from stacklm.report.runs import by_model, load_results
from stacklm.report.tables import findings


def compare(
    models: dict[str, Model],
    seeds: tuple[int, ...],
    config: Train,
    trained: Path,
    evaluations: Path,
    shards: Path,
    timing: Path,
    comparison: Path,
    metrics: Path,
    curves: Path,
    report: Path,
    speed: Path,
) -> None:
    """Compare only the named models, trained with these seeds: write the report to the folder `report`, all figures to
    `comparison`, the most important ones to `metrics`, and a table of losses per model to the folder `curves`. These are equal
    for equal runs. Times and memory, which are not, are written to the folder `speed`.

    Raises `FileNotFoundError` naming a model without results, and `ValueError` if results are not comparable.
    """
    manifest = read_json(shards / "manifest.json")
    results = load_results(models, seeds, config, manifest, trained, evaluations, timing)
    facts = build_comparison(results, config, manifest, data_sha256=sha256(shards / "manifest.json"))
    write_report(comparison_report(facts, results, report), report)
    write_report(speed_report(results, speed), speed)
    write_json(comparison, facts)
    write_json(metrics, headline(facts))
    for name, runs in by_model(results).items():
        write_text(curves / f"{name}.csv", curve(runs))
    print(findings(facts))
