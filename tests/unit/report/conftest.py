"""Two trained and evaluated models, and the comparison of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stacklm.report.comparison import build_comparison
from stacklm.report.runs import Result
from support.report_files import MANIFEST, TRAIN, Folders


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path / "in", {"stacked": 3.31, "dense": 3.22})


@pytest.fixture
def results(folders: Folders) -> list[Result]:
    return folders.results()


@pytest.fixture
def comparison(results: list[Result]) -> dict[str, Any]:
    return build_comparison(results, TRAIN, MANIFEST, data_sha256="ab" * 32)
