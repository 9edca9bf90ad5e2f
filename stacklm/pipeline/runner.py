"""Running one stage: the one place where the work is done, whichever entry point asked for it.

The stage works in a folder named by the fingerprint of all that can change its result, so that a killed run is
resumed exactly where it belongs, and its outputs appear in the project complete or not at all:

    lock -> work folder of this fingerprint -> function -> `done` note -> copy outputs into place -> DVC records them
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stacklm.code import digest
from stacklm.config.params import Params, load
from stacklm.config.schema import ParamsError, listed, nearest, plain
from stacklm.files import json_line, publish, read_json, read_jsonl, remove, sha256, write_json
from stacklm.pipeline.code import changed_units, code_written, shortened, write_code
from stacklm.pipeline.dvc import restore
from stacklm.pipeline.freshness import lock_entries
from stacklm.pipeline.locks import Busy, check_settings, hold, hold_project
from stacklm.pipeline.project import Project
from stacklm.pipeline.stages import STAGES, Stage
from stacklm.pipeline.tracking.sync import sync_all
from stacklm.pipeline.watchdog import entry_point, exit_with_entry_point
from stacklm.report.tables import where

RECORD = "record.json"
DONE = "done.json"
ORIGIN = "origin.json"
HISTORY = "history.jsonl"
TRACKED = ("inputs", "compare")
"""The first and the last stage of every run: MLflow gets what it missed earlier, and what is new."""
PARTIAL = frozenset(stage.name for stage in STAGES if stage.uses)
"""Stages that DVC may run although nothing that they use has changed."""
DAY = 24 * 3600


def run_stage(project: Project, stage: Stage, model: str | None = None) -> None:
    """Make the outputs of one stage in the project, resuming work that was begun on exactly the same inputs.

    Raises `ParamsError` for settings that cannot be used, before any work, and for settings that changed since the run
    began; `FileNotFoundError` where an input is missing; `Busy` where somebody else works on the project, after the
    outputs that DVC deletes before it starts a stage are back; and whatever the stage itself raises.
    """
    _check_model(stage, model, load(project.params_file))
    exit_with_entry_point()
    os.chdir(project.root)
    who = f"`dvc repro` at stage {stage.address(model)}" if entry_point() else f"stage {stage.address(model)}, started by hand"
    try:
        with hold_project(project, who, wait=False):
            check_settings(project)
            _run(project, stage, model, load(project.params_file))
            if stage.name in TRACKED:
                sync_all(project)
            check_settings(project)  # last, since DVC records the settings as they are when this process has ended
    except Busy:
        if entry_point():
            restore(project, stage.address(model))
        raise


def _run(project: Project, stage: Stage, model: str | None, params: Params) -> None:
    code = write_code(project, stage)
    record = make_record(project, stage, model, params)
    work = project.state / "work" / f"{stage.address(model)}-{record['fingerprint'][:16]}"
    sweep(project)
    with hold(_lock_of(project, work)):
        outputs = stage.made(work / "out", model)
        if _finished(work, outputs):
            print(f"{stage.address(model)}: nothing that it uses has changed since an earlier run, whose result is published again")
        else:
            remove(work / "out")
            _prepare(outputs)
            inputs = stage.paths({**stage.reads, **stage.untracked_reads}, project.root, model)
            origin = {name: record[name] for name in ("code", "versions")}
            write_json(work / ORIGIN, origin)
            alike = [other for other in _earlier(work) if (other / ORIGIN).exists() and read_json(other / ORIGIN) == origin]
            state = {"work": work, "earlier": alike} if stage.resumable else {}
            started = time.time()
            with _followed(project, stage, model, record, work), _advised(project, stage, model):
                stage.load()(**stage.settings(params, model), **inputs, **outputs, **state)
            _check_code(project, stage, model, code)
            _remember(project, record, started)
            write_json(work / RECORD, record)
            write_json(work / DONE, {argument: sha256(path) for argument, path in outputs.items()})
        for argument, path in stage.made(project.root, model).items():
            publish(outputs[argument], path)
        publish(work / RECORD, project.root / stage.record(model))
    if "report" in stage.writes:
        print(f"\n{where(project.root / stage.writes['report'])}")


@contextlib.contextmanager
def _advised(project: Project, stage: Stage, model: str | None) -> Iterator[None]:
    """Where training finds no memory, say which settings would fit."""
    try:
        yield
    except Exception as error:
        if not stage.resumable or model is None:
            raise
        from stacklm.plan.text import OutOfMemoryError, advice, is_out_of_memory

        if not is_out_of_memory(error):
            raise
        print(f"{stage.address(model)}: out of memory; looking for settings that fit", file=sys.stderr)
        raise OutOfMemoryError(
            f"{stage.address(model)} ran out of memory; its checkpoints are whole. {advice(project.params_file, model)}"
        ) from None


def make_record(project: Project, stage: Stage, model: str | None, params: Params) -> dict[str, Any]:
    """What a stage's result depends on, with a fingerprint of it all: settings, inputs, code and versions."""
    inputs = stage.paths(stage.reads, project.root, model)
    missing = [path for path in inputs.values() if not path.exists()]
    if missing:
        path = missing[0].relative_to(project.root).as_posix()
        raise FileNotFoundError(f"{stage.address(model)} needs {path}: run `dvc repro`, which makes it first")
    settings = stage.settings(params, model)
    record = {
        "stage": stage.address(model),
        "params": {key.format(model=model): plain(settings[argument]) for argument, key in stage.params.items()},
        "inputs": {path.relative_to(project.root).as_posix(): sha256(path) for path in inputs.values()},
        "code": digest(stage.code(project.root)),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "numpy", "tokenizers", "tiktoken", "pyarrow")},
        },
    }
    fingerprint = digest(record)
    return {"fingerprint": fingerprint, **record}


