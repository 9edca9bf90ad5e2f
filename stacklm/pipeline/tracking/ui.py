"""MLflow's UI in one process instead of ten; it starts in seconds instead of half a minute, on this machine only."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

from stacklm.pipeline.project import Project
from stacklm.pipeline.tracking.pages import address
from stacklm.pipeline.tracking.store import artifact_root, connect, is_server, tracking_uri

HOST = "127.0.0.1"


def ui(project: Project, port: int = 5000, say: Callable[[str], None] = print) -> None:
    """Serve MLflow's UI until Ctrl-C. A tracking server has its own UI, so only its URL is printed.

    This runs in this process what `mlflow ui --workers 1` starts as a child, so no child is left after a kill.
    Raises `RuntimeError` if the port is in use or reserved.
    """
    uri = tracking_uri(project)
    if is_server(uri):
        say(f"runs are on the tracking server: open {uri}")
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            why = "is in use (another `stacklm ui`?): stop it, or" if error.errno == errno.EADDRINUSE else f"- {error.strerror}:"
            raise RuntimeError(f"port {port} {why} choose another with --port") from None
    say("starting the MLflow UI ...")
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    _, experiment = connect(project)
    warnings.filterwarnings("ignore", module="mlflow")
    import uvicorn
    from mlflow.server import constants

    os.environ[constants.BACKEND_STORE_URI_ENV_VAR] = os.environ[constants.REGISTRY_STORE_URI_ENV_VAR] = uri
    os.environ[constants.ARTIFACT_ROOT_ENV_VAR] = artifact_root(project)
    os.environ[constants.SERVE_ARTIFACTS_ENV_VAR] = "true"
    from mlflow.server.fastapi_app import app

    page = address(f"http://{HOST}:{port}", experiment)
    server = uvicorn.Server(uvicorn.Config(_with_front_page(app, page), host=HOST, port=port, log_level="warning"))

    def announce() -> None:
        while not server.started:
            time.sleep(0.05)
        say(f"{page}\n(stop with Ctrl-C)")

    threading.Thread(target=announce, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):  # raised again by uvicorn after it has shut down
        server.run()


def _with_front_page(app: Any, page: str) -> Any:
    """MLflow's application with `/` redirected to `page`: MLflow's own start page is the one for agents, without metrics.

    A URL that names a page (after the #, which is not sent to the server) leads to that page.
    """
    from starlette.responses import HTMLResponse

    front = HTMLResponse(f"<script>location.replace('/?front' + (location.hash || {'#' + page.partition('#')[2]!r}))</script>")

    async def application(scope: Any, receive: Any, send: Any) -> None:
        plain = scope["type"] == "http" and scope["path"] == "/" and not scope["query_string"]
        await (front if plain else app)(scope, receive, send)

    return application
