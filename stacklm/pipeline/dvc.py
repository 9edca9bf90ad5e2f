"""Asking DVC to make a stage, and the dvc.yaml that tells it how."""

from __future__ import annotations

import os
import subprocess
import sys

from stacklm.pipeline.lifeline import FLOW_PID
from stacklm.pipeline.project import Project, environment
from stacklm.pipeline.stages import STAGES, Stage

HEADER = """\
# Generated from the table in stacklm/pipeline/stages.py by `stacklm dvc-yaml`: change that, not this.
# A stage's code dependencies are everything its module imports from this package.
"""


class StageFailed(RuntimeError):
    """A stage did not end well; the message is the stage's own."""


def reproduce(project: Project, address: str) -> None:
    """Let DVC bring one stage up to date: skip it, restore it from its cache, or run it, in a child process.

    Raises `StageFailed` with the stage's own error.
    """
    from stacklm.pipeline.leaf import error_file

    failure = error_file(project, address)
    failure.unlink(missing_ok=True)
    command = ["dvc", "--wait-for-lock", "repro", "--quiet", "--single-item", address]
    child = subprocess.Popen([sys.executable, "-m", *command], cwd=project.root, env={**environment(), FLOW_PID: str(os.getpid())})
    try:
        code = child.wait()
    except BaseException:  # Ctrl-C reached the child as well, which ends by itself after the stage's last checkpoint
        child.wait()
        raise
    if code:
        message = failure.read_text(encoding="utf-8") if failure.exists() else f"`{' '.join(command)}` ended with code {code}"
        raise StageFailed(f"{address}: {message}")


def dvc_yaml() -> str:
    """The text of dvc.yaml that the table of stages stands for."""
    import io

    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    buffer = io.StringIO(HEADER)
    buffer.seek(0, io.SEEK_END)
    yaml.dump({"stages": {stage.name: _definition(stage) for stage in STAGES}}, buffer)
    return buffer.getvalue()


def _definition(stage: Stage) -> dict:
    model = "${item.model}"
    fill = {"model": model}
    definition: dict = {"matrix": {"model": "${models}"}} if stage.per_model else {}
    definition["desc"] = stage.help
    definition["cmd"] = f"python -m stacklm stage {stage.name}" + (f" {model}" if stage.per_model else "")
    if stage.params:
        definition["params"] = [key.format(**fill) for key in stage.params.values()]
    if stage.always:
        definition["always_changed"] = True
    definition["deps"] = [path.format(**fill) for path in stage.reads.values()] + stage.code()
    outs = {argument: path.format(**fill) for argument, path in stage.writes.items()}
    definition["outs"] = [path for argument, path in outs.items() if argument not in stage.metrics]
    definition["outs"].append(stage.record(model))
    if stage.metrics:
        definition["metrics"] = [outs[argument] for argument in stage.metrics]
    return definition
