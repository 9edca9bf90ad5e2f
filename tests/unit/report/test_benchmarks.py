"""Benchmarks in the comparison: means over seeds with intervals, beside published scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stacklm.files import read_json, write_json
from stacklm.lab.statistics import interval
from stacklm.report import tables
from stacklm.report.benchmarks import PUBLISHED, over_seeds
from stacklm.report.comparison import build_comparison, headline
from stacklm.report.page import comparison_report, write_report
from support.report_files import MANIFEST, TRAIN, Folders


def figures(accuracy: float, words: float = 90.0) -> dict[str, Any]:
    def score(value: float) -> dict[str, float]:
        return {"value": value, "low": value * 0.9, "high": value * 1.1}

    return {
        "blimp": {
            "kind": "blimp",
            "items": 670,
            "unit": "pairs",
            "chance": 0.5,
            "ties": 2,
            "scores": {"accuracy": score(accuracy)},
            "sets": {"adjunct_island": {"items": 10, **score(accuracy / 2)}},
        },
        "wikitext": {"kind": "wikitext", "items": 62, "unit": "articles", "scores": {"word_perplexity": score(words)}},
    }


def test_one_seed_has_the_interval_over_items_and_three_have_one_over_seeds():
    one = over_seeds([figures(0.6)])
    assert one["blimp"]["over"] == "pairs"
    assert one["blimp"]["scores"]["accuracy"] == {"value": 0.6, "low": 0.6 * 0.9, "high": 0.6 * 1.1}
    two = over_seeds([figures(0.6), figures(0.7)])
    assert two["blimp"]["over"] is None and two["blimp"]["scores"]["accuracy"]["low"] is None
    three = over_seeds([figures(value) for value in (0.6, 0.7, 0.65)])
    low, high = interval([0.6, 0.7, 0.65])
    assert three["blimp"]["over"] == "seeds"
    assert three["blimp"]["scores"]["accuracy"] == {"value": pytest.approx(0.65), "low": low, "high": high}
    assert three["blimp"]["sets"]["adjunct_island"] == pytest.approx(0.325)


def test_a_terminal_shows_scores_chance_and_what_was_published():
    text = tables.benchmark_text({"dense": over_seeds([figures(0.6)]), "stacked": over_seeds([figures(0.55)])})
    line = next(line for line in text.splitlines() if line.startswith("blimp, accuracy"))
    assert "60.0% (54.0% to 66.0%)" in line and "55.0%" in line and line.rstrip().endswith("50.0%")
    assert "GPT-BERT" in text and "AWD-LSTM" in text
    assert "lambada" not in text, "nothing of what was not scored"


def test_published_scores_say_of_what_model_and_where():
    for one in PUBLISHED:
        assert one.kind in {"blimp", "lambada", "wikitext"} and one.model and one.trained_on and one.source
        assert (one.value < 1) == one.score.startswith("accuracy")


def test_report_and_metrics_have_the_benchmarks(tmp_path: Path):
    folders = Folders(tmp_path / "in", {"stacked": 3.31, "dense": 3.22})
    for i, file in enumerate(sorted(folders.evaluations.glob("*.json"))):
        write_json(file, {**read_json(file), "benchmarks": figures(0.5 + i / 10)})
    results = folders.results()
    comparison = build_comparison(results, TRAIN, MANIFEST, data_sha256="")
    assert headline(comparison)["dense"]["blimp_accuracy"] == 0.5
    assert headline(comparison)["stacked"]["wikitext_word_perplexity"] == 90.0
    assert "blimp, accuracy" in tables.findings(comparison)
    write_report(comparison_report(comparison, results, tmp_path / "report"), tmp_path / "report")
    page, text = ((tmp_path / "report" / name).read_text() for name in ("index.html", "report.md"))
    for shown in ("Benchmarks", "blimp: 670 pairs; intervals over pairs", "adjunct_island", "GPT-BERT"):
        assert shown in page and shown in text
