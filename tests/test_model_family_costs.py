"""The formulas of the table in docs/family.md: what each setting adds to parameters and to the operations of a forward."""

from dataclasses import replace

import pytest

from stacklm.config.model import FoldedAttention, Stack, Stacked
from stacklm.model.count import count

V, T = 300, 64
S, N, C, H, D, F = 3, 6, 48, 4, 8, 100
W, K, NARROW = N * D, C // H, 6
LAST = 4 * W
BASE = Stacked(C, H, (Stack(N, D, F),) * S)
WIDE = replace(BASE, stacks=(*BASE.stacks[:-1], Stack(N, 4 * D, F)))
FOLDED = replace(BASE, attention=FoldedAttention())
RELU2 = replace(BASE, feed_forward="relu2")
FURTHER_KEYS = (2 * C + (T + 1) / 2) * -2 * S * N * H * (K - NARROW)


@pytest.mark.parametrize(
    ("base", "change", "parameters", "operations"),
    [
        (BASE, {"join": "residual"}, 0, 0),
        (BASE, {"reads": "first"}, C * (S - 1), 0),
        (BASE, {"reads": "all"}, C * S * (S - 1) // 2, 0),
        (BASE, {"convolution": 2}, S * C, 0),
        (BASE, {"convolution": 4}, S * 3 * C, 0),
        (BASE, {"feed_forward": "relu2"}, S * (W**2 + 2 * W - F - N * (8 * D**2 + 7 * D)), S * 2 * (W**2 - 8 * N * D**2)),
        (RELU2, {"feed_forward": "swiglu"}, S * W * F, S * 2 * W * F),
        (BASE, {"attention": FoldedAttention()}, S * N * (H * C * D - 2 * C**2 - 4 * C - D), 0),
        (FOLDED, {"attention": FoldedAttention(key_dim=NARROW)}, S * -2 * N * C * H * (K - NARROW), FURTHER_KEYS),
        (FOLDED, {"attention": FoldedAttention(rotary=True)}, 0, 0),
        (FOLDED, {"attention": FoldedAttention(qk_norm=True)}, S * 2 * K, 0),
        (WIDE, {"head": "tied"}, LAST * C - V * (LAST + 1), 2 * (LAST * C - V * (LAST - C))),
    ],
)
def test_a_setting_adds_what_the_table_says(base, change, parameters, operations):
    before, after = (count(architecture, V, T) for architecture in (base, replace(base, **change)))
    assert after.total - before.total == parameters
    assert after.forward_flops_per_token - before.forward_flops_per_token == operations


def test_shared_keys_and_values_save_those_of_all_layers_but_one():
    shared = replace(FOLDED, attention=FoldedAttention(keys_values="stack"))
    saved = S * (-(N - 1) * C * H * K + C**2 + N * C * D * (1 - H))
    assert count(shared, V, T).total - count(FOLDED, V, T).total == saved
