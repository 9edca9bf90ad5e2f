"""Creating a new project: a folder with settings, a model to edit and an experiment, in which every command works.

No package code is copied: stages, flows and the lab are those of the installed package.
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
"""Files of a new project and their sources in the folder `templates`, whose names have no leading dot, so that packaging tools
include them. Those in `.dvc` are what `dvc init` would write."""


def create(folder: Path) -> bool:
    """Create a new project in an empty or new folder; return whether git could make the first commit.

    Raises `ParamsError` if the folder is not empty or is inside another project, or if git or DVC is missing.
    """
    if around := project_root(folder):
        raise ParamsError(f"{folder} would be inside the project {around}: name a folder outside it")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ParamsError(f"{folder} is not empty: name a new folder")
    check_tools(None)
    for path, text in contents(folder.resolve().name).items():
        write_text(folder / path, text)
    _git(folder, "init", "--quiet")
    _git(folder, "add", "--all")
    return _git(folder, "commit", "--quiet", "--message", "New project by stacklm init", check=False)


def contents(name: str) -> dict[str, str]:
    """The text of the files of a new project with this name, by path."""
    templates = files("stacklm.pipeline") / "templates"
    found = {path: (templates / source).read_text(encoding="utf-8") for path, source in TEMPLATES.items()}
    found["README.md"] = found["README.md"].replace("NAME", name, 1)
    return found | {"dvc.yaml": dvc_yaml(), "params.schema.json": json.dumps(json_schema(), indent=2) + "\n"}


def _git(folder: Path, *words: str, check: bool = True) -> bool:
    """Run git; return whether it succeeded. With `check`, raises `RuntimeError` with git's message if it did not."""
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if check and done.returncode:
        raise RuntimeError(f"git {words[0]} in {folder}: {done.stderr.strip()}")
    return done.returncode == 0
