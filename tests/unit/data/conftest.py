"""A project of files."""

from pathlib import Path

import pytest


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one: what sources and benchmarks name is relative to it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
