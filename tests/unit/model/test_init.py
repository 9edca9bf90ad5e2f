"""Weights are initialised at the documented scales, by family, and dropout acts where documented."""

from __future__ import annotations

import math

import pytest
import torch

from stacklm.config.model import Dense, FactoredAttention, Stack, Stacked
from stacklm.model.build import build

C, H, D, HIDDEN, V, N = 64, 4, 16, 128, 500, 4
DEPTH = 2
STACKS = (Stack(N, D, HIDDEN),) * DEPTH
KEY_DIM = 24
BRANCH = (2 * DEPTH) ** -0.5
"""What a branch adds starts smaller by this: of the serial depth, not of the number of layers."""
OF_ALL = {"embedding.weight": 0.02, "head.weight": 1 / C}
QKV = {"attention.query.weight": C**-0.5, "attention.key.weight": C**-0.5, "attention.value.weight": C**-0.5}
ATTENTION = QKV | {"attention.output.weight": BRANCH * C**-0.5, "attention.reduce.weight": C**-0.5}
"""Published, and of factored attention that with shared keys and values."""
FACTORED = QKV | {"attention.value.weight": BRANCH * (H * C) ** -0.5, "attention.reduce.weight": C**-0.5}
MICRO = {
    "layer_ffn.expand.weight": D**-0.5,
    "layer_ffn.contract.weight": BRANCH * (4 * D) ** -0.5,
    "mix.expand.weight": C**-0.5,
    "mix.contract.weight": (2 / HIDDEN) ** 0.5,
}
ONE_MAP = {"mix.weight": C**-0.5, "ffn.up.weight": C**-0.5, "ffn.down.weight": 0}
DENSE = QKV | {"attention.output.weight": 0, "feed_forward.up.weight": C**-0.5, "feed_forward.down.weight": 0}
FORMS = {
    "published": (Stacked(C, H, STACKS), ATTENTION | MICRO),
    "residual": (Stacked(C, H, STACKS, residual=True), ATTENTION | MICRO | {"mix.contract.weight": 0}),
    "relu2": (Stacked(C, H, STACKS, ffn="relu2"), ATTENTION | ONE_MAP),
    "swiglu": (Stacked(C, H, STACKS, ffn="swiglu"), ATTENTION | ONE_MAP | {"ffn.gate.weight": C**-0.5}),
    "factored": (Stacked(C, H, STACKS, attention=FactoredAttention(qk_head_dim=KEY_DIM)), FACTORED | MICRO),
    "shared": (Stacked(C, H, STACKS, attention=FactoredAttention(kv_sharing="stack")), ATTENTION | MICRO),
    "options": (
        Stacked(C, H, STACKS, conv_size=4, skip_connections="dense", attention=FactoredAttention(qk_norm=True)),
        FACTORED | MICRO,
    ),
    "dense": (Dense(C, H, DEPTH, HIDDEN), DENSE),
    "dense swiglu": (Dense(C, H, DEPTH, HIDDEN, ffn="swiglu"), DENSE | {"feed_forward.gate.weight": C**-0.5}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_weight_starts_at_the_scale_of_its_family(form):
    """The standard deviation of n normal numbers is itself normal about the true one, with std / sqrt(2 n) of its own.

    Five of those are exceeded once in 2 million, and there are about 100 parameters; the mean lies within 5 std / sqrt(n).
    """
    architecture, expected = FORMS[form]
    torch.manual_seed(0)
    seen = set()
    for name, weight in build(architecture, V, 8).named_parameters():
        (family,) = [end for end in (*expected, *OF_ALL) if name.endswith(end)] or [None]
        if family is None:  # gains, biases
            assert bool((weight == (1 if name.endswith("norm.weight") else 0)).all()), name
            continue
        seen.add(family)
        std, n = (expected | OF_ALL)[family], weight.numel()
        assert abs(weight.std().item() - std) <= 5 * std / math.sqrt(2 * n), (name, weight.std().item(), std)
        assert abs(weight.mean().item()) <= 5 * std / math.sqrt(n), name
    assert seen == {*expected, *OF_ALL}


def test_scales_follow_the_serial_depth_and_not_the_number_of_layers():
    def stds(stacks: tuple[Stack, ...]) -> list[float]:
        torch.manual_seed(0)
        stack = build(Stacked(C, H, stacks), V, 8).stacks[0]
        return [weight.std().item() for weight in (stack.attention.output.weight, stack.layer_ffn.contract.weight)]

    shallow = stds(STACKS)
    assert stds(STACKS * 4) == pytest.approx([std / 2 for std in shallow], rel=1e-4)  # depth 8 after 2: half the same numbers
    error = 10 / math.sqrt(2 * N * C * C)
    assert stds((Stack(2 * N, D // 2, HIDDEN),) * DEPTH)[0] == pytest.approx(shallow[0], rel=error)


def branches(form: str, dropout: float) -> tuple[torch.nn.Module, torch.Tensor]:
    """A stack whose every weight counts, in training mode, and an input [B, T, C]."""
    torch.manual_seed(1)
    model = build(Stacked(C, H, STACKS, ffn=form, dropout=dropout), V, 8)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train().stacks[0], torch.randn(2, 8, C)


def assert_half_dropped(found: torch.Tensor, kept: torch.Tensor, branch: torch.Tensor) -> None:
    """Each number is `kept`, or that plus its branch divided by the share that is kept."""
    dropped = found == kept
    bound = 8 * torch.finfo(torch.float32).eps * (kept.abs() + 2 * branch.abs()).max()
    assert (found - torch.where(dropped, kept, kept + 2 * branch)).abs().max() <= bound
    assert abs(dropped.float().mean().item() - 0.5) <= 5 * 0.5 / math.sqrt(dropped.numel())


def test_dropout_acts_on_the_output_of_the_small_feed_forward_only():
    """r + dropout(ffn(r)): r is never dropped."""
    stack, x_BTC = branches("per_layer", 0.5)
    seen = {}
    stack.mix.register_forward_pre_hook(lambda _, arguments: seen.update(mixed=arguments[0]))
    with torch.no_grad():
        r_BTND = stack.attention(x_BTC)
        assert torch.equal(r_BTND, stack.attention(x_BTC))  # nothing is dropped in attention
        stack(x_BTC)
        stack.eval()
        branch = stack.layer_ffn(r_BTND).flatten(2)
    assert_half_dropped(seen["mixed"], r_BTND.flatten(2), branch)
    with torch.no_grad():
        mixed = stack.mix(seen["mixed"])
        stack.train()
        torch.manual_seed(7)
        assert torch.equal(stack.mix(seen["mixed"]), mixed)  # nor in the mix


@pytest.mark.parametrize("form", ["relu2", "swiglu"])
def test_dropout_acts_on_the_feed_forward_of_a_stack_and_not_on_its_residual(form):
    stack, x_BTC = branches(form, 0.5)
    with torch.no_grad():
        y_BTW = stack.mix(stack.attention(x_BTC).flatten(2))
        out_BTW = stack(x_BTC)
        branch = stack.ffn(stack.ffn_norm(y_BTW))
    assert_half_dropped(out_BTW, y_BTW, branch)


@pytest.mark.parametrize("attention", [None, FactoredAttention(), FactoredAttention(kv_sharing="stack")])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("form", ["per_layer", "relu2"])
def test_a_stack_drops_once_and_nothing_else_in_the_model_is_random(form, residual, attention):
    torch.manual_seed(2)
    changes = {} if attention is None else {"attention": attention}
    model = build(Stacked(C, H, STACKS, ffn=form, residual=residual, skip_connections="dense", dropout=0.5, **changes), V, 8)
    dropouts, sizes = [part for part in model.modules() if isinstance(part, torch.nn.Dropout)], []
    for dropout in dropouts:
        dropout.register_forward_hook(lambda part, inputs, _: sizes.append((part.p, inputs[0].numel())))
    ids_BT = torch.randint(V, (2, 8))
    with torch.no_grad():
        model.train()(ids_BT)
        assert sizes == [(0.5, 2 * 8 * stack.layers * stack.features) for stack in STACKS]
        for dropout in dropouts:
            dropout.p = 0
        assert torch.equal(model(ids_BT), model.eval()(ids_BT))


def test_without_training_nothing_is_dropped():
    stack, x_BTC = branches("per_layer", 0.99)
    with torch.no_grad():
        assert torch.equal(stack.eval()(x_BTC), stack(x_BTC)) and not torch.equal(stack.train()(x_BTC), stack(x_BTC))
