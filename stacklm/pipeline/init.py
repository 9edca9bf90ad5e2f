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


def create(folder: Path) -> str:
    """Create a new project in an empty or new folder; return why git could not make the first commit, empty if it could.

    Raises `ParamsError` if the folder is not empty or is inside another project, or if git or DVC is missing, and `RuntimeError`
    with git's message if the folder cannot become a repository.
    """
    if around := project_root(folder):
        raise ParamsError(f"{folder} would be inside the project {around}: name a folder outside it")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ParamsError(f"{folder} is not empty: name a new folder")
    check_tools(None)
    for path, text in contents(folder.resolve().name).items():
        write_text(folder / path, text)
    for words in (("init", "--quiet"), ("add", "--all")):
        if error := _git(folder, *words):
            raise RuntimeError(f"git {words[0]} in {folder}: {error}")
    return _git(folder, "commit", "--quiet", "--message", "New project by stacklm init")


def contents(name: str) -> dict[str, str]:
    """The text of the files of a new project with this name, by path."""
    templates = files("stacklm.pipeline") / "templates"
    found = {path: (templates / source).read_text(encoding="utf-8") for path, source in TEMPLATES.items()}
    found["README.md"] = found["README.md"].replace("NAME", name, 1)
    return found | {"dvc.yaml": dvc_yaml(), "params.schema.json": json.dumps(json_schema(), indent=2) + "\n"}


def _git(folder: Path, *words: str) -> str:
    """Run git; return its message if it failed, else an empty string."""
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return (done.stderr.strip() or f"git ended with code {done.returncode}") if done.returncode else ""
