"""MLflow's pages, light: one process instead of ten, seconds instead of half a minute, on this machine only."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable

from stacklm.pipeline.project import Project
from stacklm.pipeline.tracking.tracker import artifact_root, connect, is_server, tracking_uri
from stacklm.pipeline.tracking.view import address

HOST = "127.0.0.1"


def ui(project: Project, port: int = 5000, say: Callable[[str], None] = print) -> None:
    """Serve MLflow's pages until Ctrl-C. A tracking server has pages of its own: then only their address is said.

    Raises `RuntimeError` where the port is taken.
    """
    uri = tracking_uri(project)
    if is_server(uri):
        say(f"the runs are on the tracking server: open {uri}")
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise RuntimeError(f"port {port} is taken (another `stacklm ui`?): stop it, or choose another with --port") from None
    say("starting MLflow's pages ...")
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    _, experiment = connect(project)
    server = _server(uri, artifact_root(project).as_uri(), port)
    threading.Thread(target=_announce, args=(server, address(f"http://{HOST}:{port}", experiment), say), daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):  # raised again by uvicorn after it has shut down
        server.run()


def _server(uri: str, artifacts: str, port: int) -> object:
    """What `mlflow ui --workers 1` starts as a child, in this process: no child is left when it is killed."""
    import warnings

    warnings.filterwarnings("ignore", module="mlflow")
    import uvicorn
    from mlflow.server import ARTIFACT_ROOT_ENV_VAR, BACKEND_STORE_URI_ENV_VAR, REGISTRY_STORE_URI_ENV_VAR, SERVE_ARTIFACTS_ENV_VAR

    os.environ.update(
        {
            BACKEND_STORE_URI_ENV_VAR: uri,
            REGISTRY_STORE_URI_ENV_VAR: uri,
            ARTIFACT_ROOT_ENV_VAR: artifacts,
            SERVE_ARTIFACTS_ENV_VAR: "true",
        }
    )
    return uvicorn.Server(uvicorn.Config("mlflow.server.fastapi_app:app", host=HOST, port=port, log_level="warning"))


def _announce(server: object, page: str, say: Callable[[str], None]) -> None:
    while not server.started:
        time.sleep(0.05)
    say(f"{page}\n(stop with Ctrl-C)")
