"""What the stage runner leaves behind, and that several of them may tidy up at once."""

from __future__ import annotations

import hashlib
import multiprocessing
from pathlib import Path

import pytest

from stacklm.files import write_json, write_text
from stacklm.pipeline.leaf import DONE, RECORD, sweep
from stacklm.pipeline.locks import hold
from stacklm.pipeline.project import Project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path, tmp_path / ".stacklm")


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


def test_work_that_somebody_holds_stays(project):
    work = finished_work(project, "shards-1")
    put_in_dvc_lock(project, work)
    with hold(project.state / "locks" / "shards-1.lock"):
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
