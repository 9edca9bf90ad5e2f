"""Where runs go: MLflow's address, its time limits and the experiment.

By default that is a database in the state folder, which needs no server. `MLFLOW_TRACKING_URI` and
`MLFLOW_EXPERIMENT_NAME` are respected, and so is any limit that the user has set.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from stacklm.pipeline.project import Project
from stacklm.pipeline.tracking import view
from stacklm.pipeline.tracking.notes import EXPERIMENT_NOTE

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "stacklm"
LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
"""A server that hangs costs five seconds once; what is missed is filled in later, so a retry adds nothing."""
WAIT = 30
"""Seconds to wait for another process that works on the same thing."""


def tracking_uri(project: Project) -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{_database(project).as_posix()}"


def artifact_root(project: Project) -> Path:
    """Where files go that belong to runs, unless a tracking server keeps them."""
    return project.state / "mlartifacts"


def experiment_name() -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def is_server(uri: str) -> bool:
    """Whether a server with pages of its own answers there, rather than a database."""
    return uri.startswith(("http:", "https:", "databricks"))


def store_identity(project: Project) -> list:
    """What a receipt is good for: the address, the experiment and, of our own database, the very file."""
    database = _database(project)
    ours = not os.environ.get("MLFLOW_TRACKING_URI") and database.exists()
    return [tracking_uri(project), experiment_name(), database.stat().st_ino if ours else None]


def prepare() -> None:
    """Set what MLflow reads from the environment, before it is imported: no telemetry, short waits, no chatter."""
    for name, value in {"MLFLOW_DISABLE_TELEMETRY": "true", **LIMITS}.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401  (sets the levels of its loggers)

    for name in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)


def connect(project: Project) -> tuple[MlflowClient, str]:
    """A client and the experiment's id; the database and the experiment are made where they are missing.

    Raises whatever MLflow raises where it cannot be reached, and `RuntimeError` for an experiment in MLflow's trash.
    """
    prepare()
    from mlflow import MlflowClient

    uri, name = tracking_uri(project), experiment_name()
    artifacts = artifact_root(project)
    folder = project.state / "tracking"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "setup.lock", timeout=WAIT):
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            _follow_move(_database(project), artifacts)
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            identity = client.create_experiment(name, artifact_location=None if is_server(uri) else artifacts.as_uri())
        elif experiment.lifecycle_stage == "deleted":
            raise RuntimeError(
                f"the experiment {name!r} is in MLflow's trash: restore it there, or choose another by MLFLOW_EXPERIMENT_NAME"
            )
        else:
            identity = experiment.experiment_id
        if experiment is None or "mlflow.note.content" not in experiment.tags:
            client.set_experiment_tag(identity, "mlflow.note.content", EXPERIMENT_NOTE)
            client.set_experiment_tag(identity, "mlflow.experimentKind", "custom_model_development")
            client.set_experiment_tag(identity, view.TAG, view.tag_value())
    return client, identity


def _database(project: Project) -> Path:
    return project.state / "mlflow.db"


def _follow_move(database: Path, artifacts: Path) -> None:
    """MLflow stores the absolute places of artifacts: in a project that was moved or copied, let them follow."""
    if not database.exists():
        return
    with contextlib.closing(sqlite3.connect(database)) as db, db:
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        places = {"runs": "artifact_uri", "logged_models": "artifact_location", "experiments": "artifact_location"}
        if not tables.issuperset(places):
            return
        row = db.execute("SELECT artifact_location FROM experiments WHERE artifact_location LIKE 'file:%/mlartifacts'").fetchone()
        if row and row[0] != artifacts.as_uri():
            for table, column in places.items():
                db.execute(
                    f"UPDATE {table} SET {column} = :new || substr({column}, :n + 1) WHERE substr({column}, 1, :n) = :old",
                    {"old": row[0], "new": artifacts.as_uri(), "n": len(row[0])},
                )
