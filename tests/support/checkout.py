"""A small project for a test, and commands run in it as by a user."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stacklm import cli
from stacklm.config.params import parse
from stacklm.files import write_text
from stacklm.pipeline.project import Project
from support import ROOT

GIT_USER = {f"GIT_{who}_{what}": "t@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
COPIED = {"stacklm", "flows", ".dvc", ".dvcignore", ".gitignore", "dvc.yaml"}
EXPERIMENTS = {f"experiments/{name}.yaml" for name in ("dvc", "default", "learning-rate", "short-convolution")}
"""The experiments that the README names."""

TINY_PARAMS = """\
data:
  source: {kind: stdlib, max_bytes: 400_000}
  valid_fraction: 0.2
  test_fraction: 0.2
tokenizer: {vocab_size: 300}
train:
  max_steps: 12
  context_length: 16
  global_batch_size: 4
  micro_batch_size: 4
  warmup_steps: 2
  eval_every: 6
  eval_tokens: 256
  checkpoint_every: 4
  threads: 1
seeds: [1]
models:
  stacked:
    architecture: {kind: stacked, d_model: 16, n_heads: 2, stacks: [{layers: 4, features: 4, d_ff: 16}]}
  dense:
    architecture: {kind: dense, d_model: 16, n_heads: 2, n_layers: 1, d_ff: 16}
evaluate:
  threads: 1
  batch_size: 64
  sample: {prompt: "def ", max_new_tokens: 8}
"""
PARAMS = parse(YAML(typ="safe").load(TINY_PARAMS))

TINY_SETTINGS = [
    "data.source.max_bytes=400_000",
    "data.valid_fraction=0.2",
    "data.test_fraction=0.2",
    "tokenizer.vocab_size=300",
    "train.max_steps=12",
    "train.context_length=16",
    "train.global_batch_size=4",
    "train.micro_batch_size=4",
    "train.warmup_steps=2",
    "train.eval_every=6",
    "train.eval_tokens=256",
    "train.checkpoint_every=6",
    "evaluate.sample.max_new_tokens=8",
    "seeds=[1]",
]
"""The same settings for a project with its own models."""


class Checkout:
    """A copy of this project with tiny settings, in git, in which commands run as in a user's shell."""

    def __init__(self, root: Path, **extra: str) -> None:
        self.root = root
        self.extra = extra
        self.project = Project(root, root / ".stacklm")

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that isolate commands from the user's own git, DVC, Prefect and MLflow."""
        theirs = ("PREFECT_", "MLFLOW_", "DVC_", "STACKLM_")
        own = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
        return {
            **own,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), own["PATH"]]),
            "DVC_NO_ANALYTICS": "1",
            "PREFECT_PROFILES_PATH": os.devnull,
            "DVC_SITE_CACHE_DIR": str(self.root / ".dvc" / "site"),
            "GIT_CONFIG_GLOBAL": os.devnull,
            **GIT_USER,
            "OMP_NUM_THREADS": "1",
            **self.extra,
        }

    def start(self, *command: str, **environment: str) -> subprocess.Popen:
        """Start a command; its output goes to log.txt."""
        with (self.root / "log.txt").open("a") as log:
            return subprocess.Popen(
                command,
                cwd=self.root,
                env={**self.environment, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    def run(self, *command: str, code: int | None = 0, **environment: str) -> str:
        """Run a command, check its exit code (None: any), and return its output."""
        done = subprocess.run(
            command,
            cwd=self.root,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=1200,
        )
        assert code in (None, done.returncode), done.stdout
        return done.stdout

    def repro(self, *arguments: str, **keywords) -> str:
        return self.run("dvc", "repro", *arguments, **keywords)

    def stacklm(self, *arguments: str, **keywords) -> str:
        """Run `stacklm` in a new process with the code of this copy; return its output."""
        return self.run(sys.executable, "-m", "stacklm", *arguments, **keywords)

    def cli(self, *arguments: str, stdin: bytes = b"", code: int = 0, folder: str = "") -> str:
        """Run `stacklm` in this process, with the code under test, in a folder of the checkout; return its output.

        For commands that do not need a new process: starting the interpreter with torch takes seconds, a call does not.
        """
        import torch

        threads, printed = torch.get_num_threads(), io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
        with (
            contextlib.chdir(self.root / folder),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(sys, "argv", ["stacklm", *arguments])
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
            with pytest.raises(SystemExit) as end:
                cli.main()
        torch.set_num_threads(threads)
        text = printed.buffer.getvalue().decode()
        assert (end.value.code or 0) == code, text
        return text

    def set(self, *assignments: str) -> None:
        self.cli("params", *(word for assignment in assignments for word in ("--set", assignment)))

    def commit(self, message: str) -> None:
        self.run("git", "add", "-A")
        self.run("git", "commit", "-q", "-m", message)

    def copy(self, target: Path) -> Checkout:
        shutil.copytree(self.root, target, symlinks=True)
        return Checkout(target, **self.extra)


def run_main(main: Callable[[], Any], *arguments: str) -> str:
    """The output of a program's main function with these arguments, run in this process, which has already imported torch."""
    import torch

    threads, printed = torch.get_num_threads(), io.StringIO()  # a program sets its own
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["main", *arguments])
        main()
    torch.set_num_threads(threads)
    return printed.getvalue()


def write_project(root: Path, params: str = TINY_PARAMS, **experiments: str) -> Project:
    """Write settings and experiment files, for commands that need neither git nor DVC stages."""
    write_text(root / "params.yaml", params)
    write_text(root / "dvc.yaml", "stages: {}\n")
    for name, text in experiments.items():
        write_text(root / "experiments" / f"{name}.yaml", text)
    return Project(root, root / ".stacklm")


def make_checkout(root: Path) -> Checkout:
    """A checkout of the working tree, with few experiments and no records, since planning all of them takes half a minute."""
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for file in files:
        wanted = file in EXPERIMENTS if file.startswith("experiments/") else file.split("/")[0] in COPIED
        if wanted and (ROOT / file).is_file():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, root / file)
    (root / "params.yaml").write_text(TINY_PARAMS)
    checkout = Checkout(root)
    checkout.run("git", "init", "-q")
    (root / ".git" / "info" / "exclude").write_text("log.txt\n")
    checkout.commit("start")
    return checkout
