"""The plan estimates the cost of a run from the settings alone, and finds settings that fit a budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stacklm.config.params import load, preview
from stacklm.model.count import count
from stacklm.plan.plan import memory_options, plan
from stacklm.plan.text import describe, is_out_of_memory, print_plan, size, variants_table
from stacklm.units import quantity
from support.checkout import write_project
from support.model_variants import CONTEXT, TINY, VARIANTS, VOCAB


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_project(tmp_path).params_file


def test_the_plan_counts_as_the_model_does_and_spells_out_the_budget(file):
    params = load(file)
    text = describe(plan(params, list(params.models), None))
    for model in params.models.values():
        counts = count(model.architecture, params.tokenizer.vocab_size, params.train.context_length)
        assert f"{counts.total:,}" in text
    steps, tokens = params.train.max_steps, params.train.tokens_per_step
    assert f"{steps:,} steps * {tokens:,} tokens = {steps * tokens:,} tokens" in text


def test_the_disk_holds_every_checkpoint_that_is_kept(file):
    params = preview(file, ["train.lr_schedule=wsd", "train.keep_every=4"])
    found = plan(params, ["dense"], None)
    text, one = describe(found), found.models["dense"].checkpoint
    assert "the last 2, the best, the one being written, 5 kept permanently" in text  # steps 0, 4, 8, 12, and the plateau's end
    assert f"{quantity(9 * one, 'B')} of checkpoints" in text
    thrice = describe(plan(preview(file, ["train.keep_every=3", "seeds=[1,2,3]"]), ["dense"], None))
    assert f"{quantity(27 * one, 'B')} of checkpoints" in thrice and "for 3 seeds" in thrice


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


def test_what_torch_says_when_memory_is_out_is_understood() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


@pytest.mark.parametrize("axis", ["parameters", "flops"])
def test_every_variant_and_every_trade_has_a_row(axis):
    variants, grid = variants_table(TINY, VOCAB, CONTEXT, axis).split("\n\n")
    rows = {line.split()[0]: line for line in variants.splitlines()[3:]}
    assert list(rows) == list(VARIANTS)
    for name, line in rows.items():
        assert f" {count(VARIANTS[name], VOCAB, CONTEXT).total:,} " in line
    assert "3 x 4" in rows["base"] and "4 x 4" in rows["extra-stack"]
    title, _, _, *trades = grid.splitlines()
    assert axis.replace("flops", "FLOPs") in title
    assert [line.split()[2] for line in trades] == ["16", "8", "4", "2", "1"]
    kept = {name: int(line.split()[-1].replace(",", "")) for name, line in rows.items()}
    heads, layers, key_dim = 2, 4, 8
    assert kept["factored"] == layers * heads * (3 * key_dim + 4 + 4 + 8)
    assert kept["narrow-qk"] == kept["factored"] - layers * heads * 3 * (key_dim // 2)
    assert kept["kv-sharing"] == 3 * heads * (key_dim + key_dim)
    assert kept["extra-stack"] == kept["base"] + layers * heads * (key_dim + 4)
