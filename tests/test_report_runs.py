import dataclasses
import re

import pytest
from report_files import MODELS, TRAIN, Folders

from stacklm.config.model import Dense
from stacklm.files import read_json, write_json

FLOORS = {"stacked": 3.31, "dense": 3.22}


@pytest.fixture
def folders(tmp_path):
    return Folders(tmp_path, FLOORS)


def test_runs_come_in_the_order_of_the_settings(folders):
    assert [run.name for run in folders.runs()] == ["stacked", "dense"]
    assert [run.name for run in folders.runs(dict(reversed(MODELS.items())))] == ["dense", "stacked"]


def test_leftovers_of_models_no_longer_named_are_ignored(folders):
    (folders.trained / "stacked" / "config.json").write_text("not even JSON")
    assert [run.name for run in folders.runs({"dense": MODELS["dense"]})] == ["dense"]


@pytest.mark.parametrize("missing", ["trained/dense/metrics.jsonl", "trained/dense/config.json", "evaluations/dense.json"])
def test_a_model_without_results_is_an_error_that_names_it(folders, missing):
    area, _, file = missing.partition("/")
    (getattr(folders, area) / file).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape("model 'dense' has no results")):
        folders.runs()


def test_results_of_other_settings_are_refused(folders):
    other = {"dense": dataclasses.replace(MODELS["dense"], architecture=Dense(128, 4, 5, 512))}
    with pytest.raises(ValueError, match="'dense' was trained with architecture"):
        folders.runs(other)
    with pytest.raises(ValueError, match="trained for 300 steps, but the settings say 400"):
        folders.runs(config=dataclasses.replace(TRAIN, steps=400))
    with pytest.raises(ValueError, match="context 128, but the settings say 64"):
        folders.runs(config=dataclasses.replace(TRAIN, context=64))


def test_scores_on_different_texts_are_refused(folders):
    path = folders.evaluations / "dense.json"
    evaluation = read_json(path)
    evaluation["test"]["bytes"] += 1
    write_json(path, evaluation)
    with pytest.raises(ValueError, match="different test texts"):
        folders.runs()


def test_timing_of_a_run_of_another_length_counts_as_not_measured(folders):
    path = folders.timing / "dense.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    stacked, dense = folders.runs()
    assert len(stacked.timing) == 30
    assert dense.timing == []
