"""Fixtures and hooks for all tests."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from flows.server import Server
from support.checkout import GIT_USER, Checkout, make_checkout

# A background job of a shell ignores SIGINT, and so would all processes that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

KERNEL_SETTINGS = ["ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order tests: first those that need the finished project, then other end-to-end tests, then the rest. So one process makes
    the project while the other has something to do, and short tests come last."""
    items.sort(key=lambda item: ("finished" not in getattr(item, "fixturenames", ()), "e2e" not in item.path.parts))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print which kernels produced the numbers: they depend on the processor."""
    import torch

    facts = [torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()} threads", f"torch {torch.__version__}"]
    facts += [f"{name}={os.environ[name]}" for name in KERNEL_SETTINGS if name in os.environ]
    terminalreporter.write_line(f"kernels: {', '.join(facts)}")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Checkout:
    """A checkout after its first `dvc repro`, committed; made once for all test processes. Copy it, do not change it."""
    shared = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent
    root = shared / "finished"
    with FileLock(shared / "finished.lock"):
        if not (root / "log.txt").exists():
            shutil.rmtree(root, ignore_errors=True)
            checkout = make_checkout(root)
            (root / "log.txt").write_text(checkout.repro())
            checkout.commit("first run")
    return Checkout(root)


@pytest.fixture
def checkout(finished: Checkout, tmp_path: Path, prefect_server: Server) -> Checkout:
    """A private copy of the finished checkout, with a running Prefect server."""
    private = finished.copy(tmp_path / "project")
    private.extra["PREFECT_API_URL"] = prefect_server.url
    return private


@pytest.fixture
def fresh(tmp_path: Path) -> Checkout:
    """A private checkout in which nothing has run."""
    return make_checkout(tmp_path / "project")


@pytest.fixture
def git_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """A git user for commits, also in this process, independent of the user's own settings."""
    for name, value in {**GIT_USER, "GIT_CONFIG_GLOBAL": os.devnull}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(scope="session")
def prefect_server(prefect_home: Path) -> Iterator[Server]:
    """One Prefect server for all tests of a process: starting one takes seconds."""
    server = Server(prefect_home)
    server.wait(seconds=600)  # on a machine that is busy with other tests
    yield server
    server.stop()
