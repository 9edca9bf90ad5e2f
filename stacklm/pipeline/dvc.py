"""Running stages with DVC, and generating dvc.yaml."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable

from ruamel.yaml import YAML, YAMLError

from stacklm.pipeline.project import Project, environment
from stacklm.pipeline.stages import CODE, STAGES, Instance, Stage
from stacklm.pipeline.watchdog import FLOW_PID, REPRO

HEADER = """\
# Generated from the table in stacklm/pipeline/stages.py by `stacklm dvc-yaml`: change that, not this.
# The stage `inputs` writes out/code, which holds a hash of each function and class that a stage can execute.
"""

OUTCOMES = {"Running stage ": "ran", " is cached - skipping run": "restored from the cache"}
"""What DVC prints, and what it means; a test runs DVC to check that it still prints this."""
BUSY = " is busy, it is being blocked by:"

PLOTS = [{"out/curves": {"x": "step", "y": ["train_loss", "valid_loss"], "x_label": "step", "y_label": "loss (nats per token)"}}]
"""For `dvc plots`, which draws each file of a folder."""

ARTIFACTS = {
    "models": {
        "path": "out/models",
        "type": "model",
        "desc": "All trained models, a folder for each model and seed.",
        "labels": ["stacklm"],
    },
}
"""For DVC's model registry: `git tag models@v1.0.0` creates a version, `dvc artifacts get` downloads it. Names are static, so
there is one artifact: the folder with all models of params.yaml."""


class StageFailed(RuntimeError):
    """A stage failed; the message is the stage's own, or DVC's if DVC failed."""


def reproduce(project: Project, address: str, show: Callable[[str], None] = print) -> str:
    """Bring one stage up to date with DVC in a child process; `show` is called with every line that the stage prints.

    Returns what DVC did: "ran", "restored from the cache" or "up to date". Raises `StageFailed` with the last error of
    the stage or of DVC. If another DVC process reads or writes the stage's files, waits for it.
    """
    waited = False
    while True:
        code, messages, printed = _dvc(project, ["repro", "--single-item", address], show)
        if not code:
            return next((outcome for words, outcome in OUTCOMES.items() if words in messages), "up to date")
        if BUSY not in messages:
            raise StageFailed(f"{address}: {_reason(messages, printed)}")
        if not waited:
            show(f"{address}: waiting for another DVC process{messages.partition(BUSY)[2].partition(chr(10) * 2)[0]}")
            waited = True
        time.sleep(0.5)


def restore(project: Project, address: str) -> None:
    """Restore the outputs of one stage that DVC has deleted, from dvc.lock and the cache."""
    _dvc(project, ["checkout", "--quiet", address], show=print)


def commit(project: Project, address: str) -> None:
    """Record the outputs of one stage in dvc.lock as made from its current inputs, without running it."""
    code, messages, printed = _dvc(project, ["commit", "--force", address], show=print)
    if code:
        raise StageFailed(f"{address}: {_reason(messages, printed)}")


def _dvc(project: Project, arguments: list[str], show: Callable[[str], None]) -> tuple[int, str, list[str]]:
    """Run DVC in a child process; return its exit code, its own messages, and the lines that the stage printed."""
    printed: deque[str] = deque(maxlen=100)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as messages:
        child = subprocess.Popen(
            [sys.executable, "-m", REPRO, "--wait-for-lock", *arguments],
            cwd=project.root,
            env={**environment(), FLOW_PID: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=messages,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        assert child.stderr
        try:
            for line in child.stderr:
                printed.append(line.rstrip())
                show(line.rstrip())
            code = child.wait()
        except BaseException:  # Ctrl-C also reached the child, which exits after the stage's last checkpoint
            child.wait()
            raise
        messages.seek(0)
        return code, messages.read(), list(printed)


def _reason(messages: str, printed: list[str]) -> str:
    """The last error: the stage's if its command failed, otherwise DVC's."""
    error = messages.rpartition("ERROR: ")[2].strip()
    if "failed to run: " not in error or not printed:
        return error
    start = max((i for i, line in enumerate(printed) if line.startswith("stacklm: ")), default=len(printed) - 1)
    return "\n".join(printed[start:]).removeprefix("stacklm: ").strip()


def dvc_yaml() -> str:
    """The text of dvc.yaml, generated from the table of stages."""
    yaml = YAML()
    yaml.width = 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    buffer = io.StringIO()
    stages = {stage.name: _definition(stage) for stage in STAGES}
    yaml.dump({"stages": stages, "artifacts": ARTIFACTS, "plots": PLOTS}, buffer)
    return HEADER + buffer.getvalue()


def differing_stages(project: Project) -> list[str]:
    """The stages that are missing from a project's dvc.yaml or differ from the table; other stages are the user's own."""
    try:
        there = YAML(typ="safe").load(project.root / "dvc.yaml")["stages"]
    except (YAMLError, KeyError, TypeError):
        there = {}
    return [stage.name for stage in STAGES if there.get(stage.name) != _definition(stage)]


def _definition(stage: Stage) -> dict:
    item = Instance(stage, *[f"${{item.{name}}}" for name in stage.per])  # pyright: ignore[reportArgumentType] (DVC fills them in)
    definition: dict = {"matrix": {name: f"${{{name}s}}" for name in stage.per}} if stage.per else {}
    definition["desc"] = stage.help
    definition["cmd"] = " ".join(["python -m stacklm stage", stage.name, *(f"${{item.{name}}}" for name in stage.per)])
    if stage.params:
        definition["params"] = [item.fill(key) for key in stage.params.values()]
    if stage.always:
        definition["always_changed"] = True
    else:
        definition["deps"] = [*map(item.fill, stage.reads.values()), *item.code_files]
    outs = {argument: item.fill(path) for argument, path in stage.writes.items()}
    files = [*(path for argument, path in outs.items() if argument not in stage.metrics), item.record]
    # DVC deletes outputs before it runs their stage. Those of an always-run stage must survive a refused run.
    definition["outs"] = [{path: {"persist": True}} for path in [*files, CODE]] if stage.always else files
    if stage.metrics:
        definition["metrics"] = [outs[argument] for argument in stage.metrics]
    return definition
