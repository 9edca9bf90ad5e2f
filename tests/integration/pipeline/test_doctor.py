"""`stacklm doctor` reports problems with advice, and exits with 1 if the pipeline cannot run."""

from __future__ import annotations

import importlib.metadata
import os
import socket
import sys
from pathlib import Path

import pytest

from stacklm.pipeline import doctor
from stacklm.pipeline.project import Project
from support import ROOT
from support.checkout import TINY_PARAMS, Checkout


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """A folder that is no project, with no server chosen, and no waiting for a network."""
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_PROFILES_PATH", os.devnull)
    monkeypatch.setattr(doctor, "HUB", f"http://127.0.0.1:{closed_port()}")
    return Checkout(tmp_path)


@pytest.fixture
def project(outside: Checkout) -> Project:
    (outside.root / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    (outside.root / "params.yaml").write_text(TINY_PARAMS)
    for folder in (".git", ".dvc"):
        (outside.root / folder).mkdir()
    return outside.project


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_outside_a_project_it_says_how_to_make_one_and_that_the_main_job_can_run(outside: Checkout):
    said = outside.cli("doctor")
    lines = {line[9:18].strip() for line in said.splitlines()}
    assert {"Python", "packages", "torch", "memory", "disk", "git", "DVC", "MLflow", "Prefect", "network", "ports"} <= lines
    assert "-> `stacklm init my-lab` makes a new one" in said
    assert "The main job can run" in said and "MISSING" not in said


def test_without_git_the_exit_code_is_1(outside: Checkout, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", os.devnull)
    said = outside.cli("doctor", code=1)
    assert "MISSING  git       no `git` on the PATH" in said
    assert "The main job cannot run yet: git." in said


def test_a_project_that_is_in_order_has_nothing_to_be_done(fresh: Checkout):
    for check in (doctor.dvc, doctor.mlflow, doctor.settings, doctor.disk):
        assert check(fresh.project).state == "ok"


@pytest.mark.parametrize(("folder", "advice"), [(".git", "run `git init` there"), (".dvc", "run `dvc init` there")])
def test_a_missing_repository_is_named(project: Project, folder: str, advice: str):
    (project.root / folder).rmdir()
    found = doctor.dvc(project)
    assert (found.state, found.advice) == ("missing", advice)


def test_stages_of_another_version_and_broken_settings_are_named(project: Project):
    assert doctor.dvc(project).state == doctor.settings(project).state == "ok"
    file = project.root / "dvc.yaml"
    file.write_text(file.read_text().replace("stage shards", "stage shards --fast").replace("stages:\n", "stages:\n  mine: {}\n"))
    assert "differs from this version of stacklm in shards" in doctor.dvc(project).found
    file.write_text("stages: [\n")
    assert doctor.dvc(project).state == "note"
    project.params_file.write_text(TINY_PARAMS.replace("max_steps: 12", "max_steps: twelve"))
    found = doctor.settings(project)
    assert found.state == "missing" and "train.max_steps" in found.found


def test_packages_that_are_absent_or_too_old_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch):
    assert doctor.packages().state == "ok"
    required = ["torch>=999", "surely-not-installed>=2", "numpy>=1", "dask>=999; extra == 'dask'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: required)
    found = doctor.packages()
    assert found.state == "missing" and "surely-not-installed is not installed" in found.found and "dask" not in found.found
    assert found.advice == f"{sys.executable} -m pip install 'torch>=999' 'surely-not-installed>=2'"


def test_a_torch_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = doctor.torch()
    assert found.state == "missing" and "pip install" in found.advice


def test_servers_that_do_not_answer_are_named(project: Project, monkeypatch: pytest.MonkeyPatch):
    gone = f"http://127.0.0.1:{closed_port()}/api"
    assert doctor.prefect(gone).state == "missing"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", gone)
    assert doctor.mlflow(project).state == "note"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        there = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        assert doctor.prefect(there).state == "ok"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", there)
        assert doctor.mlflow(project).state == "ok"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///tmp/runs")
    assert doctor.mlflow(project).advice.startswith("set it to a database")


def test_the_network_matters_only_where_the_text_is_there(project: Project):
    away = doctor.Answer(f"http://127.0.0.1:{closed_port()}")
    assert [doctor.network(one, away).state for one in (None, project)] == ["note", "note"]
    hub = "{kind: huggingface, name: a/b, revision: '" + 40 * "0" + "'}"
    project.params_file.write_text(TINY_PARAMS.replace("{kind: stdlib, max_bytes: 400_000}", hub))
    assert doctor.network(project, away).state == "missing"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert doctor.network(project, doctor.Answer(f"http://127.0.0.1:{listener.getsockname()[1]}")).state == "ok"


def test_a_port_that_is_taken_is_named_with_another(monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setattr(doctor, "UI_PORT", listener.getsockname()[1])
        found = doctor.ports()
    assert found.state == "note" and f"--port {doctor.UI_PORT + 1}" in found.advice
    assert doctor.ports().state == "ok"


def test_too_little_memory_and_disk_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("MEMORY", "DISK"):
        monkeypatch.setattr(doctor, name, 2**60)
    assert doctor.memory().state == "note" and "stacklm plan" in doctor.memory().advice
    assert doctor.disk(Project(tmp_path, tmp_path)).state == "missing"
