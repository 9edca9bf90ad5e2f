"""The plan says what a run takes, from the settings alone, and finds settings that fit a budget."""

from __future__ import annotations

from pathlib import Path

import pytest

from stacklm.config.params import load, preview
from stacklm.model.count import count
from stacklm.plan.plan import memory_options, plan
from stacklm.plan.text import describe, print_plan, size
from stacklm.units import quantity
from support.checkout import TINY_PARAMS


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(TINY_PARAMS)
    return path


def test_the_plan_counts_as_the_model_does_and_spells_out_the_budget(file):
    params = load(file)
    text = describe(plan(params, list(params.models), None))
    for model in params.models.values():
        counts = count(model.architecture, params.tokenizer.vocab_size, params.train.context_length)
        assert f"{counts.total:,}" in text
    train = params.train
    assert (
        f"{train.max_steps:,} steps * {train.tokens_per_step:,} tokens = {train.max_steps * train.tokens_per_step:,} tokens" in text
    )


def test_the_disk_holds_every_checkpoint_that_is_kept(file):
    params = preview(file, ["train.lr_schedule=wsd", "train.keep_every=4"])
    found = plan(params, ["dense"], None)
    assert "the last 2, the best, the one being written, 5 milestones" in describe(
        found
    )  # of steps 0, 4, 8, 12, and the plateau's end
    one = found.models["dense"].checkpoint
    assert f"{quantity(9 * one, 'B')} of checkpoints" in describe(found)
    thrice = describe(plan(preview(file, ["train.keep_every=3", "seeds=[1,2,3]"]), ["dense"], None))
    assert f"{quantity(27 * one, 'B')} of checkpoints" in thrice and "of 3 seeds" in thrice


def test_more_rows_at_once_take_more_memory(file):
    big = ["train.global_batch_size=512", "train.micro_batch_size=512"]
    more, fewer = (plan(preview(file, changes), ["dense"], None).largest for changes in (big, []))
    assert more.total > fewer.total + 5_000_000


def test_what_fits_is_said_and_what_does_not_names_settings_that_do(file, capsys):
    assert print_plan(file, [], ["dense"], file.with_name("none.json"), size("8GB"), write=False)
    assert "It fits" in capsys.readouterr().out
    big = ["train.global_batch_size=512", "train.micro_batch_size=512"]
    before = file.read_bytes()
    budget = plan(preview(file, big), ["dense"], None).models["dense"].training.total - 3_000_000
    assert not print_plan(file, big, ["dense"], file.with_name("none.json"), budget, write=False)
    assert "micro_batch_size" in capsys.readouterr().out
    assert file.read_bytes() == before
    print_plan(file, big, ["dense"], file.with_name("none.json"), budget, write=True)
    assert load(file).train.global_batch_size == 512
    assert load(file).train.micro_batch_size < 512


def offered(file: Path, assignments: list[str], names: list[str]) -> dict[str, list[list[str]]]:
    """The candidates of every option that has any, with those settings."""
    options = memory_options(preview(file, assignments), names)
    return {key: option.candidates for key, option in options.items() if option.candidates}


def test_what_is_updated_in_backward_is_not_told_to_take_more_passes(file):
    longer = ["train.context_length=64"]
    before = offered(file, longer, ["dense"])
    assert before["context_length"][0] == ["train.context_length=32", "train.global_batch_size=8"]
    within = [*longer, "models.dense.optimizer={optimizer_in_backward: true}", "train.max_grad_norm=null"]
    assert before.keys() - offered(file, within, ["dense"]).keys() == {"micro_batch_size", "context_length"}


def test_options_in_use_are_not_offered_again(file):
    used = ["train.activation_checkpointing=full", "train.precision=bf16", "models.dense.optimizer={kind: adafactor}"]
    gone = offered(file, [], ["dense"]).keys() - offered(file, used, ["dense"]).keys()
    assert gone == {"activation_checkpointing", "precision", "optimizer"}
    assert offered(file, used, ["dense", "stacked"])["optimizer"] == [["models.stacked.optimizer={kind: adafactor}"]]


@pytest.mark.parametrize("text", ["8", "eight", "8XB"])
def test_a_budget_needs_a_unit(text):
    with pytest.raises(ValueError):
        size(text)
