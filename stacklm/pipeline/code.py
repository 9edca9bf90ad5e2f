"""The code of each stage as files that DVC compares, and what changed in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from stacklm.files import read_json, write_text
from stacklm.pipeline.project import Project
from stacklm.pipeline.stages import STAGES, Stage

LAB = Stage(name="lab", function="stacklm.lab.trial:run_trial", params={}, writes={})
"""A trial of an experiment: no stage of dvc.yaml, but experiments/dvc.yaml depends on its code."""


def write_code(project: Project, stage: Stage) -> dict[str, str]:
    """Write the file about the stage's code where it is not current, or those of all stages and trials if it always runs.

    Returns the code of this stage. A stage writes its own again when it begins, since DVC hashes the file when the stage
    has ended, and the code may have changed since the run began.
    """
    for one in (*STAGES, LAB) if stage.always else [stage]:
        path, text = project.root / one.code_file, code_text(project, one)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
    return stage.code(project.root)


def code_text(project: Project, stage: Stage) -> str:
    """What the file about the stage's code should hold now."""
    return json.dumps(stage.code(project.root), indent=0) + "\n"


def code_written(project: Project, stage: Stage) -> dict[str, str]:
    """What the file about the stage's code holds."""
    return read_json(project.root / stage.code_file)


def changed_units(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The functions, classes and constants that differ, are new or are gone."""
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
