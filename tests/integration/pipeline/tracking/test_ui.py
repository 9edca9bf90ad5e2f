import socket
import subprocess
import sys
import time
import urllib.request

import psutil
import pytest

from stacklm.pipeline.tracking.ui import HOST, ui
from support.tracking_project import runs


def test_the_pages_answer_on_loopback_and_leave_no_process(synced, tmp_path_factory):
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    code = (
        "import sys; from pathlib import Path; from stacklm.pipeline.project import Project; "
        "from stacklm.pipeline.tracking.ui import ui; ui(Project(Path(sys.argv[1]), Path(sys.argv[2])), int(sys.argv[3]), "
        "say=lambda line: print(line, flush=True))"
    )
    words = [sys.executable, "-c", code, str(synced.root), str(synced.state), str(port)]
    pages = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path_factory.mktemp("elsewhere")
    )
    try:
        assert pages.stdout.readline() == "starting the MLflow UI ...\n"
        printed = pages.stdout.readline().strip()
        assert printed.startswith(f"http://{HOST}:{port}/#/experiments/")
        front, app = (urllib.request.urlopen(f"http://{HOST}:{port}/{query}", timeout=60).read() for query in ("", "?front"))
        assert f"location.replace('/?front' + (location.hash || '#{printed.partition('#')[2]}'))".encode() in front
        assert b"MLflow" in app
        (run,) = runs(synced)
        listed = f"http://{HOST}:{port}/ajax-api/2.0/mlflow/artifacts/list?run_id={run.info.run_id}&path=report"
        assert b"report/report.md" in urllib.request.urlopen(listed, timeout=60).read()
        assert psutil.Process(pages.pid).children() == []
        addresses = {c.laddr.ip for c in psutil.Process(pages.pid).net_connections() if c.status == psutil.CONN_LISTEN}
        assert addresses == {HOST}
        pages.send_signal(2)
        assert pages.wait(timeout=60) in (0, 130, -2)
        assert "Traceback" not in pages.stderr.read()
    finally:
        pages.kill()


def test_a_tracking_server_has_its_own_pages(project, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org")
    said = []
    ui(project, 5000, said.append)
    assert said == ["runs are on the tracking server: open https://mlflow.example.org"]


def test_a_taken_port_is_named_at_once(project):
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        started = time.process_time()
        with pytest.raises(RuntimeError, match=f"port {other.getsockname()[1]} is in use"):
            ui(project, other.getsockname()[1])
        assert time.process_time() - started < 1
