"""`stacklm generate` as a user runs it, in a project that is trained."""

from __future__ import annotations

import subprocess
import sys

from conftest import Checkout


def generate(checkout: Checkout, *arguments: str, stdin: bytes = b"") -> str:
    command = [sys.executable, "-m", "stacklm", "generate", *arguments]
    done = subprocess.run(command, cwd=checkout.root, env=checkout.environment, input=stdin, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def test_the_prompt_may_come_from_standard_input_and_the_seed_decides(finished: Checkout) -> None:
    text = generate(finished, "import os", "--tokens", "12")
    assert text == generate(finished, "--tokens", "12", stdin=b"import os")
    assert text == generate(finished, "import os", "--tokens", "12", "--cache", "x", "--model", "stacked")
    assert len({text, generate(finished, "import os", "--tokens", "12", "--seed", "7")}) == 2
    assert len(text) > 8


def test_top_k_and_temperature_reach_the_draws(finished: Checkout) -> None:
    best = generate(finished, "def", "--model", "dense", "--temperature", "0")
    assert best == generate(finished, "def", "--model", "dense", "--top-k", "1")
    assert best == generate(finished, "def", "--model", "dense", "--top-p", "1e-9", "--seed", "3")


def test_what_cannot_be_is_one_clear_message(fresh: Checkout, finished: Checkout) -> None:
    assert "no model 'dens'; the models are stacked, dense (did you mean `dense`?)" in finished.stacklm(
        "generate", "a", "--model", "dens", check=False
    )
    assert "top_p: 2.0 is not allowed" in finished.stacklm("generate", "a", "--top-p", "2", check=False)
    assert "inputs of Attention are not enough" in finished.stacklm(
        "generate", "a", "--model", "dense", "--cache", "x", check=False
    )
    assert "stacked is not trained yet: `dvc repro pretrain@stacked`" in fresh.stacklm("generate", "a", check=False)
