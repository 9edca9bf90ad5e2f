"""The project's own Prefect server: it starts with the installed packages, listens only locally, and never outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from types import SimpleNamespace

import psutil
import pytest

from flows.server import Server, ServerError, users_server
from support import wait_for
from support.flows_project import ask

HOLDER = """
import sys, time
from pathlib import Path
from flows.server import Server
server = Server(Path(sys.argv[1]))
if sys.argv[2] == "ready":
    server.wait()
print(server.pid, server.url, flush=True)
time.sleep(60)
"""


def test_it_starts_and_answers_on_the_loopback_interface_only(prefect_server):
    assert urllib.request.urlopen(f"{prefect_server.url}/health").read() == b"true"
    listening = [c.laddr.ip for c in psutil.Process(prefect_server.pid).net_connections() if c.status == psutil.CONN_LISTEN]
    assert listening == ["127.0.0.1"]


@pytest.mark.skipif(os.name == "nt", reason="there is no kill -9 on Windows")
@pytest.mark.parametrize("when", ["starting", "ready"])
def test_a_second_server_shares_the_history_and_ends_when_its_parent_is_killed(prefect_server, prefect_home, when):
    parent = subprocess.Popen([sys.executable, "-c", HOLDER, str(prefect_home), when], stdout=subprocess.PIPE, text=True)
    pid, url = parent.stdout.readline().split()
    server = psutil.Process(int(pid))
    if when == "ready":
        ask(SimpleNamespace(url=url), "flows/", name="written by the second")
        assert "written by the second" in [flow["name"] for flow in ask(prefect_server, "flows/filter")]
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)


def test_a_server_that_cannot_start_says_why(tmp_path):
    (tmp_path / "prefect.db").write_text("this is no database, and longer than a header of one " * 9)
    server = Server(tmp_path)
    with pytest.raises(ServerError, match="file is not a database"):
        server.wait()
    assert not psutil.pid_exists(server.pid)


@pytest.mark.parametrize(
    ("variable", "active", "expected"),
    [("http://set/api", "mine", "http://set/api"), (None, "mine", "http://mine/api"), (None, "other", None)],
)
def test_the_users_own_server_is_found(monkeypatch, tmp_path, variable, active, expected):
    (tmp_path / "profiles.toml").write_text(
        f'active = "{active}"\n[profiles.mine]\nPREFECT_API_URL = "http://mine/api"\n[profiles.other]\n'
    )
    for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    if variable:
        monkeypatch.setenv("PREFECT_API_URL", variable)
    assert users_server() == expected
