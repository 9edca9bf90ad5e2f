"""Running one stage: the only place where work is done, for all entry points.

The stage works in a folder named by the fingerprint of everything that can change its result, so that a killed run
resumes only with equal inputs, and its outputs appear in the project complete or not at all:

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

from filelock import BaseFileLock, FileLock, Timeout

from stacklm.code import digest
from stacklm.config.params import Params, load
from stacklm.config.schema import ParamsError, listed, nearest, plain
from stacklm.files import json_line, publish, read_json, read_jsonl, remove, sha256, write_json
from stacklm.pipeline.code import changed_units, code_files, joined, shortened, write_code
from stacklm.pipeline.dvc import restore
from stacklm.pipeline.freshness import lock_entries
from stacklm.pipeline.locks import Busy, check_settings, hold_project
from stacklm.pipeline.project import Project
from stacklm.pipeline.stages import STAGES, Instance, instances
from stacklm.pipeline.tracking.sync import Follower, sync_all
from stacklm.pipeline.watchdog import entry_point, exit_with_entry_point
from stacklm.report.tables import where

RECORD = "record.json"
DONE = "done.json"
ORIGIN = "origin.json"
HISTORY = "history.jsonl"
TRACKED = ("inputs", "compare")
"""The first and the last stage of every run, after which results that are missing in MLflow are logged."""
PARTIAL = frozenset(stage.name for stage in STAGES if stage.uses)
"""Stages that DVC may run although nothing they use has changed."""
DAY = 24 * 3600


def run_stage(project: Project, item: Instance) -> None:
    """Make the outputs of one stage in the project, resuming unfinished work on exactly the same inputs.

    Raises `ParamsError` for settings that cannot be used, before any work, and for settings that changed since the run
    started; `FileNotFoundError` if an input is missing; `Busy` if another process works on the project, after restoring
    the outputs that DVC deletes before it starts a stage; and any exception of the stage itself.
    """
    _check(item, load(project.params_file))
    exit_with_entry_point()
    os.chdir(project.root)
    who = f"`dvc repro` at stage {item.address}" if entry_point() else f"stage {item.address}, started by hand"
    try:
        with hold_project(project, who, wait=False):
            check_settings(project)
            _run(project, item, load(project.params_file))
            if item.stage.name in TRACKED:
                sync_all(project, experiments=())
            check_settings(project)  # last, since DVC records the settings after this process has ended
    except Busy:
        if entry_point():
            restore(project, item.address)
        raise


def _run(project: Project, item: Instance, params: Params) -> None:
    stage = item.stage
    code = write_code(project, item, params)
    record = make_record(project, item, params)
    work = project.state / "work" / f"{item.address}-{record['fingerprint'][:16]}"
    sweep(project)
    with _lock_of(project, work):
        outputs = item.made(work / "out")
        if _finished(work, outputs):
            print(f"{item.address}: nothing it uses has changed since an earlier run; the result of that run is reused")
        else:
            remove(work / "out")
            for path in outputs.values():
                path.parent.mkdir(parents=True, exist_ok=True)
            inputs = item.paths({**stage.reads, **stage.untracked_reads}, project.root)
            origin = {name: record[name] for name in ("code", "versions")}
            write_json(work / ORIGIN, origin)
            alike = [other for other in _earlier(work) if (other / ORIGIN).exists() and read_json(other / ORIGIN) == origin]
            state = {"work": work, "earlier": alike} if stage.resumable else {}
            started = time.time()
            shown = Follower(project, item, record, work) if stage.resumable else contextlib.nullcontext()
            with shown, _advised(project, item):
                stage.load()(**item.settings(params), **inputs, **outputs, **state)
            _check_code(project, item, params, code)
            times = {"started": round(started, 3), "seconds": round(time.time() - started, 3)}
            with (project.state / HISTORY).open("a", encoding="utf-8") as file:
                file.write(json_line({"stage": record["stage"], "fingerprint": record["fingerprint"], **times}))
            write_json(work / RECORD, record)
            write_json(work / DONE, {argument: sha256(path) for argument, path in outputs.items()})
        for argument, path in item.made(project.root).items():
            publish(outputs[argument], path)
        publish(work / RECORD, project.root / item.record)
    if "report" in stage.writes:
        print(f"\n{where(project.root / stage.writes['report'])}")


@contextlib.contextmanager
def _advised(project: Project, item: Instance) -> Iterator[None]:
    """If training runs out of memory, raise an error that says which settings would fit."""
    try:
        yield
    except Exception as error:
        if not item.stage.resumable or item.model is None:
            raise
        from stacklm.plan.text import OutOfMemoryError, advice, is_out_of_memory

        if not is_out_of_memory(error):
            raise
        print(f"{item.address}: out of memory; looking for settings that fit", file=sys.stderr)
        raise OutOfMemoryError(
            f"{item.address} ran out of memory; its checkpoints are intact. {advice(project.params_file, item.model)}"
        ) from None


def make_record(project: Project, item: Instance, params: Params) -> dict[str, Any]:
    """Everything that a stage's result depends on, with its fingerprint: settings, inputs, code and versions."""
    stage, inputs = item.stage, item.paths(item.stage.reads, project.root)
    missing = [path for path in inputs.values() if not path.exists()]
    if missing:
        path = missing[0].relative_to(project.root).as_posix()
        raise FileNotFoundError(f"{item.address} needs {path}: run `dvc repro`, which creates it first")
    settings = item.settings(params)
    record = {
        "stage": item.address,
        "params": {item.fill(key): plain(settings[argument]) for argument, key in stage.params.items()},
        "inputs": {path.relative_to(project.root).as_posix(): sha256(path) for path in inputs.values()},
        "code": digest(joined(code_files(project, item, params))),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "numpy", "tokenizers", "tiktoken", "pyarrow")},
        },
    }
    fingerprint = digest(record)
    return {"fingerprint": fingerprint, **record}


