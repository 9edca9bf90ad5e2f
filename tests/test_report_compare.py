import re

import pytest
from report_files import MODELS, TRAIN, Folders

from stacklm.files import read_json, sha256
from stacklm.report.compare import compare


def run(root, folders, models=MODELS):
    compare(
        models=models,
        config=TRAIN,
        trained=folders.trained,
        evaluations=folders.evaluations,
        shards=folders.shards,
        timing=folders.timing,
        comparison=root / "comparison.json",
        report=root / "report",
    )


@pytest.fixture
def folders(tmp_path):
    return Folders(tmp_path / "in", {"stacked": 3.31, "dense": 3.22})


def test_equal_inputs_give_equal_bytes(folders, tmp_path, capsys):
    for name in ("first", "second"):
        run(tmp_path / name, folders)
    assert sha256(tmp_path / "first") == sha256(tmp_path / "second")
    assert "One seed: a direction, not a result." in capsys.readouterr().out


def test_the_comparison_holds_no_times(folders, tmp_path):
    run(tmp_path / "timed", folders)
    for path in folders.timing.iterdir():
        path.unlink()
    run(tmp_path / "untimed", folders)
    assert sha256(tmp_path / "timed" / "comparison.json") == sha256(tmp_path / "untimed" / "comparison.json")
    assert "training time not measured" in (tmp_path / "untimed" / "report" / "index.html").read_text(encoding="utf-8")


def test_the_data_is_named_by_the_hash_of_its_manifest(folders, tmp_path):
    run(tmp_path, folders)
    found = read_json(tmp_path / "comparison.json")["provenance"]["data_sha256"]
    assert found == sha256(folders.shards / "manifest.json")
    assert found in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")


def test_a_missing_model_leaves_nothing_behind(folders, tmp_path):
    models = {**MODELS, "third": MODELS["dense"]}
    with pytest.raises(FileNotFoundError, match=re.escape("model 'third' has no results")):
        run(tmp_path, folders, models)
    assert not (tmp_path / "report").exists()
    assert not (tmp_path / "comparison.json").exists()
