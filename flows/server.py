"""A temporary Prefect server for the duration of one flow, for users who do not run their own.

It listens on the loopback interface only, stores its history in the project's state folder, and runs in a child process
that ends when this process does, even by `kill -9`: the child reads its standard input, a pipe that only this process holds,
and stops at its end. Nothing here imports prefect in this process, so that both processes import it at the same time.
To browse the history later: `PREFECT_HOME=$PWD/.stacklm/prefect prefect server start`.
"""

from __future__ import annotations

import atexit
import http.client
import os
import subprocess
import sys
import tempfile
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path

HOST = "127.0.0.1"

QUIET = {  # no telemetry; Prefect's log is shown in its UI, not on the terminal
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
}


class ServerError(RuntimeError):
    """The server did not start; the message contains the end of its log."""


class Server:
    """A server that starts in the background on construction; call `wait` before the first use of `url`."""

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the server runs)
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            # Ctrl-C in the terminal must not reach the server: Prefect still has to report the end of the run to it.
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        assert self._process.stdin and self._process.stdout
        self._input = self._process.stdin
        atexit.register(self.stop)
        self.pid = self._process.pid
        self._port = int(self._process.stdout.readline() or 0)
        self.url = f"http://{HOST}:{self._port}/api"

    def wait(self, seconds: float = 600) -> None:
        """Return once the server answers. Raises `ServerError` if it ends before that or takes longer than `seconds`."""
        try:  # the port has been open since the start: the request waits in its queue
            connection = http.client.HTTPConnection(HOST, self._port, timeout=seconds)
            connection.request("GET", "/api/health")
            connection.getresponse().read()
        except (OSError, http.client.HTTPException) as error:
            self.stop()
            self._log.seek(0)
            end = self._log.read().decode(errors="replace").splitlines()[-15:]
            raise ServerError("\n".join(["Prefect's server did not start; the end of its log:", *(end or [str(error)])])) from None

    def watch(self, died: Callable[[], None]) -> None:
        """Call `died` in a thread if the server ends without being stopped."""

        def wait() -> None:
            self._process.wait()
            if not self._input.closed:
                died()

        threading.Thread(target=wait, daemon=True, name="server watch").start()

    def stop(self) -> None:
        """Stop the server, after it has written pending data."""
        self._input.close()
        try:
            self._process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def connect(home: Path) -> Server | None:
    """Connect this process and its children to the user's Prefect server, or start one and return it.

    Call this before importing prefect: prefect reads its settings on import, and exit handlers run in reverse order, so that
    the server stops only after Prefect has sent its last messages.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if users_server():
        return None
    os.environ.setdefault("PREFECT_HOME", str(home))
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), HOST]))
    server = Server(Path(os.environ["PREFECT_HOME"]))
    os.environ["PREFECT_API_URL"] = server.url
    return server


def users_server() -> str | None:
    """Return the URL of the user's Prefect API, from the environment or the active Prefect profile; None if neither sets it."""
    if "PREFECT_API_URL" in os.environ:
        return os.environ["PREFECT_API_URL"]
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    path = Path(os.environ.get("PREFECT_PROFILES_PATH", home / "profiles.toml")).expanduser()
    if not path.is_file():
        return None
    profiles = tomllib.loads(path.read_text(encoding="utf-8"))
    active = os.environ.get("PREFECT_PROFILE", profiles.get("active"))
    return profiles.get("profiles", {}).get(active, {}).get("PREFECT_API_URL")


def _serve(home: Path) -> None:
    """Run in the child process: open a port, print its number, and serve until standard input ends."""
    import signal
    import socket
    import time

    def stop_with_parent() -> None:
        sys.stdin.buffer.read()
        signal.raise_signal(signal.SIGTERM)  # uvicorn finishes open requests; before it has started, this ends the process
        time.sleep(10)
        os._exit(1)

    listener = socket.create_server((HOST, 0))
    print(listener.getsockname()[1], flush=True)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    threading.Thread(target=stop_with_parent, daemon=True).start()
    # Ephemeral: only the services that record what a flow reports. Final: there is one application, so none is cached.
    os.environ |= {"PREFECT_HOME": str(home), "PREFECT_UI_ENABLED": "0"}
    os.environ |= {"PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}

    import asyncio
    import gc

    gc.disable()  # imported objects stay alive: collecting garbage among them takes a tenth of the start
    import uvicorn
    from filelock import FileLock
    from prefect.server.api.server import create_app
    from prefect.server.database import provide_database_interface

    with FileLock(home / "database.lock"):  # two flows may both create the database
        asyncio.run(provide_database_interface().create_db())
    app = create_app()
    gc.freeze()
    gc.enable()
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)).run(sockets=[listener])


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
