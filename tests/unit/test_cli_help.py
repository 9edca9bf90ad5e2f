"""Help ends with examples that work, and the shell completes names of the project."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stacklm.cli import app
from stacklm.cli_examples import EXAMPLES
from stacklm.pipeline.project import Project, experiments
from support import ROOT
from support.checkout import TINY_PARAMS
from support.command_line import commands, parse

COMMANDS = dict(commands())


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_ends_with_examples_that_the_parser_takes(name: str):
    command: Any = COMMANDS[name]
    _, _, below = command.epilog.partition("Examples:\n\n")
    examples = below.split("\n\n")
    assert all(f"{line} ".startswith(f"stacklm {name} ") for line in examples)
    for line in examples:
        parse(shlex.split(line)[1:])


def test_no_example_is_of_a_command_that_is_no_more():
    assert EXAMPLES.keys() == COMMANDS.keys()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    (tmp_path / "params.yaml").write_text(TINY_PARAMS)
    (tmp_path / "experiments").mkdir()
    for name in ("dvc", "swiglu", "size"):
        (tmp_path / "experiments" / f"{name}.yaml").write_text("")
    monkeypatch.chdir(tmp_path / "experiments")
    return tmp_path


def completed(line: str) -> list[str]:
    """What bash is told when Tab is pressed at the end of the line."""
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - (not line.endswith(" ")))}
    done = CliRunner().invoke(app, prog_name="stacklm", env={"_STACKLM_COMPLETE": "complete_bash", **words})
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("stacklm lab show s", ["size", "swiglu"]),
        ("stacklm verify sw", ["swiglu"]),
        ("stacklm run-flow lab ", ["size", "swiglu"]),
        ("stacklm run-flow sh", ["shards"]),
        ("stacklm run-flow pretrain --model d", ["dense"]),
        ("stacklm generate --model dense", ["dense", "dense-1"]),
        ("stacklm stage down", ["download"]),
        ("stacklm accept audit@", ["audit@stacked", "audit@dense"]),
        ("stacklm lab pl", ["plan"]),
    ],
)
def test_tab_completes_experiments_models_and_stages(project: Path, line: str, words: list[str]):
    assert completed(line) == words


def test_tab_is_silent_where_there_is_no_project_or_no_settings(project: Path, tmp_path_factory, monkeypatch):
    (project / "params.yaml").write_text("models: [")
    assert completed("stacklm generate --model ") == []
    monkeypatch.chdir(tmp_path_factory.mktemp("outside"))
    assert completed("stacklm lab show ") == []


def test_experiments_are_the_files_that_are_not_stages(project: Path):
    assert experiments(Project.find()) == ["size", "swiglu"]
