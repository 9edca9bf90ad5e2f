"""The files that the stage runner leaves, and concurrent clean-up by several runners."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import multiprocessing
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from filelock import FileLock

from stacklm.config.schema import ParamsError
from stacklm.config.train import Train, passes
from stacklm.files import read_json, sha256, write_json, write_text
from stacklm.pipeline.project import Project
from stacklm.pipeline.runner import DONE, RECORD, run_stage, sweep
from stacklm.pipeline.stages import Instance, Stage
from support import edit
from support.checkout import write_project


@pytest.fixture
def project(tmp_path: Path, monkeypatch) -> Project:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "code.py", "version = 1")
    write_text(tmp_path / "text.txt", "some text")
    return write_project(tmp_path)


class Example(Stage):
    """A stage whose code is one file of the project."""

    def code(self, root: Path) -> dict[str, str]:
        return {"code.py": sha256(root / "code.py")}


STAGE = Example(
    name="example",
    function=f"{__name__}:work_on",
    params={"config": "train"},
    reads={"text": "text.txt"},
    writes={"result": "out/result.txt"},
)
calls: list[dict] = []
meanwhile: list[Callable[[], None]] = []
"""What happens while the stage runs, once."""


def work_on(config: Train, text: Path, result: Path, work: Path | None = None, earlier: Sequence[Path] = ()) -> None:
    calls.append({"earlier": len(earlier)})
    if meanwhile:
        meanwhile.pop()()
    write_text(result, f"{text.read_text()} {Path('code.py').read_text()} {config.max_steps}")


@pytest.fixture
def run(project) -> Callable[..., str]:
    """Run the example stage; what it has published."""
    calls.clear()
    meanwhile.clear()

    def run(stage: Stage = STAGE) -> str:
        run_stage(project, Instance(stage))
        return (project.root / "out/result.txt").read_text()

    return run


def test_a_file_about_other_code_is_refused_at_the_end_and_what_ran_is_recorded_for_its_own(run, project):
    """DVC hashes that file when the stage has ended: another stage may have written it for code that was there in between."""
    file = project.root / STAGE.code_file
    meanwhile.append(lambda: write_json(file, {"code.py": "other"}))
    with pytest.raises(RuntimeError, match=r"code\.py changed while example ran"):
        run()
    run()
    assert read_json(file) == STAGE.code(project.root)


def test_finished_work_is_published_again_and_not_done_again(run, project):
    made = run()
    (project.root / "out/result.txt").unlink()
    assert run() == made
    assert len(calls) == 1


def test_finished_work_that_was_damaged_since_is_done_again(run, project):
    made = run()
    (kept,) = project.state.glob("work/example-*/out/out/result.txt")
    kept.write_text(made.replace("some", "same"))
    assert run() == made
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [("code.py", "1", "2"), ("text.txt", "some", "other"), ("params.yaml", "steps: 12", "steps: 13")],
    ids=["code", "input", "setting"],
)
def test_finished_work_of_other_code_inputs_or_settings_is_not_used(run, project, file, old, new):
    before = run()
    edit(project.root / file, old, new)
    assert run() != before
    assert len(calls) == 2
    edit(project.root / file, new, old)
    assert run() == before
    assert len(calls) == 2, "the work folder of the first settings is still there"


def test_work_that_does_not_use_a_setting_is_not_done_again_when_that_changes(run, project):
    partial = dataclasses.replace(STAGE, uses={"config": passes})
    before = run(partial)
    edit(project.root / "params.yaml", "steps: 12", "steps: 13")
    assert run(partial) == before
    assert len(calls) == 1
    edit(project.root / "params.yaml", "context_length: 16", "context_length: 8")
    run(partial)
    assert len(calls) == 2


def test_earlier_work_is_offered_only_if_it_is_of_the_same_code(run, project):
    resumable = dataclasses.replace(STAGE, resumable=True)
    run(resumable)
    edit(project.root / "params.yaml", "steps: 12", "steps: 13")
    run(resumable)
    edit(project.root / "code.py", "1", "2")
    edit(project.root / "params.yaml", "steps: 13", "steps: 14")
    run(resumable)
    assert [call["earlier"] for call in calls] == [0, 1, 0]


@pytest.mark.parametrize("changed", ["python", "torch", "numpy", "tokenizers", "tiktoken", "pyarrow"])
def test_work_of_other_versions_is_neither_used_nor_offered(run, monkeypatch, changed):
    resumable = dataclasses.replace(STAGE, resumable=True)
    run(resumable)
    version_of, python = importlib.metadata.version, platform.python_version()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1" if name == changed else version_of(name))
    monkeypatch.setattr(platform, "python_version", lambda: "3.0" if changed == "python" else python)
    run(resumable)
    assert [call["earlier"] for call in calls] == [0, 0]


@pytest.mark.parametrize(
    ("file", "old", "new", "error", "message"),
    [
        ("params.yaml", "steps: 12", "steps: 13", ParamsError, r"train\.max_steps: 12 -> 13"),
        ("params.yaml", "vocab_size: 300", "vocab_size: 301", ParamsError, r"tokenizer\.vocab_size: 300 -> 301"),
        ("dvc.yaml", "{}", "{x: {cmd: y}}", ParamsError, r"dvc\.yaml"),
        ("code.py", "1", "2", RuntimeError, r"code\.py changed while example ran"),
    ],
    ids=["own setting", "other setting", "dvc.yaml", "code"],
)
def test_an_edit_while_a_stage_runs_is_refused_and_undoing_it_costs_nothing(run, project, file, old, new, error, message):
    """DVC would record what the files say when the stage has ended."""
    meanwhile.append(lambda: edit(project.root / file, old, new))
    with pytest.raises(error, match=message):
        run()
    edit(project.root / file, new, old)
    assert run() == "some text version = 1 12"
    assert len(calls) == (2 if file == "code.py" else 1)


def finished_work(project: Project, name: str, files: int = 3, kind: str = "part") -> Path:
    work = project.state / "work" / name
    for i in range(files):
        write_text(work / "checkpoints" / f"{kind}-{i}" / "x.txt", "x")
    write_json(work / RECORD, {"stage": name.partition("-")[0]})
    write_json(work / DONE, {})
    return work


def put_in_dvc_lock(project: Project, *works: Path) -> None:
    entries = ""
    for work in works:
        md5 = hashlib.md5((work / RECORD).read_bytes()).hexdigest()
        address = work.name.partition("-")[0]
        entries += f"  {address}:\n    cmd: x\n    outs:\n    - path: out/records/{address}.json\n      md5: {md5}\n"
    write_text(project.root / "dvc.lock", f"schema: '2.0'\nstages:\n{entries}")


def test_only_work_that_dvc_lock_holds_is_removed(project):
    recorded, unrecorded = finished_work(project, "shards-1"), finished_work(project, "tokenizer-2")
    unfinished = finished_work(project, "pretrain@a-3")
    put_in_dvc_lock(project, recorded, unfinished)
    (unfinished / DONE).unlink()
    sweep(project)
    assert not recorded.exists()
    assert unrecorded.exists() and unfinished.exists()


def test_work_of_a_stage_that_uses_a_part_of_a_section_stays_while_dvc_lock_holds_it(project):
    audit = finished_work(project, "audit@dense-1")
    put_in_dvc_lock(project, audit)
    sweep(project)
    assert audit.exists()
    put_in_dvc_lock(project, finished_work(project, "shards-1"))
    os.utime(audit / RECORD, (0, 0))
    sweep(project)
    assert not audit.exists()


def test_work_that_somebody_holds_stays(project):
    work = finished_work(project, "shards-1")
    put_in_dvc_lock(project, work)
    with FileLock(project.state / "locks" / "shards-1.lock"):
        sweep(project)
        assert work.exists()
    sweep(project)
    assert not work.exists()


def test_many_may_sweep_at_once(project):
    """Two stages of a flow start together and both find the same finished work."""
    works = [finished_work(project, f"s{i}-1", files=40) for i in range(8)]
    put_in_dvc_lock(project, *works)
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        pool.map(sweep, [project] * 8)
    assert not any(work.exists() for work in works)


def test_the_last_checkpoints_of_a_stage_stay_for_a_longer_run(project):
    for name in ("pretrain@a-1", "pretrain@b-2", "pretrain@a-3"):
        work = finished_work(project, name, kind="step")
        write_text(work / "out" / "weights", "x")
        put_in_dvc_lock(project, work)
        sweep(project)
        assert not (work / "out").exists() and not (work / DONE).exists()
    assert sorted(work.name for work in (project.state / "work").iterdir()) == ["pretrain@a-3", "pretrain@b-2"]
    assert len(list(work.glob("checkpoints/step-*"))) == 3
