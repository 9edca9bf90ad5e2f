import json
import shutil
import sqlite3
import subprocess
import sys

import pytest

from stacklm.model.count import count
from stacklm.pipeline.project import Project
from stacklm.pipeline.tracking import weights
from stacklm.pipeline.tracking.run import Pretraining
from stacklm.pipeline.tracking.store import connect
from stacklm.pipeline.tracking.sync import pending, sync_all
from support.tracking_project import (
    MODELS,
    TRAIN,
    VOCAB,
    client,
    curve,
    logged_model,
    metrics,
    publish_evaluation,
    publish_model,
    record,
    runs,
)


def rows(project: Project) -> dict[str, int]:
    """How much MLflow holds, by table."""
    with sqlite3.connect(project.state / "mlflow.db") as db:
        tables = ("runs", "metrics", "params", "tags", "inputs", "datasets", "logged_models", "logged_model_metrics")
        return {table: db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables}


def test_a_published_run_appears_with_all_it_has(synced):
    (run,) = runs(synced)
    sizes = count(MODELS["stacked"].architecture, VOCAB, TRAIN.context_length)
    assert run.info.run_name.startswith("stacked-1 · ")
    assert run.info.status == "FINISHED"
    assert run.info.end_time - run.info.start_time == 10_000  # 20 steps of half a second
    assert run.data.params["train.max_steps"] == "20"
    assert run.data.params["architecture.stacks.1.features"] == "8"
    assert run.data.params["optimizer.peak_lr"] == "0.001"
    assert run.data.params["data.source.kind"] == "stdlib"
    assert run.data.params["tokenizer.special_tokens"] == "<|endoftext|>"
    assert run.data.metrics["model/parameters"] == sizes.total
    assert run.data.metrics["model/training_flops_per_token"] == sizes.training_flops_per_token
    assert run.data.metrics["loss/test"] == 1.5
    assert run.data.tags["stacklm.fingerprint"] == record(synced, "stacked")["fingerprint"]
    assert run.data.tags["kind"] == "stacked" and run.data.tags["version.torch"] == "2.13.0"
    assert "bits per byte on the test set" in run.data.tags["mlflow.note.content"]
    assert "def f(): pass" in run.data.tags["mlflow.note.content"]
    assert len(curve(synced, "loss/train")) == 20


def test_each_split_is_an_input_with_its_use_and_its_scores(synced):
    (run,) = runs(synced)
    used = {tag.value: used.dataset for used in run.inputs.dataset_inputs for tag in used.tags}
    assert {context: data.name for context, data in used.items()} == {
        "training": "stdlib-train",
        "validation": "stdlib-valid",
        "test": "stdlib-test",
    }
    assert {context: json.loads(data.profile)["tokens"] for context, data in used.items()} == {
        "training": 800,
        "validation": 90,
        "test": 80,
    }
    assert len({data.digest for data in used.values()}) == 3
    of = {metric.key: (metric.dataset_name, metric.dataset_digest) for metric in logged_model(synced).metrics}
    assert of["loss/test"] == ("stdlib-test", used["test"].digest)
    assert of["loss/valid_whole"] == ("stdlib-valid", used["validation"].digest)


def test_artifacts_are_complete(synced):
    run, tracker = runs(synced)[0].info.run_id, client(synced)
    assert {f.path for f in tracker.list_artifacts(run)} == {"params.yaml", "tokenizer", "evaluation", "report", "model-card.md"}
    assert {f.path for f in tracker.list_artifacts(run, "tokenizer")} == {"tokenizer/tokenizer.json", "tokenizer/token_bytes.json"}
    assert {f.path for f in tracker.list_artifacts(run, "report")} == {"report/report.md"}
    assert (synced.state / "mlartifacts" / run).is_dir()


def test_the_time_axis_is_training_time(synced):
    (run,) = runs(synced)
    history = client(synced).get_metric_history(run.info.run_id, "loss/valid")
    assert [metric.timestamp - run.info.start_time for metric in history] == [0, 2500, 5000, 7500, 10_000]


def test_a_second_sync_changes_nothing(published):
    sync_all(published)
    before = rows(published)
    for receipt in (published.state / "tracking").glob("*.receipt"):
        receipt.unlink()
    assert len(pending(published)) == 1
    sync_all(published)
    assert rows(published) == before
    assert pending(published) == []


