"""How many processors are ours: those that the process is bound to, within the container's share of time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from stacklm.pipeline.project import processors

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
