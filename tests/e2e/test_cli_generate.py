"""`stacklm generate` as a user runs it, in a project that is trained."""

from __future__ import annotations

import os

from support.checkout import Checkout


def test_the_prompt_may_come_from_standard_input_and_the_seed_decides(finished: Checkout) -> None:
    text = finished.stacklm("generate", "import os", "--max-new-tokens", "12")  # in a process of its own, as a user has it
    assert text == finished.cli("generate", "--max-new-tokens", "12", stdin=b"import os")
    assert text == finished.cli("generate", "import os", "--max-new-tokens", "12", "--cache", "inputs", "--model", "stacked")
    assert len({text, finished.cli("generate", "import os", "--max-new-tokens", "12", "--seed", "7")}) == 2
    assert len(text) > 8


def test_bytes_that_are_not_utf_8_mean_the_same_as_an_argument_and_on_standard_input(finished: Checkout) -> None:
    texts = []
    for prompt in (b"caf\xe9 ", b"\xff\xfe\x80", "café ".encode()):
        texts.append(finished.cli("generate", os.fsdecode(prompt), "--max-new-tokens", "12"))
        assert texts[-1] == finished.cli("generate", "--max-new-tokens", "12", stdin=prompt)
    assert texts[0] != texts[2]


def test_top_k_and_temperature_reach_the_draws(finished: Checkout) -> None:
    best = finished.cli("generate", "def", "--model", "dense", "--temperature", "0")
    assert best == finished.cli("generate", "def", "--model", "dense", "--top-k", "1")
    assert best == finished.cli("generate", "def", "--model", "dense", "--top-p", "1e-9", "--seed", "3")


def test_what_cannot_be_is_one_clear_message(fresh: Checkout, finished: Checkout) -> None:
    assert "no model 'dens'; there are stacked-1, dense-1 (did you mean `dense`?)" in finished.cli(
        "generate", "a", "--model", "dens", code=2
    )
    assert "top_p: 2.0 is not allowed" in finished.cli("generate", "a", "--top-p", "2", code=2)
    assert "inputs of Attention are not enough" in finished.cli("generate", "a", "--model", "dense", "--cache", "inputs", code=2)
    assert "stacked-1 is not trained yet: `dvc repro pretrain@stacked-1`" in fresh.cli("generate", "a", code=2)
