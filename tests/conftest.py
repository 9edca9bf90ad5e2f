"""What several test files need: a small project of its own, and commands run in it as a user would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from flows.server import Server
from stacklm.pipeline.project import Project

ROOT = Path(__file__).resolve().parent.parent

TINY_PARAMS = """\
data:
  source: {kind: stdlib, max_bytes: 400_000}
  valid_fraction: 0.2
  test_fraction: 0.2
tokenizer: {vocab_size: 300}
train:
  steps: 12
  context: 16
  batch_size: 4
  micro_batch: 4
  warmup_steps: 2
  valid_every: 6
  valid_tokens: 256
  checkpoint_every: 4
  threads: 1
models:
  stacked:
    architecture: {kind: stacked, width: 16, heads: 2, stacks: [{layers: 4, features: 4, hidden: 16}]}
  dense:
    architecture: {kind: dense, width: 16, heads: 2, layers: 1, hidden: 16}
evaluate:
  threads: 1
  batch_size: 64
  sample: {prompt: "def ", tokens: 8}
"""


class Checkout:
    """A copy of this project with tiny settings, under git, in which commands run as in a user's shell."""

    def __init__(self, root: Path, **extra: str) -> None:
        self.root = root
        self.extra = extra
        self.project = Project(root, root / ".stacklm")

    @property
    def environment(self) -> dict[str, str]:
        """Isolated from the user's own git, DVC, Prefect and MLflow."""
        own = {
            name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "DVC_", "STACKLM_"))
        }
        return {
            **own,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), own["PATH"]]),
            "DVC_NO_ANALYTICS": "1",
            "PREFECT_PROFILES_PATH": os.devnull,
            "DVC_SITE_CACHE_DIR": str(self.root / ".dvc" / "site"),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "OMP_NUM_THREADS": "1",
            **self.extra,
        }

    def start(self, *command: str, **environment: str) -> subprocess.Popen:
        """Start a command; its output goes to `self.log`."""
        with (self.root / "log.txt").open("a") as log:
            return subprocess.Popen(
                command,
                cwd=self.root,
                env={**self.environment, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    def run(self, *command: str, check: bool = True, timeout: float = 240, **environment: str) -> str:
        """Run a command to its end and return all it printed."""
        done = subprocess.run(
            command,
            cwd=self.root,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=timeout,
        )
        if check:
            assert done.returncode == 0, done.stdout
        return done.stdout

    def repro(self, *arguments: str, **keywords) -> str:
        return self.run("dvc", "repro", *arguments, **keywords)

    def stacklm(self, *arguments: str, **keywords) -> str:
        """The command line with the code of this copy."""
        return self.run(sys.executable, "-m", "stacklm", *arguments, **keywords)

    def set(self, *assignments: str) -> None:
        self.stacklm("params", *(word for assignment in assignments for word in ("--set", assignment)))

    def commit(self, message: str) -> None:
        self.run("git", "add", "-A")
        self.run("git", "-c", "user.name=t", "-c", "user.email=t@example.com", "commit", "-q", "-m", message)

    def copy(self, target: Path) -> Checkout:
        shutil.copytree(self.root, target, symlinks=True)
        return Checkout(target, **self.extra)


def make_checkout(root: Path) -> Checkout:
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for file in files:
        if file.split("/")[0] in {"stacklm", "flows", ".dvc", ".dvcignore", ".gitignore", "dvc.yaml"} and (ROOT / file).is_file():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, root / file)
    (root / "params.yaml").write_text(TINY_PARAMS)
    checkout = Checkout(root)
    checkout.run("git", "init", "-q")
    (root / ".git" / "info" / "exclude").write_text("log.txt\n")
    checkout.commit("start")
    return checkout


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
    """A private copy of the finished checkout, with a Prefect server that runs already."""
    private = finished.copy(tmp_path / "project")
    private.extra["PREFECT_API_URL"] = prefect_server.url
    return private


@pytest.fixture
def fresh(tmp_path: Path) -> Checkout:
    """A private checkout in which nothing has run."""
    return make_checkout(tmp_path / "project")


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(scope="session")
def prefect_server(prefect_home: Path) -> Iterator[Server]:
    """One Prefect server for all tests of a process: starting one takes seconds."""
    server = Server(prefect_home)
    server.wait()
    yield server
    server.stop()
