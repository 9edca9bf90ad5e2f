import base64
import json
import zlib

from stacklm.model.count import ROLES
from stacklm.pipeline.tracking import pages
from stacklm.pipeline.tracking.run import METRICS, POINTS, PROGRESS, TIMING, points
from support.tracking_project import metrics, timing


def by_key(key: str, found: list) -> list:
    return [point for point in found if point.key == key]


def test_every_figure_becomes_a_curve_over_the_training_step():
    found = points(metrics(20), timing(20), 20)
    assert {point.key for point in found} == {*METRICS.values(), *PROGRESS.values(), *(key for key, _ in TIMING.values())} - {
        "system/gpu_0_memory_usage_megabytes"
    }
    assert [(p.step, round(p.value, 6)) for p in by_key("loss/valid", found)] == [
        (0, 3.6),
        (5, 3.1),
        (10, 2.6),
        (15, 2.1),
        (20, 1.6),
    ]
    assert [p.step for p in by_key("loss/train", found)] == list(range(1, 21))
    assert by_key("system/process_memory_megabytes", found)[0].value == 300


def test_figures_of_health_are_curves_by_their_own_names_whichever_there_are():
    rows = metrics(10)
    rows[0]["health/activation/stack0"] = 0.5
    rows[10] |= {"health/activation/stack0": 0.75, "health/update/matrix": 2.0}
    found = points(rows, timing(10), 10)
    health = [(p.key, p.step, p.value, p.seconds) for p in found if p.key.startswith("health/")]
    assert health == [
        ("health/activation/stack0", 0, 0.5, 0),
        ("health/activation/stack0", 10, 0.75, 5),
        ("health/update/matrix", 10, 2.0, 5),
    ]
    assert [p for p in found if not p.key.startswith("health/")] == points(metrics(10), timing(10), 10)


def test_points_know_the_seconds_of_training_also_between_timed_steps():
    found = points(metrics(20), [row for row in timing(20) if row["step"] % 4 == 0], 20)
    assert [p.seconds for p in by_key("loss/valid", found)] == [0, 2.5, 5, 7.5, 10]


def test_before_the_first_and_after_the_last_timed_step_time_stands_still():
    late = [{"step": 10, "seconds": 4.0, "tokens_per_second": 1.0}]
    seconds = {p.step: p.seconds for p in by_key("progress/tokens", points(metrics(20), late, 20))}
    assert seconds[0] == 0 and seconds[5] == 2 and seconds[20] == 4
    assert {p.seconds for p in points(metrics(20), [], 20)} == {0}


def test_what_validation_is_drawn_over_has_points_where_that_has_one():
    """Charts of grouped runs pair the points of two metrics by their order, not by their steps."""
    sparse = [row for row in timing(20) if row["step"] in (4, 8, 12)]  # of a run that grows: the last times are still to come
    found = points(metrics(20), sparse, 20)
    steps = [p.step for p in by_key("bits_per_byte/valid", found)]
    assert [p.step for p in by_key("progress/tokens", found)] == [p.step for p in by_key("progress/training_flops", found)] == steps
    assert [(p.step, p.value) for p in by_key("progress/seconds", found)] == [(0, 0), (5, 2.5), (10, 5)]
    assert [p.value for p in by_key("progress/tokens", found)] == [16 * step for step in steps]


def test_a_long_curve_is_thinned_and_keeps_its_last_step():
    steps = 10 * POINTS + 7
    rows = [{"step": s, "train_loss": float(s)} for s in range(steps + 1)]
    found = [p.step for p in points(rows, [], steps)]
    assert POINTS // 2 < len(found) <= POINTS + 2
    assert found[-1] == steps and found == sorted(set(found))


def test_a_growing_run_draws_a_beginning_of_the_same_points():
    steps = 3 * POINTS
    rows = [{"step": s, "train_loss": float(s)} for s in range(0, steps + 1, 2)]
    whole = points(rows, [], steps)
    assert points(rows[:1001], [], steps) == whole[: len(points(rows[:1001], [], steps))]


def test_the_saved_view_shows_metrics_that_exist():
    scores = {f"{score}/{split}" for score in ("bits_per_byte", "loss") for split in ("test", "valid_whole")}
    size = {"model/parameters", "model/body_parameters", "model/training_flops_per_token"}
    health = {f"health/relative_update/{role}" for parameters in ROLES.values() for role in parameters.values()}
    known = {*METRICS.values(), *PROGRESS.values(), *(key for key, _ in TIMING.values()), *scores, *size, *health, "step", None}
    assert {name for charts in pages.SECTIONS.values() for chart in charts for name in chart} <= known


def test_the_titles_of_charts_fit_and_differ_and_models_are_not_nested():
    packed = json.loads(pages.tag_value())["state"].removeprefix("deflate;")
    state = json.loads(zlib.decompress(base64.b64decode(packed)))
    # MLflow makes titles of these keys, and cuts what is longer than some 45 letters where two charts share 820 pixels.
    titles = [" vs ".join(chart.get("selectedMetricKeys", [chart["metricKey"]])) for chart in state["compareRunCharts"]]
    assert len(set(titles)) == len(titles) and max(map(len, titles)) <= 40
    assert state["runListHidden"] and {section["columns"] for section in state["compareRunSections"]} == {2}
    assert state["orderByKey"] != "attributes.start_time"  # MLflow nests runs that are ordered by time
    assert pages.is_current(pages.tag_value()) and not pages.is_current(None) and not pages.is_current('{"state": "deflate;x"}')
