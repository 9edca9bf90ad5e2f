"""Costs of an arm, and shapes that meet a budget."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stacklm.config.model import Dense, FactoredAttention, Model, Stack, Stacked
from stacklm.config.schema import ParamsError
from stacklm.config.train import Train
from stacklm.lab.budget import CLOSE, cost, d_ff_of, fitted, mismatch, scaled, with_d_ff
from stacklm.model.build import build

VOCAB = 512
TRAIN = Train(max_steps=50, context_length=32, global_batch_size=4, micro_batch_size=4)
DENSE = Model(Dense(d_model=64, n_heads=2, n_layers=5, d_ff=256))
STACKED = Model(Stacked(d_model=64, n_heads=2, stacks=(Stack(4, 16, 32), Stack(4, 32, 64))))
FACTORED = Model(replace(STACKED.architecture, attention=FactoredAttention(rope=True), ffn="swiglu", residual=True))


def test_a_cost_is_counted_on_every_axis():
    found = cost(DENSE, TRAIN, VOCAB)
    assert found.parameters == sum(weight.numel() for weight in build(DENSE.architecture, VOCAB, 32).parameters())
    assert found.tokens == 50 * 4 * 32
    assert (found.depth, found.kv_bytes) == (5, 5 * 2 * 64 * 4)
    assert cost(DENSE, replace(TRAIN, hard_stop=25), VOCAB).training_flops == found.training_flops / 2
    assert mismatch(found, found) == dict.fromkeys(["parameters", "training_flops", "tokens", "depth", "kv_bytes"], 0)


@pytest.mark.parametrize("axis", ["parameters", "training_flops"])
@pytest.mark.parametrize("model", [STACKED, FACTORED, replace(DENSE, architecture=replace(DENSE.architecture, n_layers=2))])
def test_the_shape_comes_as_near_to_the_budget_as_any(model, axis):
    target = cost(DENSE, TRAIN, VOCAB)
    found, reached = fitted("arm", model, TRAIN, VOCAB, target, axis)
    off = mismatch(reached, target)
    assert abs(off[axis]) < CLOSE
    assert off == mismatch(cost(found, TRAIN, VOCAB), target)
    d_ff = d_ff_of(found.architecture)
    for other in (d_ff - 1, d_ff + 1):
        changed = replace(found, architecture=with_d_ff(found.architecture, other))
        assert abs(mismatch(cost(changed, TRAIN, VOCAB), target)[axis]) >= abs(off[axis])
    if isinstance(found.architecture, Stacked):
        first, second = (stack.d_ff for stack in found.architecture.stacks)
        assert second == pytest.approx(2 * first, abs=1)


def test_equal_tokens_leave_shapes_alone():
    target = cost(DENSE, TRAIN, VOCAB)
    found, reached = fitted("arm", STACKED, TRAIN, VOCAB, target, "tokens")
    off = mismatch(reached, target)
    assert found == STACKED and off["tokens"] == 0 and off["parameters"] != 0


def test_a_budget_that_no_d_ff_meets_is_refused_with_the_numbers():
    wide = Model(Dense(d_model=256, n_heads=2, n_layers=5, d_ff=8))
    why = r"wide cannot meet the budget: the nearest is [\d,]+ parameters at d_ff 1, \+\d+\.\d% from the"
    with pytest.raises(ParamsError, match=why):
        fitted("wide", wide, TRAIN, VOCAB, cost(DENSE, TRAIN, VOCAB), "parameters")


def test_sizes_multiply_all_widths_and_keep_the_head_dim():
    assert scaled(DENSE.architecture, 2) == Dense(d_model=128, n_heads=4, n_layers=5, d_ff=512)
    assert scaled(STACKED.architecture, 2) == Stacked(d_model=128, n_heads=4, stacks=(Stack(4, 32, 64), Stack(4, 64, 128)))
    assert scaled(scaled(STACKED.architecture, 2), 0.5) == STACKED.architecture
    with pytest.raises(ParamsError, match=r"size 0\.25: n_heads 2 \* 0\.25 = 0\.5 is not a whole number"):
        scaled(STACKED.architecture, 0.25)
