import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from stacklm.pipeline.project import Project
from stacklm.pipeline.tracking.sync import Follower, sync_all
from support import ROOT, wait_for
from support.tracking_project import curve, metrics, prepare_data, pretraining, publish_model, record, runs, timing, write_rows


def train(work, steps: int) -> None:
    """What training up to a step leaves in its work folder."""
    write_rows(work / "metrics.jsonl", metrics(steps))
    write_rows(work / "timing.jsonl", timing(steps))


def children() -> list[psutil.Process]:
    return [process for process in psutil.Process().children() if "stacklm.pipeline.tracking.sync" in process.cmdline()]


def test_a_killed_training_resumes_its_own_curve_without_doubled_steps(project, tmp_path):
    work = project.state / "work"
    train(work, 8)
    code = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[1]); from support import tracking_project as t; "
        "from stacklm.pipeline.project import Project; from stacklm.pipeline.tracking.sync import Follower; "
        "p = Project(Path(sys.argv[2]), Path(sys.argv[3]));\n"
        "with Follower(p, t.pretraining('stacked'), t.record(p, 'stacked'), Path(sys.argv[4])): time.sleep(60)"
    )
    words = [ROOT / "tests", project.root, project.state, work]
    training = subprocess.Popen([sys.executable, "-c", code, *map(str, words)])
    wait_for(lambda: runs(project) and len(curve(project, "loss/train")) == 8)
    (follower,) = psutil.Process(training.pid).children()
    (before,) = runs(project)
    assert before.info.status == "RUNNING"

    training.send_signal(signal.SIGKILL)
    training.wait()
    psutil.wait_procs([follower], timeout=60)
    assert not follower.is_running()
    assert runs(project)[0].info.status == "KILLED"

    train(work, 5)  # back to the last checkpoint, then on
    with Follower(project, pretraining("stacked"), record(project, "stacked"), work):
        train(work, 12)
        wait_for(lambda: len(curve(project, "loss/train")) == 12)
        assert runs(project)[0].info.status == "RUNNING"
        train(work, 20)
    assert runs(project)[0].info.status == "FINISHED"
    publish_model(project, "stacked")
    assert sync_all(project)

    (after,) = runs(project)
    assert after.info.run_id == before.info.run_id and after.info.status == "FINISHED"
    assert after.info.start_time == before.info.start_time
    assert curve(project, "loss/train") == [(row["step"], row["train_loss"]) for row in metrics(20)[1:]]
    assert [step for step, _ in curve(project, "speed/tokens_per_second")] == list(range(21))


def test_a_failed_training_is_shown_as_failed_with_its_last_steps(project):
    work = project.state / "work"
    train(work, 3)
    with (
        pytest.raises(ValueError, match="loss is not finite"),
        Follower(project, pretraining("stacked"), record(project, "stacked"), work),
    ):
        wait_for(lambda: runs(project) and len(curve(project, "loss/train")) == 3)
        train(work, 4)
        raise ValueError("loss is not finite")
    (run,) = runs(project)
    assert run.info.status == "FAILED"
    assert len(curve(project, "loss/train")) == 4
    assert children() == []


@pytest.mark.parametrize("answers", ["refused", "hanging"])
def test_a_tracker_that_is_down_neither_stops_nor_delays_training(project, monkeypatch, capfd, answers):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()  # and never answers
        port = 1 if answers == "refused" else server.getsockname()[1]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600" if answers == "hanging" else "5")
        work = project.state / "work"
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt), Follower(project, pretraining("stacked"), record(project, "stacked"), work):
            train(work, 20)
            said = ""
            while answers == "refused" and not said:  # its one warning
                assert time.monotonic() < started + 120
                time.sleep(0.1)
                said = capfd.readouterr().err
            ended = time.monotonic()
            raise KeyboardInterrupt
        assert time.monotonic() - ended < 60
        assert children() == []
    if answers == "refused":
        assert said.count("could not be brought up to date") == 1 and "Traceback" not in said
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    publish_model(project, "stacked")
    assert sync_all(project)
    assert len(curve(project, "loss/train")) == 20


def test_even_a_state_folder_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    project = Project(tmp_path, tmp_path / "state")
    prepare_data(project)
    project.state.write_text("a file is in the way")
    with Follower(project, pretraining("stacked"), record(project, "stacked"), tmp_path / "work"):
        pass
    assert "could not be brought up to date" in capsys.readouterr().err
