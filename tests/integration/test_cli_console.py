"""Consoles with other encodings lose no output: characters they cannot show are escaped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stacklm.pipeline.project import Project
from support import ROOT
from support.checkout import TINY_PARAMS, Checkout
from support.tracking_project import prepare_data, publish_model

COMMANDS = {
    "plan": ["plan", "--model", "dense"],  # draws the learning rate in blocks
    "generate": ["generate", "caf\u00e9 ", "--model", "dense", "--max-new-tokens", "40", "--temperature", "1", "--top-k", "0"],
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a model of random weights over bytes, so that it writes any characters."""
    root = tmp_path_factory.mktemp("console")
    shutil.copyfile(ROOT / "dvc.yaml", root / "dvc.yaml")
    (root / "params.yaml").write_text(TINY_PARAMS)
    project = Project(root, root / ".stacklm")
    prepare_data(project)
    publish_model(project, "dense")
    return root


def printed(project: Path, encoding: str, command: list[str]) -> bytes:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"}
    done = subprocess.run([sys.executable, "-m", "stacklm", *command], capture_output=True, env=environment, cwd=project)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


@pytest.mark.parametrize(("command", "encoding"), [("plan", "ascii"), ("generate", "cp1252")])
def test_every_character_is_printed_or_escaped(project: Path, command: str, encoding: str) -> None:
    text = Checkout(project).cli(*COMMANDS[command])
    assert len(text) > 20 and not text.isascii()
    assert printed(project, encoding, COMMANDS[command]) == text.encode(encoding, "backslashreplace")
