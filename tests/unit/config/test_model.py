"""Contradictory model settings are reported; the depth depends on the context."""

import re

import pytest

from stacklm.config.model import Dense, FactoredAttention, Stack, Stacked
from stacklm.config.schema import ParamsError, read

STACKS = (Stack(4, 4, 8), Stack(2, 8, 8), Stack(1, 16, 8), Stack(4, 8, 8))


def stacked(**changes):
    return Stacked(**{"d_model": 16, "n_heads": 2, "stacks": STACKS, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stacks": ()}, "stacks: [] is not allowed"),
        ({"n_heads": 3}, "n_heads: 3 does not divide d_model 16"),
        ({"stacks": (Stack(2, 4, 8), Stack(4, 4, 8))}, "stacks[0]: features 4 * layers 2 = 8, but every stack except the last"),
        ({"residual": True, "stacks": (Stack(3, 4, 8),)}, "residual: adds d_model 16 to the last stack's 12"),
        ({"skip_connections": "input", "stacks": STACKS[:1]}, "skip_connections: input needs at least 2 stacks"),
        (
            {"tokens_per_extra_stack": 8, "stacks": STACKS[3:]},
            "tokens_per_extra_stack: 8 repeats the only stack, so it must give d_model = 16, not 32",
        ),
        ({"attention": FactoredAttention(qk_head_dim=3, rope=True)}, "qk_head_dim must be even, not 3"),
        ({"d_model": 6, "stacks": (Stack(2, 3, 8),), "attention": FactoredAttention(rope=True)}, "must be even, not 3"),
    ],
)
def test_contradictions_are_named(changes, message):
    with pytest.raises(ParamsError, match=re.escape(message)):
        stacked(**changes)


def test_what_only_looks_like_a_contradiction_is_allowed():
    stacked(residual=True)
    stacked(tokens_per_extra_stack=8, stacks=STACKS[:1], skip_connections="dense")
    stacked(attention=FactoredAttention(qk_head_dim=3))
    stacked(attention=FactoredAttention(rope=True))


TREE = {"d_model": 16, "n_heads": 2, "stacks": [{"layers": 4, "features": 4, "d_ff": 8}]}


def test_the_settings_of_the_family_have_the_published_form_for_defaults():
    published = {
        "attention": {"kind": "published"},
        "ffn": "per_layer",
        "residual": False,
        "skip_connections": "none",
        "conv_size": 1,
        "tie_embeddings": False,
        "tokens_per_extra_stack": 0,
    }
    assert read(Stacked, TREE) == read(Stacked, {"kind": "stacked", **TREE, **published})


def test_a_setting_of_another_attention_is_an_unknown_key():
    with pytest.raises(ParamsError, match=r"attention\.rope: unknown key"):
        read(Stacked, {**TREE, "attention": {"kind": "published", "rope": True}})


@pytest.mark.parametrize(
    ("stacks", "context", "wanted"),
    [
        (STACKS, 2048, [0, 1, 2, 3]),
        (STACKS, 2049, [0, 1, 1, 2, 3]),
        (STACKS, 6144, [0, 1, 1, 1, 2, 3]),
        (STACKS[1:], 4096, [0, 1, 1, 2]),
        (STACKS[2:], 4096, [0, 0, 1]),
        (STACKS[:1], 8192, [0, 0, 0, 0]),
    ],
)
def test_one_stack_more_in_the_middle_for_every_2048_tokens_more(stacks, context, wanted):
    architecture = stacked(stacks=stacks, tokens_per_extra_stack=2048)
    assert architecture.stacks_for(context) == tuple(stacks[i] for i in wanted)
    assert architecture.depth(context) == len(wanted)


def test_the_depth_follows_the_context_only_where_it_is_told_to():
    assert stacked().stacks_for(10**6) == STACKS
    assert stacked().depth(10**6) == 4
    assert Dense(d_model=16, n_heads=2, n_layers=3, d_ff=8).depth(10**6) == 3
