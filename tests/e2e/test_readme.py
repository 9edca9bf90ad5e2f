"""Every command in the README is executed, or a replacement for those that take minutes or never end."""

from __future__ import annotations

import shlex
import sys

import pytest

from support import ROOT
from support.checkout import Checkout
from support.prose import commands

COMMANDS = commands((ROOT / "README.md").read_text())
INSTEAD = {
    **{f"make {goal}": f"make -n -C '{ROOT}' {goal}" for goal in ("repro", "test", "test-all", "test-numerics", "docs")},
    "python3 -m venv .venv": f"'{sys.executable}' -m venv --without-pip made",
    "pip install -c constraints.txt -e .": f"'{sys.executable}' -m pip install --help",
    "stacklm leak": "stacklm leak --help",
    "stacklm try stacked": "stacklm try --help",  # tests/e2e/test_cli.py runs it
    "stacklm try my_model.py": "stacklm try --help",
    "stacklm verify default": "stacklm verify --help",
    "stacklm ui": "stacklm ui --help",
    "stacklm serve --model stacked": "stacklm serve --help",  # tests/e2e/test_cli_serve.py runs it
    "stacklm benchmark dense --blimp blimp.jsonl": "stacklm benchmark --help",  # tests/e2e/test_benchmarks.py runs it
    "stacklm run-flow lab short-convolution": "stacklm lab status short-convolution",
    "stacklm run-flow lab learning-rate": "stacklm lab status learning-rate",
    "stacklm run-flow pretrain --set train.max_steps=600": "stacklm run-flow shards --set train.max_steps=14",
    "dvc exp run --temp -S train.max_steps=600": "dvc exp run --queue -S train.max_steps=14",
}
"""What is run in place of a command."""


def test_the_make_targets_do_what_the_lines_without_make_do(finished: Checkout):
    recipe = finished.run("make", "-n", "-C", str(ROOT), "--always-make", "repro")
    assert "python3 -m venv .venv\n" in recipe
    assert "-c constraints.txt -e .\n" in recipe
    assert "stacklm run-flow pretrain\n" in recipe


def slow_but_the_first(lines: list[str]) -> list:
    """Flows take ten seconds each: `make test` runs one of them."""
    flows = [line for line in lines if line.startswith("stacklm run-flow")]
    return [pytest.param(line, marks=[pytest.mark.slow] if line in flows[1:] else []) for line in lines]


@pytest.mark.parametrize("line", slow_but_the_first(COMMANDS))
def test_a_command_runs(line: str, checkout: Checkout):
    words = shlex.split(INSTEAD.get(line, line))
    if words[:2] == ["stacklm", "run-flow"]:
        checkout.stacklm(*words[1:])
    elif words[0] == "stacklm":
        assert checkout.cli(*words[1:]).strip()
    elif line in INSTEAD or words[0] == "dvc":
        checkout.run(*words)
    else:
        pytest.fail(f"README.md: no way to run `{line}` is known here: add one")
