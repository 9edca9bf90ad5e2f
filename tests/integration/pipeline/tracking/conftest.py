"""What the tracking tests start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from stacklm.pipeline.project import Project
from stacklm.pipeline.tracking.store import connect
from stacklm.pipeline.tracking.sync import sync_all
from support.tracking_project import isolate, make_project, publish


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
    return make_project(tmp_path, mlflow_database)


@pytest.fixture
def published(project: Project) -> Project:
    """The same after every stage has run, for one model."""
    return publish(project, "stacked")


@pytest.fixture(scope="session")
def synced(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path) -> Project:
    """One that is published and in MLflow, to be read and not changed: giving all of it to MLflow takes seconds."""
    project = publish(make_project(tmp_path_factory.mktemp("synced"), mlflow_database), "stacked")
    assert sync_all(project)
    return project
