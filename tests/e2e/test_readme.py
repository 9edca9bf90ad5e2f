"""Every command in the README is executed: as it stands, or by what stands for it where it takes minutes or never ends."""

from __future__ import annotations

import shlex
import sys

import pytest

from support import ROOT
from support.checkout import Checkout
from support.prose import commands

COMMANDS = commands((ROOT / "README.md").read_text())
STACKLM = [sys.executable, "-m", "stacklm"]
DRY = ["make", "-n", "-C", str(ROOT)]

INSTEAD = {
    "make repro": [*DRY, "repro"],
    "make test": [*DRY, "test"],
    "make test-all": [*DRY, "test-all"],
    "make test-numerics": [*DRY, "test-numerics"],
    "make docs": [*DRY, "docs"],
    "python3 -m venv .venv": [sys.executable, "-m", "venv", "--without-pip", "made"],
    "pip install -c constraints.txt -e .": [sys.executable, "-m", "pip", "install", "--help"],
    "stacklm leak": [*STACKLM, "leak", "--help"],
    "stacklm try stacked": [*STACKLM, "try", "--help"],  # tests/e2e/test_cli_try.py runs it
    "stacklm try my_model.py": [*STACKLM, "try", "--help"],
    "stacklm verify default": [*STACKLM, "verify", "--help"],
    "stacklm ui": [*STACKLM, "ui", "--help"],
    "stacklm serve --model stacked": [*STACKLM, "serve", "--help"],  # tests/e2e/test_cli_serve.py runs it
    "stacklm benchmark dense --blimp blimp.jsonl": [*STACKLM, "benchmark", "--help"],  # tests/e2e/test_benchmarks.py runs it
    "stacklm run-flow lab short-convolution": [*STACKLM, "lab", "status", "short-convolution"],
    "stacklm run-flow lab learning-rate": [*STACKLM, "lab", "status", "learning-rate"],
    "stacklm run-flow pretrain --set train.max_steps=600": [*STACKLM, "run-flow", "shards", "--set", "train.max_steps=14"],
    "dvc exp run --temp -S train.max_steps=600": ["dvc", "exp", "run", "--queue", "-S", "train.max_steps=14"],
}
"""What is run in place of a command."""


def test_the_make_targets_do_what_the_lines_without_make_do(finished: Checkout):
    recipe = finished.run(*DRY, "--always-make", "repro")
    assert "python3 -m venv .venv\n" in recipe
    assert "-c constraints.txt -e .\n" in recipe
    assert "stacklm run-flow pretrain\n" in recipe


def slow_but_the_first(lines: list[str]) -> list:
    """Flows take ten seconds each: `make test` runs one of them."""
    flows = [line for line in lines if line.startswith("stacklm run-flow")]
    return [pytest.param(line, marks=[pytest.mark.slow] if line in flows[1:] else []) for line in lines]


@pytest.mark.parametrize("line", slow_but_the_first(COMMANDS))
def test_a_command_runs(line: str, checkout: Checkout):
    words = shlex.split(line)
    if line in INSTEAD:
        checkout.run(*INSTEAD[line])
    elif words[:2] == ["stacklm", "run-flow"]:
        checkout.stacklm(*words[1:])
    elif words[0] == "stacklm":
        assert checkout.cli(*words[1:]).strip()
    elif words[0] == "dvc":
        checkout.run(*words)
    else:
        pytest.fail(f"README.md: no way to run `{line}` is known here: add one")
