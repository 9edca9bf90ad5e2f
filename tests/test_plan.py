"""The plan says what a run takes, from the settings alone, and finds settings that fit a budget."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TINY_PARAMS

from stacklm.config.params import load, parse, preview
from stacklm.model.count import count
from stacklm.plan.levers import (
    LEVERS,
    contexts,
    factored_state,
    fit,
    groups_of_layers,
    micro_batches,
    precision,
    recomputation,
)
from stacklm.plan.plan import plan
from stacklm.plan.run import run
from stacklm.plan.text import describe, size
from stacklm.report.units import quantity


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


def test_the_disk_holds_every_checkpoint_that_is_kept(file):
    params = preview(file, ["train.schedule=wsd", "train.milestone_every=4"])
    found = plan(params, ["dense"], None)
    assert "the last 2, the best, the one being written, 5 milestones" in describe(
        found
    )  # of steps 0, 4, 8, 12, and the plateau's end
    one = found.models["dense"].checkpoint
    assert f"{quantity(9 * one, 'B')} of checkpoints" in describe(found)


def test_more_rows_at_once_take_more_memory(file):
    params = load(file)
    from stacklm.config.schema import plain

    tree = plain(params)
    tree["train"] |= {"batch_size": 512, "micro_batch": 512}  # 9 MB of tensors; what the C library keeps back varies
    assert plan(parse(tree), ["dense"], None).peak > plan(params, ["dense"], None).peak + 5_000_000


def test_what_fits_is_said_and_what_does_not_names_settings_that_do(file, capsys):
    assert run(file, [], ["dense"], file.with_name("none.json"), size("8GB"), write=False)
    assert "It fits" in capsys.readouterr().out
    big = ["train.batch_size=2048", "train.micro_batch=2048"]
    before = file.read_bytes()
    budget = plan(preview(file, big), ["dense"], None).models["dense"].training.total - 3_000_000
    assert not run(file, big, ["dense"], file.with_name("none.json"), budget, write=False)
    assert "micro_batch" in capsys.readouterr().out
    assert file.read_bytes() == before
    run(file, big, ["dense"], file.with_name("none.json"), budget, write=True)
    assert load(file).train.batch_size == 2048
    assert load(file).train.micro_batch < 2048


def test_what_is_updated_in_backward_is_not_told_to_take_more_passes(file):
    longer = ["train.context=64"]
    params = preview(file, [*longer, "models.dense.optimizer={in_backward: true}", "train.clip_norm=null"])
    names = list(params.models)
    assert micro_batches(preview(file, longer), names) and contexts(preview(file, longer), names)
    assert not micro_batches(params, names) and not contexts(params, names)


def test_layers_run_in_groups_where_that_saves_something(file):
    stacks = "[{layers: 8, features: 8, hidden: 16}]"
    architecture = f"{{kind: stacked, width: 64, heads: 2, stacks: {stacks}}}"
    settings = [f"models.stacked.architecture={architecture}", "train.context=512", "train.batch_size=32", "train.micro_batch=32"]
    levers = [lever for lever in LEVERS if lever.options is groups_of_layers]
    (move,) = fit(lambda more: preview(file, [*settings, *more]), ["stacked"], 1, levers)
    assert move.assignments == ["train.layers_at_once=1"]
    assert fit(lambda more: preview(file, [*settings, *more]), ["dense"], 1, levers) == []


def test_levers_are_offered_once(file):
    params = preview(file, ["train.recompute=stacks", "train.precision=bf16", "models.dense.optimizer={kind: adafactor}"])
    assert recomputation(params, ["dense"]) == precision(params, ["dense"]) == factored_state(params, ["dense"]) == []
    assert factored_state(params, ["dense", "stacked"]) == [["models.stacked.optimizer={kind: adafactor}"]]


@pytest.mark.parametrize("text", ["8", "eight", "8XB"])
def test_a_budget_needs_a_unit(text):
    with pytest.raises(ValueError):
        size(text)
