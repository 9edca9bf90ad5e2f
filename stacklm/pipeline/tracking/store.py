"""Where runs are stored: MLflow's tracking URI (independent of the working directory), the connection and the experiment.

The default is a SQLite database in the state folder, which needs no server, with the artifacts beside it.
`MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME` and timeouts set by the user are respected.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sqlite3
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

from filelock import FileLock

from stacklm.files import read_json
from stacklm.pipeline.project import STATE, Project
from stacklm.pipeline.tracking import pages

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

EXPERIMENT = "stacklm"
LOCAL_PAGES = "http://127.0.0.1:5000"
"""Default URL of `stacklm ui`."""
URI = "MLFLOW_TRACKING_URI"
DATABASE, ARTIFACTS, SCHEME = "mlflow.db", "mlartifacts", "stacklm"
"""The project's database, its artifact folder, and the scheme of artifact URIs; see `stacklm.pipeline.tracking.artifacts`."""
LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
"""A hanging server costs five seconds once; missing data is logged later, so a retry is not needed."""
WAIT = 30
"""Seconds to wait for the lock of another process."""


def tracking_uri(project: Project) -> str:
    """Return the tracking URI. Raises `RuntimeError` for a folder, and for a path that cannot be part of a URI."""
    file = sqlite_file(project)
    if file is None:
        return os.environ[URI]
    try:
        quoted = quote(file.as_posix(), safe="/:", errors="strict")
    except UnicodeEncodeError:
        raise RuntimeError(f"{file}: MLflow needs a path in valid UTF-8: rename the folder") from None
    # SQLAlchemy unquotes the path; MLflow creates its folder without doing so, unless the driver is named.
    driver = "" if quoted == file.as_posix() else "+pysqlite"
    options = "".join(os.environ.get(URI, "").partition("?")[1:])
    return f"sqlite{driver}:///{quoted}{options}"


def sqlite_file(project: Project) -> Path | None:
    """Return the path of the SQLite database, relative to the main checkout if not absolute; None if runs are stored elsewhere.

    Raises `RuntimeError` for a folder.
    """
    given = os.environ.get(URI)
    if not given:
        return project.state / DATABASE
    scheme = urlsplit(given).scheme
    if not is_server(given) and (scheme in ("", "file") or len(scheme) == 1):  # one letter: a Windows drive
        raise RuntimeError(
            f"{URI}={given} is a folder, and MLflow no longer stores runs in folders: "
            "set it to a database, such as sqlite:///mlflow.db, or a server, such as http://127.0.0.1:5000"
        )
    local = database_in(given)
    return project.state.parent / local if local else None


def database_in(uri: str) -> Path | None:
    """Return the SQLite file that a URI names, relative or absolute; None for another kind of database or one in memory."""
    local = re.fullmatch(r"sqlite(\+pysqlite)?:///(?P<path>[^?:][^?]*)(\?.*)?", uri)
    return Path(unquote(local["path"])) if local else None


def shown_uri(project: Project) -> str:
    """Return the tracking URI or database path to show in messages; never raises."""
    return os.environ.get(URI) or str(project.state / DATABASE)


def is_server(uri: str) -> bool:
    """Return whether the URI is of a tracking server, which has its own UI, rather than of a database."""
    return uri.startswith(("http:", "https:", "databricks"))


def experiment_name() -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def artifact_root(project: Project) -> str:
    """Return the URI of the artifact folder of the runs, unless a tracking server stores them.

    With the project's own database it contains no path, so that the project can be moved and copied. Raises `RuntimeError` if
    MLflow cannot find the plugin of stacklm.
    """
    if not _is_ours(project):
        return (project.state / ARTIFACTS).as_uri()
    if not entry_points(group="mlflow.artifact_repository", name=SCHEME):
        raise RuntimeError("the installation of stacklm is older than its code: run `pip install -e .` again")
    return f"{SCHEME}:/"


def store_identity(project: Project) -> list:
    """Return what a receipt is valid for: tracking URI, experiment and, for a local database, the inode of its file."""
    file = sqlite_file(project)
    return [tracking_uri(project), experiment_name(), file.stat().st_ino if file and file.exists() else None]


def matches(receipt: Path, stamp: Any) -> bool:
    """Return whether the receipt exists and its content equals `stamp`."""
    return receipt.exists() and read_json(receipt) == stamp


def prepare() -> None:
    """Set MLflow's environment variables before it is imported: no telemetry, short timeouts, errors only."""
    for name, value in {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", **LIMITS}.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401  (sets the levels of its loggers)

    for name in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)


def connect(project: Project, name: str | None = None, note: str = pages.EXPERIMENT_NOTE) -> tuple[MlflowClient, str]:
    """Return a client and the experiment's id; a missing database or experiment is created.

    Without a name it is the experiment of the pipeline, which has a saved view.

    Raises whatever MLflow raises if it is not reachable, and `RuntimeError` for a tracking URI that cannot be used and for an
    experiment in MLflow's trash.
    """
    prepare()
    from mlflow import MlflowClient

    uri, viewed, file = tracking_uri(project), name is None, sqlite_file(project)
    name = name or experiment_name()
    with FileLock(project.state / "tracking" / "setup.lock", timeout=WAIT):
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(file)) as db:  # fails at once; MLflow would retry for minutes
                db.execute("SELECT 1 FROM sqlite_master")
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(name)
        if experiment and _is_elsewhere(project, experiment):
            client.rename_experiment(experiment.experiment_id, f"{name} (files in {experiment.artifact_location})")
            experiment = None
        if experiment is None:
            location = None if is_server(uri) else artifact_root(project)
            experiment = client.get_experiment(client.create_experiment(name, artifact_location=location))
        if experiment.lifecycle_stage == "deleted":
            raise RuntimeError(
                f"the experiment {name!r} is in MLflow's trash: restore it there, or choose another with MLFLOW_EXPERIMENT_NAME"
            )
        identity = experiment.experiment_id
        if "mlflow.note.content" not in experiment.tags:
            client.set_experiment_tag(identity, "mlflow.note.content", note)
            client.set_experiment_tag(identity, "mlflow.experimentKind", "custom_model_development")
        if viewed and not pages.is_current(experiment.tags.get(pages.TAG)):
            client.set_experiment_tag(identity, pages.TAG, pages.tag_value())
    return client, identity


def _is_ours(project: Project) -> bool:
    return sqlite_file(project) == project.state / DATABASE


def _is_elsewhere(project: Project, experiment: Experiment) -> bool:
    """Return whether an experiment of an earlier version, with absolute artifact paths, is of a project since moved or copied."""
    location = experiment.artifact_location
    return _is_ours(project) and location.endswith(f"/{STATE}/{ARTIFACTS}") and location != (project.state / ARTIFACTS).as_uri()
