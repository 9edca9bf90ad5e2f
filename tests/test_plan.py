"""The plan says what a run takes, from the settings alone, and finds settings that fit a budget."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TINY_PARAMS

from stacklm.config.params import load, parse, preview
from stacklm.model.count import count
from stacklm.plan.levers import contexts, micro_batches
from stacklm.plan.plan import plan
from stacklm.plan.run import run
from stacklm.plan.text import describe, size


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(TINY_PARAMS)
    return path


def test_the_plan_counts_as_the_model_does_and_spells_out_the_budget(file):
    params = load(file)
    text = describe(plan(params, list(params.models), None))
    for model in params.models.values():
        counts = count(model.architecture, params.tokenizer.vocab_size, params.train.context)
        assert f"{counts.total:,}" in text
    assert "4 x 16" in text or "64 tokens" in text
    assert "768 tokens" in text or "768" in text


def test_more_rows_at_once_take_more_memory(file):
    params = load(file)
    from stacklm.config.schema import plain

    tree = plain(params)
    tree["train"] |= {"batch_size": 256, "micro_batch": 256}
    assert plan(parse(tree), ["dense"], None).peak > plan(params, ["dense"], None).peak + 10_000_000


def test_what_fits_is_said_and_what_does_not_names_settings_that_do(file, capsys):
    assert run(file, [], ["dense"], file.with_name("none.json"), size("8GB"), write=False)
    assert "It fits" in capsys.readouterr().out
    big = ["train.batch_size=2048", "train.micro_batch=2048"]
    before = file.read_bytes()
    assert not run(file, big, ["dense"], file.with_name("none.json"), size("420MB"), write=False)
    assert "micro_batch" in capsys.readouterr().out
    assert file.read_bytes() == before
    run(file, big, ["dense"], file.with_name("none.json"), size("420MB"), write=True)
    assert load(file).train.batch_size == 2048
    assert load(file).train.micro_batch < 2048


def test_what_is_updated_in_backward_is_not_told_to_take_more_passes(file):
    longer = ["train.context=64"]
    params = preview(file, [*longer, "models.dense.optimizer={in_backward: true}", "train.clip_norm=null"])
    assert micro_batches(preview(file, longer)) and contexts(preview(file, longer))
    assert not micro_batches(params) and not contexts(params)


@pytest.mark.parametrize("text", ["8", "eight", "8XB"])
def test_a_budget_needs_a_unit(text):
    with pytest.raises(ValueError):
        size(text)
