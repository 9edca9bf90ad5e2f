"""`stacklm init` makes a project in which every command works, from the files of this project."""

from __future__ import annotations

import inspect
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stacklm.config.params import load
from stacklm.config.schema import ParamsError
from stacklm.pipeline import doctor
from stacklm.pipeline.init import TEMPLATES, contents, create
from stacklm.pipeline.project import Project
from support import ROOT
from support.checkout import Checkout
from support.command_line import parse
from support.prose import commands

NEW = contents("my-lab")


@pytest.fixture
def made(git_user: None, tmp_path: Path) -> Checkout:
    Checkout(tmp_path).cli("init", "my-lab")
    return Checkout(tmp_path / "my-lab")


def section(text: str, name: str) -> str:
    """The lines of one section of params.yaml, as they are written."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{name}:"))
    end = next((i for i, line in enumerate(lines[start + 1 :], start + 1) if line and not line.startswith(" ")), len(lines))
    return "\n".join(lines[start:end]).strip()


@pytest.mark.parametrize("name", ["data", "tokenizer", "train", "seeds", "evaluate"])
def test_settings_are_those_of_this_project(name: str):
    assert section(NEW["params.yaml"], name) == section((ROOT / "params.yaml").read_text(), name)


def test_the_dense_model_is_that_of_this_project_and_of_its_experiment():
    yaml = YAML(typ="safe")
    ours, theirs = yaml.load(NEW["params.yaml"])["models"], yaml.load(ROOT / "params.yaml")["models"]
    assert ours["dense"] == theirs["dense"]
    experiment, default = yaml.load(NEW["experiments/my-model.yaml"]), yaml.load(ROOT / "experiments/default.yaml")
    same = ("budget", "margin", "baseline", "seeds", "rates", "train")
    assert {key: experiment[key] for key in same} == {key: default[key] for key in same}
    assert experiment["candidates"]["mine"]["model"] == ours["mine"]


def test_the_settings_of_its_model_are_the_defaults_of_the_class():
    module: dict[str, Any] = {}
    exec(NEW["my_model.py"], module)
    arguments = inspect.signature(module["MyModel"]).parameters
    defaults = {name: one.default for name, one in arguments.items() if one.default is not inspect.Parameter.empty}
    assert YAML(typ="safe").load(NEW["params.yaml"])["models"]["mine"]["architecture"]["settings"] == defaults


def test_other_files_are_those_of_this_project():
    for path in (".dvcignore", ".dvc/config", ".dvc/.gitignore", "dvc.yaml"):
        assert NEW[path] == (ROOT / path).read_text(), path
    assert NEW["params.schema.json"] == (ROOT / "docs/params.schema.json").read_text()
    assert {*NEW[".gitignore"].splitlines()} <= {*(ROOT / ".gitignore").read_text().splitlines()}
    files = NEW["experiments/dvc.yaml"], ROOT / "experiments/dvc.yaml"
    ours, theirs = (YAML(typ="safe").load(file)["stages"]["lab"] for file in files)
    assert ours.pop("matrix") == {"experiment": ["my-model"]} and theirs.pop("matrix")
    assert ours == theirs


def test_every_template_has_a_place():
    folder = ROOT / "stacklm/pipeline/templates"
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert {*TEMPLATES.values()} == {file.as_posix() for file in files if "__pycache__" not in file.parts}


def test_the_commands_of_its_readme_are_accepted():
    lines = commands(NEW["README.md"])
    assert "stacklm try mine" in lines and NEW["README.md"].startswith("# my-lab\n")
    for line in lines:
        if line.startswith("stacklm "):
            parse(shlex.split(line)[1:])


def test_it_is_under_git_and_dvc_and_the_doctor_has_nothing_to_say(made: Checkout):
    assert made.run("git", "log", "--format=%s").strip() == "New project by stacklm init"
    assert made.run("git", "status", "--porcelain") == ""
    assert made.run("git", "ls-files").split() == sorted(NEW)
    for check in (doctor.dvc, doctor.settings, doctor.disk):
        assert check(Project.find(made.root)).state == "ok"


def test_its_model_is_as_large_as_the_dense_one_and_its_experiment_is_well_formed(made: Checkout):
    said = made.cli("plan")
    (parameters,) = [line.split()[1:] for line in said.splitlines() if line.startswith("Parameters")]
    mine, dense = (int(number.replace(",", "")) for number in parameters)
    assert abs(mine / dense - 1) < 0.001
    assert "held equal: parameters" in made.cli("lab", "plan", "my-model")
    assert list(load(made.root / "params.yaml").models) == ["mine", "dense"]


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(git_user: None, tmp_path: Path):
    taken, file = tmp_path / "taken", tmp_path / "file"
    taken.mkdir()
    for path in (taken / "mine.txt", file):
        path.write_text("mine")
    for path in (taken, file):
        with pytest.raises(ParamsError, match=rf"{path.name} is not empty: name a new folder"):
            create(path)
    assert [path.name for path in taken.iterdir()] == ["mine.txt"] and file.read_text() == "mine"


def test_a_folder_in_another_project_is_refused(made: Checkout):
    said = made.cli("init", "inner", code=2)
    assert f"inner would be inside the project {made.root}" in said and not (made.root / "inner").exists()


def test_an_empty_folder_will_do_and_an_unknown_user_commits_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, os.devnull)
    for name in ("EMAIL", "GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"):
        monkeypatch.setenv(name, "")
    checkout = Checkout(tmp_path)
    assert "nothing is committed yet: fatal: " in checkout.cli("init", ".")
    assert "params.yaml" in checkout.run("git", "diff", "--cached", "--name-only").split()


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_a_hook_that_refuses_the_first_commit_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hook = tmp_path / "hooks" / "pre-commit"
    hook.parent.mkdir()
    hook.write_text("#!/bin/sh\necho refused by a hook >&2\nexit 1\n")
    hook.chmod(0o755)
    for name, value in {"COUNT": "1", "KEY_0": "core.hooksPath", "VALUE_0": str(hook.parent)}.items():
        monkeypatch.setenv(f"GIT_CONFIG_{name}", value)
    assert create(tmp_path / "my-lab") == "refused by a hook"


def test_without_git_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(ParamsError, match="install git"):
        create(tmp_path / "my-lab")
    assert not (tmp_path / "my-lab").exists()
