"""Locks name their holder and are released when it ends; a stage does not outlive its entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stacklm.config.schema import ParamsError
from stacklm.pipeline.locks import Busy, check_settings, hold_project
from stacklm.pipeline.project import Project
from stacklm.pipeline.watchdog import FLOW_PID
from support.checkout import TINY_PARAMS, write_project

HOLDER = """
import sys
from pathlib import Path
from stacklm.pipeline.locks import hold_project
from stacklm.pipeline.project import Project
with hold_project(Project.find(Path(sys.argv[1])), "flow pretrain", wait=False):
    print("held", flush=True)
    sys.stdin.read()
"""

STAGE = """
import time
from stacklm.pipeline.watchdog import exit_with_entry_point
exit_with_entry_point(interval=0.05)
print("up", flush=True)
time.sleep(60)
"""


def start(script: str, *arguments: str, word: str, stderr: int | None = None, **environment: str) -> subprocess.Popen:
    """Start a script and wait until it says `word`."""
    child = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={**os.environ, **environment},
    )
    assert child.stdout.readline().strip() == word
    return child


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return write_project(tmp_path)


def test_a_second_holder_is_refused_with_the_firsts_name_until_kill_minus_nine_frees_the_lock(project):
    child = start(HOLDER, str(project.root), word="held")
    with pytest.raises(Busy, match=rf"flow pretrain \(process {child.pid}\)"), hold_project(project, "me", wait=False):
        pass
    child.kill()
    child.wait()
    with hold_project(project, "me", wait=False):
        pass


def test_a_waiting_holder_says_whom_it_waits_for_and_goes_on(project):
    said: list[str] = []
    child = start(HOLDER, str(project.root), word="held")

    def say(line: str) -> None:
        said.append(line)
        child.stdin.close()

    with hold_project(project, "me", wait=True, say=say):
        child.wait(timeout=60)
    assert said == [f"waiting for flow pretrain (process {child.pid}) to finish"]


def test_a_stage_of_the_holding_flow_passes_through(project, monkeypatch):
    with hold_project(project, "flow", wait=False):
        monkeypatch.setenv(FLOW_PID, str(os.getpid()))
        with hold_project(project, "its stage", wait=False):
            pass


def test_settings_are_those_of_the_runs_begin_but_comments_may_change(project):
    with hold_project(project, "flow", wait=False):
        project.params_file.write_text(f"# a comment\n{TINY_PARAMS}")
        check_settings(project)
        project.params_file.write_text(TINY_PARAMS.replace("steps: 12", "steps: 13"))
        with pytest.raises(ParamsError, match=r"changed while this run used them \(train\.max_steps: 12 -> 13\)"):
            check_settings(project)
        project.params_file.write_text(TINY_PARAMS)
        check_settings(project)
        (project.root / "dvc.yaml").write_text("stages: {x: {cmd: y}}")
        with pytest.raises(ParamsError, match=r"dvc\.yaml"):
            check_settings(project)
    with hold_project(project, "the next", wait=False):
        check_settings(project)


@pytest.mark.parametrize("reader", ["stays", "goes"])
def test_a_stage_ends_when_its_flow_is_killed(reader):
    """Also where its standard error is a pipe that only the flow has read."""
    flow = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    stage = start(STAGE, word="up", stderr=subprocess.PIPE, **{FLOW_PID: str(flow.pid)})
    if reader == "goes":
        stage.stderr.close()
    flow.kill()  # not waited for: a zombie counts as gone
    stage.wait(timeout=60)
    flow.wait()


def test_a_stage_whose_flow_is_gone_does_not_start():
    flow = subprocess.Popen([sys.executable, "-c", ""])
    flow.wait()
    done = subprocess.run(
        [sys.executable, "-c", STAGE], env={**os.environ, FLOW_PID: str(flow.pid)}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "gone" in done.stderr