def _check_code(project: Project, item: Instance, params: Params, before: dict[str, str]) -> None:
    """Raise `RuntimeError` if the code changed while the stage ran: DVC would record the new code for it."""
    now = joined(code_files(project, item, params))
    written = joined({name: read_json(project.root / name) for name in item.code_files})
    if changed := changed_units(before, now) or changed_units(before, written):
        raise RuntimeError(
            f"{shortened(changed)} changed while {item.address} ran, so its outputs cannot be recorded for either "
            "version: start again (checkpoints made with the earlier code are kept for it)"
        )


def history(project: Project) -> list[dict]:
    """Every executed stage (not skipped, not restored), oldest first: its name, fingerprint, start and seconds."""
    return read_jsonl(project.state / HISTORY)


def _lock_of(project: Project, work: Path, timeout: float = -1) -> BaseFileLock:
    """The lock of a work folder. Its file is never removed: removing one that a process waits for would let two in."""
    return FileLock(project.state / "locks" / f"{work.name}.lock", timeout)


def sweep(project: Project) -> None:
    """Remove finished work folders whose results are recorded in dvc.lock, except for the last checkpoints.

    The result of a stage that uses a part of a section is kept while it is recorded in dvc.lock, and so is a folder in use by
    another process. The dvc.lock of a temporary experiment is not visible here: its finished work is removed after a day.
    """
    recorded = {out["path"]: out.get("md5") for entry in lock_entries(project).values() for out in entry.get("outs", [])}
    for work in (project.state / "work").glob("*/"):
        with contextlib.suppress(Timeout), _lock_of(project, work, timeout=0):
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
    """Remove finished work, but keep its checkpoints, from which a longer run may resume, until the next one retires."""
    if not any((work / "checkpoints").glob("step-*")):
        remove(work)
        return
    for older in _earlier(work):
        if (older / RECORD).exists() and not (older / DONE).exists():
            with contextlib.suppress(Timeout), _lock_of(project, older, timeout=0):
                remove(older)
    remove(work / "out")
    remove(work / DONE)


def _earlier(work: Path) -> list[Path]:
    """The work folders of the same stage instance with other settings, inputs or code."""
    name = work.name.rpartition("-")[0]
    return [other for other in work.parent.glob(f"{name}-*") if other != work and other.name.rpartition("-")[0] == name]


def _finished(work: Path, outputs: dict[str, Path]) -> bool:
    """Whether an earlier run reached its `done` note and its outputs are still intact."""
    if not (work / DONE).exists() or not (work / RECORD).exists():
        return False
    done = read_json(work / DONE)
    return all(path.exists() and sha256(path) == done.get(argument) for argument, path in outputs.items())


def _check(item: Instance, params: Params) -> None:
    """Raise `ParamsError` unless the settings have the stage for this model and seed."""
    known = [other for other in instances(params) if other.stage == item.stage] or [Instance(item.stage)]
    if item not in known:
        choices = f"{listed(map(_words, known))}{nearest(item.model, params.models)}"
        raise ParamsError(f"{_words(item)}: no such stage; choose one of: {choices}")


def _words(item: Instance) -> str:
    """The instance as on the command line: `pretrain dense 1`."""
    return " ".join(str(part) for part in (item.stage.name, item.model, item.seed) if part is not None)
