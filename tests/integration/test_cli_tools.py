"""Commands name what is missing on the machine, with advice."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stacklm import cli
from support.checkout import write_project


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in which every tool is found; each test takes one away."""
    write_project(tmp_path)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".dvc").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["stacklm", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in said
    plain = re.sub(r"\x1b\[[0-9;]*m", "", said)
    return " ".join(plain.replace("\u2502", " ").split())


@pytest.mark.parametrize("port", ["0", "-1", "99999", "65536", "http"])
def test_a_port_is_one_that_there_is(root, capsys, monkeypatch, port):
    said = refusal(capsys, monkeypatch, "ui", "--port", port)
    assert "Invalid value for '--port'" in said


@pytest.mark.parametrize("command", [["status"], ["run-flow", "pretrain"]], ids=" ".join)
def test_missing_tools_and_repositories_are_named(root, capsys, monkeypatch, command):
    with monkeypatch.context() as without:
        without.setenv("PATH", os.devnull)
        assert "no `git` on the PATH: install git" in refusal(capsys, without, *command)
    with monkeypatch.context() as without:
        without.setattr("importlib.util.find_spec", lambda name: None)
        assert "DVC is not installed" in refusal(capsys, without, *command)
    (root / ".git").rmdir()
    assert "not a git repository: run `git init`" in refusal(capsys, monkeypatch, *command)
    (root / ".dvc").rmdir()
    assert "not a DVC repository (no .dvc): run `dvc init`" in refusal(capsys, monkeypatch, *command)


def test_outside_of_a_project_that_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "not inside a stacklm project" in refusal(capsys, monkeypatch, "params")


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are Unicode there")
def test_a_file_name_that_is_not_utf8_is_printed(tmp_path):
    """In a process of its own, whose standard error is real."""
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    done = subprocess.run([sys.executable, "-m", "stacklm", "params"], cwd=folder, capture_output=True)
    assert done.returncode == 2 and b"not inside a stacklm project" in done.stderr and b"Traceback" not in done.stderr
    assert b"caf" in done.stderr
