"""Where the runs are kept: MLflow's address, the same from every working directory, the connection and the experiment.

By default that is a database in the state folder, which needs no server, with the artifacts beside it. `MLFLOW_TRACKING_URI`
and `MLFLOW_EXPERIMENT_NAME` are respected, and so is a time limit that the user has set.
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
"""Where `stacklm ui` serves unless it is told another port."""
URI = "MLFLOW_TRACKING_URI"
DATABASE, ARTIFACTS, SCHEME = "mlflow.db", "mlartifacts", "stacklm"
"""Our database, the folder beside it, and the scheme of addresses there; see `stacklm.pipeline.tracking.artifacts`."""
LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
"""A server that hangs costs five seconds once; what is missed is filled in later, so a retry adds nothing."""
WAIT = 30
"""Seconds to wait for another process that works on the same thing."""


def tracking_uri(project: Project) -> str:
    """The address for MLflow. Raises `RuntimeError` for a folder, and for a path that cannot be part of an address."""
    file = sqlite_file(project)
    if file is None:
        return os.environ[URI]
    try:
        quoted = quote(file.as_posix(), safe="/:", errors="strict")
    except UnicodeEncodeError:
        raise RuntimeError(f"{file}: MLflow needs a path of valid UTF-8: rename the folder") from None
    # SQLAlchemy unquotes the path; MLflow creates its folder without doing so, unless the driver is named.
    driver = "" if quoted == file.as_posix() else "+pysqlite"
    options = "".join(os.environ.get(URI, "").partition("?")[1:])
    return f"sqlite{driver}:///{quoted}{options}"


def sqlite_file(project: Project) -> Path | None:
    """The database, a relative one from the main checkout; None where runs are kept elsewhere.

    Raises `RuntimeError` for a folder.
    """
    given = os.environ.get(URI)
    if not given:
        return project.state / DATABASE
    scheme = urlsplit(given).scheme
    if not is_server(given) and (scheme in ("", "file") or len(scheme) == 1):  # one letter: a drive of Windows
        raise RuntimeError(
            f"{URI}={given} is a folder, and MLflow no longer keeps runs in folders: "
            "name a database, such as sqlite:///mlflow.db, or a server, such as http://127.0.0.1:5000"
        )
    local = database_in(given)
    return project.state.parent / local if local else None


def database_in(uri: str) -> Path | None:
    """The SQLite file that an address names, relative or absolute; None for a database of another kind or in memory."""
    local = re.fullmatch(r"sqlite(\+pysqlite)?:///(?P<path>[^?:][^?]*)(\?.*)?", uri)
    return Path(unquote(local["path"])) if local else None


def shown_uri(project: Project) -> str:
    """The address as people know it; never raises."""
    return os.environ.get(URI) or str(project.state / DATABASE)


def is_server(uri: str) -> bool:
    """Whether a server with pages of its own answers there, rather than a database."""
    return uri.startswith(("http:", "https:", "databricks"))


def experiment_name() -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def artifact_root(project: Project) -> str:
    """The address of the folder for files that belong to runs, unless a tracking server keeps them.

    Beside our own database it holds no path, so that the project may be moved and copied. Raises `RuntimeError` where MLflow
    cannot find our plugin.
    """
    if not _is_ours(project):
        return (project.state / ARTIFACTS).as_uri()
    if not entry_points(group="mlflow.artifact_repository", name=SCHEME):
        raise RuntimeError("this installation of stacklm is older than its code: run `pip install -e .` once more")
    return f"{SCHEME}:/"


def store_identity(project: Project) -> list:
    """What a receipt is good for: the address, the experiment and, of a database on this machine, the very file."""
    file = sqlite_file(project)
    return [tracking_uri(project), experiment_name(), file.stat().st_ino if file and file.exists() else None]


def matches(receipt: Path, stamp: Any) -> bool:
    """Whether the receipt is there and for just this."""
    return receipt.exists() and read_json(receipt) == stamp


def prepare() -> None:
    """Set what MLflow reads from the environment, before it is imported: no telemetry, short waits, no chatter."""
    for name, value in {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", **LIMITS}.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401  (sets the levels of its loggers)

    for name in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)


def connect(project: Project, name: str | None = None, note: str = pages.EXPERIMENT_NOTE) -> tuple[MlflowClient, str]:
    """A client and the experiment's id; the database and the experiment are made where they are missing.

    Without a name it is the experiment of the pipeline, which has a saved view.

    Raises whatever MLflow raises where it cannot be reached, and `RuntimeError` for an address that cannot be used
    and for an experiment in MLflow's trash.
    """
    prepare()
    from mlflow import MlflowClient

    uri, viewed, file = tracking_uri(project), name is None, sqlite_file(project)
    name = name or experiment_name()
    with FileLock(project.state / "tracking" / "setup.lock", timeout=WAIT):
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(file)) as db:  # fails at once where MLflow would try for minutes
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
                f"the experiment {name!r} is in MLflow's trash: restore it there, or choose another by MLFLOW_EXPERIMENT_NAME"
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
    """Whether an experiment of an earlier version, which kept absolute paths, came here with a project that was moved or copied."""
    location = experiment.artifact_location
    return _is_ours(project) and location.endswith(f"/{STATE}/{ARTIFACTS}") and location != (project.state / ARTIFACTS).as_uri()
