"""The location of runs: the same URI everywhere, and paths with any characters."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from stacklm.pipeline.project import Project
from stacklm.pipeline.tracking.store import connect, sqlite_file, tracking_uri
from stacklm.pipeline.tracking.sync import pending, sync_all
from support.tracking_project import client, isolate, make_project, prepare_data, publish, publish_model, runs

ODD = "50%41 a?b=1#c;ü'\"`|_%_"
READ = """
import json, mlflow, sys
client = mlflow.MlflowClient()
(run,) = client.search_runs(["1"], "tags.model = 'stacked'")
report = open(client.download_artifacts(run.info.run_id, "report/report.md")).read()
uris = [f"runs:/{run.info.run_id}/stacked", "models:/stacklm@champion"] if sys.argv[1:] else []
models = [mlflow.pyfunc.load_model(uri) for uri in uris]
texts = [model.predict(["def "], params={"max_new_tokens": 4, "temperature": 0.0}) for model in models]
paths = [file.path for file in client.list_artifacts(run.info.run_id)]
print(json.dumps({"paths": paths, "report": report, "texts": texts}))
"""


def read_elsewhere(project: Project, folder: Path, *load: str) -> dict:
    """What MLflow alone finds of the project's run in a process of its own, started in another folder."""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": tracking_uri(project)}
    words = [sys.executable, "-W", "ignore", "-c", READ, *load]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("before", "after", "load"),
    [
        pytest.param(ODD, "moved %", [], marks=pytest.mark.skipif(os.name == "nt", reason="no names on Windows")),
        # MLflow itself loads no models from paths like the first
        pytest.param("before", "after", ["models"], marks=pytest.mark.slow),
    ],
)
def test_a_project_keeps_everything_inside_and_may_move(tmp_path, mlflow_database, monkeypatch, before, after, load):
    isolate(monkeypatch)
    outer = tmp_path / "outer"
    first, second = make_project(outer / before, mlflow_database), Project(outer / after, outer / after / ".stacklm")
    assert sync_all(publish(first, "stacked", "dense", best="stacked"))
    found = read_elsewhere(first, tmp_path, *load)
    assert set(found["paths"]) == {"params.yaml", "tokenizer", "evaluation", "report", "model-card.md"}
    assert len(list(first.state.glob("mlartifacts/*/artifacts/report/report.md"))) == 2
    assert [path.name for path in outer.iterdir()] == [before]

    first.root.rename(second.root)
    assert sync_all(second) and len(runs(second)) == 2
    again = read_elsewhere(second, tmp_path, *load)
    assert again == found
    assert [path.name for path in outer.iterdir()] == [after]
    # A canary: no address of artifacts in MLflow's tables names a folder.
    with closing(sqlite3.connect(second.state / "mlflow.db")) as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        texts = [value for table in tables for row in db.execute(f"SELECT * FROM [{table}]") for value in row]
    assert not [text for text in texts if isinstance(text, str) and "/mlartifacts" in text]


def test_runs_of_an_earlier_version_stay_readable_and_a_moved_project_begins_a_new_experiment(tmp_path, project):
    """Earlier versions kept absolute paths: a copy must not write into the artifacts of the original."""
    tracker = client(project)
    tracker.rename_experiment(tracker.get_experiment_by_name("stacklm").experiment_id, "unused")
    old = (project.state / "mlartifacts").as_uri()
    tracker.create_experiment("stacklm", artifact_location=old)
    publish_model(project, "stacked")
    assert sync_all(project)
    (run,) = runs(project)
    assert run.info.artifact_uri.startswith(old)
    assert (project.state / "mlartifacts" / run.info.run_id / "artifacts" / "params.yaml").exists()

    copy = Project(tmp_path / "copy", tmp_path / "copy" / ".stacklm")
    shutil.copytree(project.root, copy.root, ignore=shutil.ignore_patterns("copy"))
    assert sync_all(copy)
    found = {e.name: e.artifact_location for e in client(copy).search_experiments()}
    assert (found["stacklm"], found[f"stacklm (files in {old})"]) == ("stacklm:/", old)
    (again,) = runs(copy)
    assert again.info.run_id != run.info.run_id
    assert (copy.state / "mlartifacts" / again.info.run_id / "artifacts" / "params.yaml").exists()


def test_an_installation_that_does_not_declare_the_plugin_is_told_what_to_do(project, monkeypatch, capsys):
    monkeypatch.setattr("stacklm.pipeline.tracking.store.entry_points", lambda **_: ())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "new")
    publish_model(project, "stacked")
    assert pending(project) and not sync_all(project)
    assert "run `pip install -e .` again" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["./mlruns", "mlruns", "file:./runs", "file:///tmp/runs", "C:\\runs", "D:/runs", "/tmp/runs"])
def test_a_folder_is_refused_with_what_to_name_instead(tmp_path, monkeypatch, capsys, given):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    project = Project(tmp_path, tmp_path / ".stacklm")
    with pytest.raises(RuntimeError, match=r"is a folder.*sqlite:///mlflow\.db"):
        connect(project)
    prepare_data(project)
    publish_model(project, "dense")
    assert sync_all(project) is False
    assert f"MLflow at {given} could not be brought up to date (MLFLOW_TRACKING_URI={given} is a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("sqlite:///mine.db", "sqlite:///{root}/mine.db"),
        ("sqlite:///./sub/mine.db?timeout=30", "sqlite:///{root}/sub/mine.db?timeout=30"),
        ("sqlite:////elsewhere/mine.db", "sqlite:////elsewhere/mine.db"),
        ("sqlite:////else%41where/100%25/mine.db", "sqlite+pysqlite:////elseAwhere/100%25/mine.db"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("postgresql://me:p%40ss@host/db", "postgresql://me:p%40ss@host/db"),
        ("databricks", "databricks"),
        ("", "sqlite:///{root}/.stacklm/mlflow.db"),
    ],
)
def test_an_address_is_the_same_in_every_working_directory(monkeypatch, tmp_path, given, expected):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    project = Project(Path("/p") / ".dvc/tmp/exps/x", Path("/p/.stacklm"))
    for folder in (tmp_path, tmp_path.parent):
        monkeypatch.chdir(folder)
        assert tracking_uri(project) == expected.format(root="/p")


def test_a_path_that_is_not_utf8_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / os.fsdecode(b"caf\xe9")
    with pytest.raises(RuntimeError, match="valid UTF-8"):
        tracking_uri(Project(root, root / ".stacklm"))


def test_a_database_that_cannot_be_opened_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///damaged.db")
    project = Project(tmp_path, tmp_path / ".stacklm")
    sqlite_file(project).write_text("no database, and longer than the header of one " * 9)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        connect(project)
