"""The code of each stage as files that DVC compares, and what changed in it."""

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
"""A trial of an experiment: no stage of dvc.yaml, but experiments/dvc.yaml depends on its code."""


def write_code(project: Project, item: Instance, params: Params) -> dict[str, str]:
    """Write the files about the stage's code where they are not current, or those of all stages, models and trials if it always
    runs.

    Returns the code of this stage. A stage writes its own again when it begins, since DVC hashes the files when the stage
    has ended, and the code may have changed since the run began.
    """
    files = code_files(project, item, params)
    if item.stage.always:
        models = code_of_models(project, params, params.models)
        written = {one.code_file: one.code(project.root) for one in (*STAGES, LAB)} | models
        for path in (project.root / CODE).glob("models/*.json"):  # those of models that are no more
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
    """What the files about the stage's code should hold now, by path: its own, and that of its model where it is the user's."""
    models = code_of_models(project, params, [item.model] if item.model else [])
    return {item.stage.code_file: item.stage.code(project.root)} | models


def code_of_models(project: Project, params: Params, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The same for models. Raises `ParamsError` with the model's key for a file that is missing or cannot be read."""
    found = {}
    for name in names:
        try:
            found[model_code_file(name)] = own_code(params.models[name].architecture, project.root)
        except ParamsError as error:
            raise ParamsError(f"models.{name}.architecture: {error}") from None
    return found


def code_text(units: Mapping[str, str]) -> str:
    """What a file about code holds."""
    return json.dumps(units, indent=0) + "\n"


def joined(files: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The units of several files."""
    return {unit: digest for units in files.values() for unit, digest in units.items()}


def changed_units(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The functions, classes and constants that differ, are new or are gone."""
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
