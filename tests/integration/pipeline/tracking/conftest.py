"""What the tracking tests start from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from stacklm.pipeline.project import Project
from stacklm.pipeline.tracking.store import connect
from support.tracking_project import isolate, prepare_data, publish_evaluation, publish_model, publish_report


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """MLflow's database, empty: making one takes a second, copying it does not."""
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch)
        root = tmp_path_factory.mktemp("database")
        connect(Project(root, root / ".stacklm"))
        yield root / ".stacklm" / "mlflow.db"


@pytest.fixture
def project(tmp_path: Path, mlflow_database: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project in which all is ready to pretrain, tracked in a database of its own."""
    isolate(monkeypatch)
    project = Project(tmp_path, tmp_path / ".stacklm")
    project.state.mkdir()
    shutil.copyfile(mlflow_database, project.state / "mlflow.db")
    prepare_data(project)
    return project


@pytest.fixture
def published(project: Project) -> Project:
    """The same after every stage has run, for one model."""
    publish_model(project, "stacked")
    publish_evaluation(project, "stacked")
    publish_report(project)
    return project
