"""An MLflow plugin that resolves artifacts relative to the database, wherever it is.

MLflow stores the address of every run's artifacts and never changes it, so an absolute path is wrong once a project is moved or
copied. Addresses such as `stacklm:/<run>/artifacts` contain no path: they are resolved when used. MLflow finds this class
through the entry point `mlflow.artifact_repository` in pyproject.toml (https://mlflow.org/docs/latest/ml/plugins/).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from stacklm.pipeline.project import Project
from stacklm.pipeline.tracking.store import ARTIFACTS, database_in


class ProjectArtifacts(LocalArtifactRepository):
    """Artifacts at one address, as local files."""

    def __init__(self, artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None) -> None:
        place = _root(tracking_uri) / urlsplit(artifact_uri).path.lstrip("/")
        super().__init__(place.as_uri(), tracking_uri, registry_uri)


def _root(tracking_uri: str | None) -> Path:
    """Return the folder beside the database of `tracking_uri`, else of this server, of this process, or of the project."""
    uris = [tracking_uri]
    if "mlflow.server" in sys.modules:
        from mlflow.server.constants import BACKEND_STORE_URI_ENV_VAR

        uris.append(os.environ.get(BACKEND_STORE_URI_ENV_VAR))
    if mlflow.is_tracking_uri_set():
        uris.append(mlflow.get_tracking_uri())
    files = [file for uri in uris if uri and (file := database_in(uri))]
    return files[0].absolute().parent / ARTIFACTS if files else Project.find().state / ARTIFACTS
