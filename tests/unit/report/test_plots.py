"""The plots: which ones are drawn, equal bytes for equal runs, and colours for light and dark pages."""

import dataclasses
import re

import matplotlib
import numpy as np
import pytest

from stacklm.report.plots import AXES, COUNTED, DARK, LIGHT, MOST_LINES, TIMED, draw_curves, draw_health, spread

ROLES = ("embedding", "matrix", "vector", "head")


@pytest.fixture
def healthy(results):
    """With health at validations, step 0 without updates."""
    for row in results[0].metrics[::50]:
        row |= {f"health/activation/stack{i}": 1 + 0.002 * row["step"] * (i + 1) for i in range(2)}
    for row in results[0].metrics[50::50]:
        row |= {f"health/relative_update/{role}": 0.1**i / row["step"] for i, role in enumerate(ROLES)}
    return results[0]


def names(figures) -> list[str]:
    return [figure.path.name for figure in figures]


def test_every_axis_and_kind_is_drawn_once_and_differs(results, healthy, tmp_path):
    figures = draw_curves(results, AXES, tmp_path) + draw_health(results, tmp_path)
    assert names(figures) == [
        *(f"loss-{axis}.svg" for axis in ("tokens", "flops", "time")),
        *(f"health-{kind}-stacked.svg" for kind in ("relative_update", "activation")),
    ]
    assert len({figure.path.read_bytes() for figure in figures}) == len(figures)


def test_drawings_are_the_same_bytes_whatever_the_users_own_style(results, healthy, tmp_path):
    drawn = []
    for folder, style in (("first", {}), ("second", {"font.size": 20, "axes.grid": True, "svg.hashsalt": None})):
        with matplotlib.rc_context(style):
            figures = draw_curves(results, COUNTED, tmp_path / folder) + draw_health(results, tmp_path / folder)
        drawn.append([figure.path.read_bytes() for figure in figures])
    assert drawn[0] == drawn[1]
    assert not re.search(rb"\d{4}-\d\d-\d\dT|Matplotlib v", b"".join(drawn[0]))


def test_a_dark_page_exchanges_every_colour(results, healthy, tmp_path):
    for figure in draw_curves(results, AXES, tmp_path) + draw_health(results, tmp_path):
        svg = figure.path.read_text()
        rules = dict(re.findall(r'\[style\*="((?:fill|stroke): #\w+)"\] { ((?:fill|stroke): #\w+) !important }', svg))
        used = set(re.findall(r"(?:fill|stroke): #\w+", svg[svg.index("</style>") :]))
        assert used <= set(rules)
        assert {rules[f"fill: {LIGHT.paper}"], rules[f"stroke: {LIGHT.lines[0]}"]} == {
            f"fill: {DARK.paper}",
            f"stroke: {DARK.lines[0]}",
        }


def test_a_run_without_timing_is_left_out_of_the_plot_against_time(results, tmp_path):
    untimed = [dataclasses.replace(result, timing=[]) for result in results]
    assert names(draw_curves([results[0], untimed[1]], TIMED, tmp_path)) == ["loss-time.svg"]
    assert draw_curves(untimed, TIMED, tmp_path) == []


def test_seconds_are_interpolated_between_the_steps_that_were_timed(results):
    assert AXES["time"].values(results[0]) == pytest.approx(np.arange(301) * 92.4 / 300)


def test_without_positive_figures_of_health_there_is_no_plot(results, tmp_path):
    still = [{"step": step, "health/relative_update/vector": 0.0} for step in (0, 50)]
    for metrics in (results[0].metrics, still):
        assert draw_health([dataclasses.replace(results[0], metrics=metrics)], tmp_path) == []


def test_of_many_blocks_some_are_drawn(results, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("stacklm.report.plots._draw_health", lambda lines, *_: seen.append([name for name, _, _ in lines]))
    rows = [{"step": step, **{f"health/activation/block{i}": 1.0 + i for i in range(48)}} for step in (0, 50)]
    draw_health([dataclasses.replace(results[0], metrics=rows)], tmp_path)
    assert len(seen[0]) == MOST_LINES
    assert (seen[0][0], seen[0][-1]) == ("block0", "block47")


def test_labels_are_moved_apart_only_where_they_collide():
    assert spread([1.0, 2.0, 3.0], gap=0.5) == [1.0, 2.0, 3.0]
    apart = spread([1.0, 1.1, 1.1], gap=0.5)
    assert np.diff(apart) == pytest.approx([0.5, 0.5])
    assert np.mean(apart) == pytest.approx(np.mean([1.0, 1.1, 1.1]))
