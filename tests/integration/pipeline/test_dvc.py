"""DVC run by a flow: its actions, the output of stages, and the same last error as with `dvc repro`."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from stacklm.pipeline.dvc import StageFailed, reproduce
from support import edit, wait_for
from support.checkout import Checkout
from support.flows_project import make_project


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Checkout:
    """A project in which `inputs` has run."""
    project = make_project(tmp_path_factory.mktemp("dvc") / "project")
    project.repro("inputs")
    return project


@pytest.fixture
def project(original, tmp_path, monkeypatch) -> Checkout:
    private = original.copy(tmp_path / "project")
    for name, value in private.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return private


def test_it_says_what_dvc_did_and_shows_what_the_stage_prints(project):
    """Also: DVC still words it as expected."""
    work = project.root / "work.py"
    work.write_text(work.read_text() + '\nprint("to the one"); print("to the other", file=sys.stderr)\n')
    shown: list[str] = []
    assert reproduce(project.project, "download", shown.append) == "ran"
    assert {"to the one", "to the other"} <= set(shown)
    said = list(shown)
    assert reproduce(project.project, "download", shown.append) == "up to date"
    project.run("rm", "-r", "out/documents")
    assert reproduce(project.project, "download", shown.append) == "restored from the cache"
    assert shown == said


def test_a_stages_own_words_come_first(project):
    (project.root / "fail").write_text("download")
    with pytest.raises(StageFailed, match=r"^download: download found a loss that is not finite$"):
        reproduce(project.project, "download", lambda line: None)


def linked_out(root: Path) -> None:
    (root / "out").rename(root.parent / "elsewhere")
    (root / "out").symlink_to(root.parent / "elsewhere")


def out_that_is_a_file(root: Path) -> None:
    (root / "out" / "inputs.json").unlink()
    (root / "out").rename(root / "elsewhere")
    (root / "out").write_text("")


def cache_without_space(root: Path) -> None:
    (root / ".dvc" / "cache").rename(root / ".dvc" / "old")
    (root / ".dvc" / "cache").write_text("")


FAULTS = {
    "a linked out": linked_out,
    "an out that is a file": out_that_is_a_file,
    "a cache that cannot be written": cache_without_space,
    "a missing section": lambda root: edit(root / "params.yaml", "models:", "modells:"),
    "a corrupt dvc.lock": lambda root: edit(root / "dvc.lock", "schema: '2.0'", "schema: ["),
    "a dvc.lock of another kind": lambda root: edit(root / "dvc.lock", "stages:", "stages: 7\nrest:"),
    "a conflict in dvc.yaml": lambda root: edit(root / "dvc.yaml", "{", "<<<<<<< HEAD\n{\n=======\n{"),
    "a missing input": lambda root: (root / "out" / "inputs.json").unlink(),
}
SLOW = ["a linked out", "a dvc.lock of another kind", "a conflict in dvc.yaml", "a missing section"]


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, fault in FAULTS.items()]
)
def test_where_dvc_fails_its_own_last_error_is_told(project, fault):
    fault(project.root)
    address = "audit@dense" if fault is FAULTS["a missing section"] else "download"
    with pytest.raises(StageFailed) as raised:
        reproduce(project.project, address, lambda line: None)
    printed = project.repro("--single-item", address, code=None)
    assert str(raised.value) == f"{address}: {printed.rpartition('ERROR: ')[2].strip()}"


def test_it_waits_for_another_dvc_process_that_uses_the_files(project):
    (project.root / "hang").touch()
    other = project.start("dvc", "repro", "--single-item", "--force", "inputs")
    (project.root / "began-inputs").unlink()
    wait_for((project.root / "began-inputs").exists)
    shown: list[str] = []

    def show(line: str) -> None:
        shown.append(line)
        (project.root / "hang").unlink(missing_ok=True)

    assert reproduce(project.project, "download", show) == "ran"
    assert re.fullmatch(rf"download: waiting for another DVC process\n  \(PID {other.pid}\): .*repro.*", shown[0])
    assert other.wait() == 0
    assert os.getcwd() != str(project.root)