def _check_code(project: Project, stage: Stage, model: str | None, before: dict[str, str]) -> None:
    """Raise `RuntimeError` if the code changed while the stage ran: DVC would record the new code for it."""
    changed = changed_units(before, stage.code(project.root)) or changed_units(before, code_written(project, stage))
    if changed:
        raise RuntimeError(
            f"{shortened(changed)} changed while {stage.address(model)} ran, so its outputs cannot be recorded for either "
            "version: start again (checkpoints of the code as it was are kept for that code)"
        )


def history(project: Project) -> list[dict]:
    """Every stage that really ran (not skipped, not restored), oldest first: its name, fingerprint, start and seconds."""
    return read_jsonl(project.state / HISTORY)


def _remember(project: Project, record: dict, started: float) -> None:
    row = {
        "stage": record["stage"],
        "fingerprint": record["fingerprint"],
        "started": round(started, 3),
        "seconds": round(time.time() - started, 3),
    }
    with (project.state / HISTORY).open("a", encoding="utf-8") as file:
        file.write(json_line(row))


def _lock_of(project: Project, work: Path) -> Path:
    """The lock of a work folder: a file that stays, since removing one that somebody waits for would let in two."""
    return project.state / "locks" / f"{work.name}.lock"


def sweep(project: Project) -> None:
    """Remove finished work folders whose results dvc.lock holds, but for the last checkpoints: nothing can be lost any more.

    The result of a stage that uses a part of a section stays while dvc.lock holds it. What somebody works on at this moment
    stays too. The dvc.lock of a temporary experiment is not ours to see: what it finished goes after a day.
    """
    recorded = {out["path"]: out.get("md5") for entry in lock_entries(project).values() for out in entry.get("outs", [])}
    for work in (project.state / "work").glob("*/"):
        with contextlib.suppress(Busy), hold(_lock_of(project, work), wait=False):
            if not (work / DONE).exists() or not (work / RECORD).exists():
                continue
            note = work / RECORD
            address, md5 = read_json(note)["stage"], hashlib.md5(note.read_bytes(), usedforsecurity=False).hexdigest()
            if recorded.get(f"out/records/{address}.json") == md5:
                if address.partition("@")[0] not in PARTIAL:
                    _retire(project, work)
            elif time.time() - note.stat().st_mtime > DAY:
                _retire(project, work)


def _retire(project: Project, work: Path) -> None:
    """Remove finished work; of one with checkpoints these stay for a longer run to resume from, until the next one retires."""
    if not any((work / "checkpoints").glob("step-*")):
        remove(work)
        return
    for older in _earlier(work):
        if (older / RECORD).exists() and not (older / DONE).exists():
            with contextlib.suppress(Busy), hold(_lock_of(project, older), wait=False):
                remove(older)
    remove(work / "out")
    remove(work / DONE)


def _earlier(work: Path) -> list[Path]:
    """The work folders of the same stage with other settings, inputs or code."""
    return [other for other in work.parent.glob(f"{work.name.rpartition('-')[0]}-*") if other != work]


def _finished(work: Path, outputs: dict[str, Path]) -> bool:
    """Whether an earlier run got as far as its `done` note and what it made is still whole."""
    if not (work / DONE).exists() or not (work / RECORD).exists():
        return False
    done = read_json(work / DONE)
    return all(path.exists() and sha256(path) == done.get(argument) for argument, path in outputs.items())


def _prepare(outputs: dict[str, Path]) -> None:
    for path in outputs.values():
        path.parent.mkdir(parents=True, exist_ok=True)


def _check_model(stage: Stage, model: str | None, params: Params) -> None:
    if stage.per_model and model not in params.models:
        raise ParamsError(f"stage {stage.name} needs a model's name: one of {listed(params.models)}{nearest(model, params.models)}")
    if not stage.per_model and model is not None:
        raise ParamsError(f"stage {stage.name} runs once, not per model; leave out {model!r}")


def _followed(project: Project, stage: Stage, model: str | None, record: dict, work: Path) -> contextlib.AbstractContextManager:
    """A stage that takes long is shown in MLflow while it runs."""
    from stacklm.pipeline.tracking.sync import Follower

    return Follower(project, model, record, work) if stage.resumable and model else contextlib.nullcontext()
