"""A new project: a folder with settings, a model to edit and an experiment, in which every command works.

Code is not copied: stages, flows and the lab are those of the installed package.
"""

from __future__ import annotations

import json
import subprocess
from importlib.resources import files
from pathlib import Path

from stacklm.config.describe import json_schema
from stacklm.config.schema import ParamsError
from stacklm.files import project_root, write_text
from stacklm.pipeline.dvc import dvc_yaml
from stacklm.pipeline.project import check_tools

TEMPLATES = {
    "README.md": "README.md",
    "params.yaml": "params.yaml",
    "my_model.py": "my_model.py",
    "experiments/dvc.yaml": "experiments/dvc.yaml",
    "experiments/my-model.yaml": "experiments/my-model.yaml",
    ".gitignore": "gitignore",
    ".dvcignore": "dvcignore",
    ".dvc/config": "dvc/config",
    ".dvc/.gitignore": "dvc/gitignore",
}
"""Files of a new project, and those in the folder `templates` that they are copies of: names there begin with no dot, so that
tools which build and install packages see them. Those in `.dvc` are what `dvc init` would write."""


def create(folder: Path) -> bool:
    """Make a new project in a folder that is empty or not there; whether git could make its first commit.

    Raises `ParamsError` where there is anything in the folder, in another project, and without git or DVC.
    """
    if around := project_root(folder):
        raise ParamsError(f"{folder} would lie in the project {around}: name a folder outside of it")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ParamsError(f"{folder} is not empty: name a new folder")
    check_tools(None)
    for path, text in contents(folder.resolve().name).items():
        write_text(folder / path, text)
    _git(folder, "init", "--quiet")
    _git(folder, "add", "--all")
    return _git(folder, "commit", "--quiet", "--message", "New project by stacklm init", check=False)


def contents(name: str) -> dict[str, str]:
    """The files of a new project of that name, by path."""
    templates = files("stacklm.pipeline") / "templates"
    found = {path: (templates / source).read_text(encoding="utf-8") for path, source in TEMPLATES.items()}
    found["README.md"] = found["README.md"].replace("NAME", name, 1)
    return found | {"dvc.yaml": dvc_yaml(), "params.schema.json": json.dumps(json_schema(), indent=2) + "\n"}


def _git(folder: Path, *words: str, check: bool = True) -> bool:
    """Whether git did it. Raises `RuntimeError` with git's own words where it had to."""
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if check and done.returncode:
        raise RuntimeError(f"git {words[0]} in {folder}: {done.stderr.strip()}")
    return done.returncode == 0
