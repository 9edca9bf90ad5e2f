import re
import shutil

import pytest

from stacklm.files import read_json, sha256, write_json
from stacklm.report.compare import compare
from support.report_files import MODELS, TRAIN, Folders


def run(root, folders, models=MODELS):
    compare(
        models=models,
        seeds=tuple(folders.seeds),
        config=TRAIN,
        trained=folders.trained,
        evaluations=folders.evaluations,
        shards=folders.shards,
        timing=folders.timing,
        comparison=root / "comparison.json",
        metrics=root / "metrics.json",
        curves=root / "curves",
        report=root / "report",
        speed=root / "speed",
    )


def test_equal_inputs_give_equal_bytes(folders, tmp_path, capsys):
    for name in ("first", "second"):
        run(tmp_path / name, folders)
    assert sha256(tmp_path / "first") == sha256(tmp_path / "second")
    assert "One seed: indicative only, no verdict." in capsys.readouterr().out


def test_all_but_the_folder_speed_is_the_same_with_and_without_times(folders, tmp_path):
    run(tmp_path / "timed", folders)
    for path in folders.timing.iterdir():
        path.unlink()
    run(tmp_path / "untimed", folders)
    timed, untimed = ((tmp_path / name / "speed" / "speed.md").read_text() for name in ("timed", "untimed"))
    assert "| training time | 1 min 32 s |" in timed and "loss-time.svg" in timed
    assert "| training time | not measured | not measured |" in untimed and "loss-time" not in untimed
    for name in ("timed", "untimed"):
        shutil.rmtree(tmp_path / name / "speed")
    assert sha256(tmp_path / "timed") == sha256(tmp_path / "untimed")


def test_times_of_other_weights_are_not_shown(folders, tmp_path):
    """DVC restores a model from its cache, and not the times, which are then those of the model before it."""
    config = folders.trained / "dense-1" / "config.json"
    write_json(config, {**read_json(config), "sha256": "other"})
    run(tmp_path, folders)
    assert re.search(r"\| training time \| 1 min 32 s \| not measured \|", (tmp_path / "speed" / "speed.md").read_text())


def test_the_data_is_named_by_the_hash_of_its_manifest(folders, tmp_path):
    run(tmp_path, folders)
    found = read_json(tmp_path / "comparison.json")["provenance"]["data_sha256"]
    assert found == sha256(folders.shards / "manifest.json")
    assert found in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")


def test_a_missing_model_leaves_nothing_behind(folders, tmp_path):
    models = {**MODELS, "third": MODELS["dense"]}
    with pytest.raises(FileNotFoundError, match=re.escape("model 'third-1' has no results")):
        run(tmp_path, folders, models)
    assert not (tmp_path / "report").exists()
    assert not (tmp_path / "comparison.json").exists()


def test_with_seeds_enough_the_report_begins_with_verdicts_and_their_plot(tmp_path, capsys):
    noise = {(name, seed): 0.01 * seed * (1 + (name == "dense")) for name in MODELS for seed in (1, 2, 3)}
    run(tmp_path / "made", Folders(tmp_path / "in", {"stacked": 3.31, "dense": 3.22}, noise))
    report = tmp_path / "made" / "report"
    text = (report / "report.md").read_text(encoding="utf-8")
    (pair,) = read_json(tmp_path / "made" / "comparison.json")["pairs"]
    assert text.index("## Verdicts") < text.index("## Loss during training")
    assert f"| stacked against dense | {pair['mean']:+.2%} | {pair['low']:+.2%} to {pair['high']:+.2%} |" in text
    assert "](verdicts.svg)" in text and (report / "verdicts.svg").is_file()
    assert (report / "index.html").read_text(encoding="utf-8").index("Verdicts") > 0
    assert f"over 3 seeds: stacked needs {pair['mean']:.1%} more" in capsys.readouterr().out
    rows = (tmp_path / "made" / "curves" / "dense.csv").read_text().splitlines()
    assert len(rows) == 1 + TRAIN.max_steps // TRAIN.eval_every
