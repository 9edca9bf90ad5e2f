from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from report_files import Folders

from stacklm.report.health import MOST_LINES, draw_health
from stacklm.report.runs import Run

ROLES = ("embedding", "matrix", "vector", "head")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """With health at validations, step 0 without updates."""
    run = Folders(tmp_path, {"stacked": 3.31, "dense": 3.22}).runs()[0]
    for row in run.metrics[::50]:
        row |= {f"health/activation/stack{i}": 1 + 0.002 * row["step"] * (i + 1) for i in range(2)}
    for row in run.metrics[50::50]:
        row |= {f"health/relative_update/{role}": 0.1**i / row["step"] for i, role in enumerate(ROLES)}
    return run


def test_both_kinds_are_drawn_for_light_and_dark(run: Run, tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    assert draw_health([run], tmp_path / "first") == [("relative_update", "stacked"), ("activation", "stacked")]
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    kinds = ("activation", "relative_update")
    assert sorted(pictures) == [f"health-{kind}-stacked-{theme}.png" for kind in kinds for theme in ("dark", "light")]
    assert len(set(pictures.values())) == 4


def test_a_run_without_health_has_no_plot_and_values_that_are_no_positive_numbers_no_point(run: Run, tmp_path: Path) -> None:
    before = [{key: value for key, value in row.items() if not key.startswith("health/")} for row in run.metrics]
    assert draw_health([dataclasses.replace(run, metrics=before)], tmp_path) == []
    still = [{"step": 0, "health/relative_update/vector": 0.0}, {"step": 50, "health/relative_update/vector": 0.0}]
    assert draw_health([dataclasses.replace(run, metrics=still)], tmp_path) == []


def test_of_many_blocks_some_are_drawn(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("stacklm.report.health._draw", lambda lines, *rest: seen.append([name for name, _, _ in lines]))
    rows = [{"step": step, **{f"health/activation/block{i}": 1.0 + i for i in range(48)}} for step in (0, 50)]
    draw_health([dataclasses.replace(run, metrics=rows)], tmp_path)
    assert len(seen[0]) == MOST_LINES
    assert (seen[0][0], seen[0][-1]) == ("block0", "block47")
