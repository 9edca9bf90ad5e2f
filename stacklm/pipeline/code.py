"""The code of each stage, written to files that DVC compares, and what changed in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from stacklm.config.model import own_code
from stacklm.config.params import Params
from stacklm.config.schema import ParamsError
from stacklm.files import write_text
from stacklm.pipeline.project import Project
from stacklm.pipeline.stages import CODE, STAGES, Instance, Stage, model_code_file

LAB = Stage(name="lab", function="stacklm.lab.trial:run_trial", params={}, writes={})
"""A trial of an experiment: not a stage of dvc.yaml, but experiments/dvc.yaml depends on its code."""


def write_code(project: Project, item: Instance, params: Params) -> dict[str, str]:
    """Update the code files of the stage, or those of all stages, models and trials if it always runs, and return its code.

    A stage rewrites its own files when it starts, since DVC hashes them when the stage has ended, and the code may have
    changed since the run started.
    """
    files = code_files(project, item, params)
    if item.stage.always:
        models = code_of_models(project, params, params.models)
        written = {one.code_file: one.code(project.root) for one in (*STAGES, LAB)} | models
        for path in (project.root / CODE).glob("models/*.json"):  # files of models that no longer exist
            if path.relative_to(project.root).as_posix() not in models:
                path.unlink()
    else:
        written = files
    for name, units in written.items():
        path, text = project.root / name, code_text(units)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
    return joined(files)


def code_files(project: Project, item: Instance, params: Params) -> dict[str, dict[str, str]]:
    """The current content of the stage's code files, by path: its own, and that of its model if the user defined it."""
    models = code_of_models(project, params, [item.model] if item.model else [])
    return {item.stage.code_file: item.stage.code(project.root)} | models


def code_of_models(project: Project, params: Params, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The same for models. Raises `ParamsError` with the model's key if a file is missing or cannot be read."""
    found = {}
    for name in names:
        try:
            found[model_code_file(name)] = own_code(params.models[name].architecture, project.root)
        except ParamsError as error:
            raise ParamsError(f"models.{name}.architecture: {error}") from None
    return found


def code_text(units: Mapping[str, str]) -> str:
    """The text of a code file."""
    return json.dumps(units, indent=0) + "\n"


def joined(files: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The units of several code files in one mapping."""
    return {unit: digest for units in files.values() for unit, digest in units.items()}


def changed_units(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The names of functions, classes and constants that were changed, added or removed."""
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
