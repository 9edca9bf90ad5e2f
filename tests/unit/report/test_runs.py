import dataclasses
import re
import subprocess
import sys

import pytest

from stacklm.config.model import Dense
from stacklm.files import read_json, write_json
from stacklm.report.runs import by_model
from support.report_files import MODELS, TRAIN


def test_runs_come_in_the_order_of_the_settings(folders):
    assert [result.name for result in folders.results()] == ["stacked", "dense"]
    assert [result.name for result in folders.results(dict(reversed(MODELS.items())))] == ["dense", "stacked"]


def test_runs_of_a_model_are_found_in_any_order(results):
    stacked, dense = results
    again = dataclasses.replace(stacked, seed=2)
    assert by_model([stacked, dense, again]) == {"stacked": [stacked, again], "dense": [dense]}


def test_leftovers_of_models_no_longer_named_are_ignored(folders):
    (folders.trained / "stacked-1" / "config.json").write_text("not even JSON")
    assert [result.name for result in folders.results({"dense": MODELS["dense"]})] == ["dense"]


@pytest.mark.parametrize("missing", ["trained/dense-1/metrics.jsonl", "trained/dense-1/config.json", "evaluations/dense-1.json"])
def test_a_model_without_results_is_an_error_that_names_it(folders, missing):
    area, _, file = missing.partition("/")
    (getattr(folders, area) / file).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape("model 'dense-1' has no results")):
        folders.results()


@pytest.mark.parametrize(
    ("models", "settings", "message"),
    [
        (
            {"dense": dataclasses.replace(MODELS["dense"], architecture=Dense(128, 4, 5, 512))},
            {},
            "'dense-1' was trained with architecture",
        ),
        (MODELS, {"max_steps": 400}, "trained for 300 steps, but the settings say 400"),
        (MODELS, {"context_length": 64}, "context_length 128, but the settings say 64"),
    ],
)
def test_results_of_other_settings_are_refused(folders, models, settings, message):
    with pytest.raises(ValueError, match=message):
        folders.results(models, dataclasses.replace(TRAIN, **settings))


def test_scores_on_different_texts_are_refused(folders):
    path = folders.evaluations / "dense-1.json"
    evaluation = read_json(path)
    evaluation["test"]["bytes"] += 1
    write_json(path, evaluation)
    with pytest.raises(ValueError, match="different test texts"):
        folders.results()


def test_timing_that_was_cut_short_counts_as_not_measured(folders):
    path = folders.timing / "dense-1.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    stacked, dense = folders.results()
    assert len(stacked.timing) == 30
    assert dense.timing == []


def test_who_reads_times_or_a_comparison_needs_neither_torch_nor_matplotlib():
    code = "import sys, stacklm.report.runs, stacklm.report.tables; sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
