"""Reading dvc.lock; its use by `status` and flows is tested with DVC in `test_entry_points.py` and `test_flows_run.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from stacklm.pipeline.freshness import lock_entries
from stacklm.pipeline.project import Project


@pytest.mark.parametrize(
    ("content", "entries"),
    [
        (None, {}),
        (b"", {}),
        (b"schema: '2.0'\n", {}),
        (b"stages:\n", {}),
        (b"schema: '2.0'\nstages:\n  audit@dense:\n    cmd: x\n", {"audit@dense": {"cmd": "x"}}),
    ],
    ids=["missing", "empty", "no stages", "stages without any", "one stage"],
)
def test_the_stages_of_the_lock_file(tmp_path: Path, content: bytes | None, entries: dict) -> None:
    if content is not None:
        (tmp_path / "dvc.lock").write_bytes(content)
    assert lock_entries(Project(tmp_path, tmp_path / ".stacklm")) == entries


@pytest.mark.parametrize("content", [b"stages: [", b"\xff\xfe", b"- a list", b"<<<<<<< HEAD\nstages: {}\n"])
def test_a_damaged_lock_file_is_an_error_that_says_how_to_get_it_back(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "dvc.lock").write_bytes(content)
    with pytest.raises(RuntimeError, match=r"(?s)dvc\.lock: not readable .*git checkout dvc\.lock"):
        lock_entries(Project(tmp_path, tmp_path / ".stacklm"))
