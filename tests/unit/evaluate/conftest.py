"""A project for the tests of a module, which run in its folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from support.evaluated import Project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("project")
    with contextlib.chdir(folder):
        yield Project(folder)