def test_pending_sees_each_change_and_needs_no_mlflow(published):
    sync_all(published)
    assert pending(published) == []
    publish_evaluation(published, "stacked", loss=1.25)
    assert [run.item.run for run in pending(published)] == ["stacked-1"]
    code = (
        "import sys; from pathlib import Path; from stacklm.pipeline.project import Project; "
        "from stacklm.pipeline.tracking.sync import Follower, pending; "
        f"assert len(pending(Project(Path({str(published.root)!r}), Path({str(published.state)!r})))) == 1; "
        "assert not {'mlflow', 'torch'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_new_evaluation_of_the_same_weights_replaces_the_old(published):
    sync_all(published)
    publish_evaluation(published, "stacked", loss=1.25)
    sync_all(published)
    (run,) = runs(published)
    assert run.data.metrics["loss/test"] == 1.25
    assert run.data.metrics["benchmarks/blimp/accuracy"] == 1.25 / 3
    assert "| 1.25 | 1.25 |" in run.data.tags["mlflow.note.content"]


def test_an_evaluation_of_other_weights_is_not_shown(published):
    publish_model(published, "stacked", weights=2)
    assert sync_all(published)
    (run,) = runs(published)
    assert "loss/test" not in run.data.metrics
    assert {f.path for f in client(published).list_artifacts(run.info.run_id)} == {"params.yaml", "tokenizer"}


def test_each_model_has_its_run_and_a_repetition_says_so(published, monkeypatch):
    publish_model(published, "dense")
    sync_all(published)
    monkeypatch.setattr("support.tracking_project.TRAIN", TRAIN.__class__(**{**TRAIN.__dict__, "max_grad_norm": 2.0}))
    publish_model(published, "dense")
    sync_all(published)
    names = sorted(run.info.run_name for run in runs(published))
    assert [name.split(" · ")[0] for name in names] == ["dense-1", "dense-1", "stacked-1"]
    assert names[1] == f"{names[0]} · run 2"


def test_a_settings_file_edited_after_training_does_not_change_what_was_noted(published):
    run = next(Pretraining.finished(published))
    run.begin(record(published, "stacked"))
    (published.root / "out/records/download.json").write_text('{"params": {"data": {"source": {"kind": "files", "paths": ["x"]}}}}')
    sync_all(published)
    assert runs(published)[0].data.params["data.source.kind"] == "stdlib"


def test_a_dead_tracker_is_a_warning_and_is_filled_in_later(published, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert sync_all(published) is False
    assert "MLflow at http://127.0.0.1:1 could not be brought up to date" in capsys.readouterr().err
    assert len(pending(published)) == 1
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert sync_all(published)
    assert len(curve(published, "loss/train")) == 20


def test_address_and_experiment_of_the_user_are_respected(published, monkeypatch, tmp_path):
    shutil.copyfile(published.state / "mlflow.db", tmp_path / "theirs.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{(tmp_path / 'theirs.db').as_posix()}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "scales")
    assert sync_all(published)
    (run,) = runs(published)
    assert client(published).get_experiment(run.info.experiment_id).name == "scales"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert len(pending(published)) == 1, "another address knows nothing of it"


def test_an_experiment_in_the_trash_is_named(published, capsys):
    tracker, experiment = connect(published)
    tracker.delete_experiment(experiment)
    assert sync_all(published) is False
    assert "is in MLflow's trash" in capsys.readouterr().err


def test_the_experiment_explains_itself_and_has_a_saved_view(synced):
    tracker, experiment = connect(synced)
    tags = tracker.get_experiment(experiment).tags
    assert "Which model is better?" in tags["mlflow.note.content"]
    assert json.loads(tags["mlflow.sharedViewState.comparison"])["name"] == "Comparison"


def test_two_processes_make_the_database_at_once(tmp_path):
    code = (
        "from pathlib import Path; from stacklm.pipeline.project import Project; "
        "from stacklm.pipeline.tracking.store import connect; "
        f"print(connect(Project(Path({str(tmp_path)!r}), Path({str(tmp_path / '.stacklm')!r})))[1])"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0] and said[0] == said[1]


@pytest.mark.parametrize("link", [False, True])
def test_the_model_has_a_signature_and_a_large_one_is_linked(published, monkeypatch, link):
    if link:
        monkeypatch.setattr(weights, "LARGEST_COPY", 10)
    sync_all(published)
    (run,) = runs(published)
    model = logged_model(published)
    assert model.source_run_id == run.info.run_id and model.status == "READY" and model.name == "stacked"
    assert {metric.key for metric in model.metrics} >= {"bits_per_byte/test", "loss/test"}
    files = {f.path for f in client(published).list_logged_model_artifacts(model.model_id)}
    assert {"MLmodel", "requirements.txt", "python_env.yaml", "input_example.json", "data"} <= files
    stored = {path.name for path in published.state.joinpath("mlartifacts", "models", model.model_id).rglob("*")}
    assert {"config.json", "tokenizer.json"} <= stored
    assert ("model.safetensors" in stored) != link
    assert ("stacklm.link" in model.tags) == link


def test_curves_of_a_run_cut_short_are_completed(published):
    sync_all(published)
    with sqlite3.connect(published.state / "mlflow.db") as db:
        db.execute("DELETE FROM metrics WHERE key = 'loss/train' AND step > 7")
        db.execute("UPDATE runs SET status = 'RUNNING'")
    for receipt in (published.state / "tracking").glob("*.receipt"):
        receipt.unlink()
    sync_all(published)
    assert curve(published, "loss/train") == [(row["step"], row["train_loss"]) for row in metrics(20)[1:]]
    assert runs(published)[0].info.status == "FINISHED"
