"""The number of parallel training runs, by available CPUs and by free GPU memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from stacklm.pipeline.lab import Files
from stacklm.pipeline.project import free_gpu_memory, processors
from stacklm.plan.memory import training_memory
from support.checkout import write_project
from support.lab_records import FILE, make_lab

COUNT = "from pathlib import Path; from stacklm.pipeline.project import processors; print(processors(Path('absent')))"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to processors")
def test_a_process_counts_the_processors_that_it_is_bound_to():
    mine = os.sched_getaffinity(0)
    for bound in (mine, {min(mine)}):
        code = f"import os; os.sched_setaffinity(0, {bound}); {COUNT}"
        assert int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) == len(bound)


@pytest.mark.parametrize(
    ("quota", "expected"), [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 4), (None, 4)]
)
def test_a_container_allows_no_more_than_its_share(tmp_path, monkeypatch, quota, expected):
    monkeypatch.setattr("psutil.Process.cpu_affinity", lambda self: [0, 1, 2, 3], raising=False)
    if quota:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert processors(tmp_path / "cpu.max") == expected


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A program in the place of NVIDIA's that says how much memory is free, as text."""
    if os.name == "nt":
        pytest.skip("a shell script")

    def install(printed: str) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\nprintf '{printed}'\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")

    return install


@pytest.mark.parametrize(("printed", "expected"), [("8192\\n", 2**33), ("100\\n8192\\n", 100 * 2**20), ("No devices\\n", None)])
def test_free_memory_is_that_of_the_first_gpu(gpu, printed: str, expected: int | None):
    gpu(printed)
    assert free_gpu_memory() == expected


def test_without_a_gpu_there_is_no_memory_of_one(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert free_gpu_memory() is None


def test_as_many_trials_at_once_as_a_gpu_holds_of_the_largest_arm(tmp_path, monkeypatch, gpu):
    monkeypatch.setattr("stacklm.pipeline.project.processors", lambda: 4)
    lab = make_lab(sizes="[1]")
    files = Files(write_project(tmp_path, one=FILE), "one")
    largest = max(training_memory(arm.model, files.vocab_size, arm.train).total for arm in lab.arms)
    on = {device: replace(lab, settings=replace(lab.settings, device=device, threads=1)) for device in ("cuda", "cpu")}
    for times, expected in ((0.5, 1), (1.5, 1), (2.5, 2), (9, 4)):
        gpu(f"{round(times * largest / 2**20)}\\n")
        assert files.at_once(on["cuda"]) == expected, times
    assert files.at_once(on["cpu"]) == 4
