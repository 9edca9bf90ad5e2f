import pytest
from model_family import CONTEXT, TINY, VARIANTS, VOCAB

from stacklm.model.count import count
from stacklm.report.family import cache_per_token, family


@pytest.mark.parametrize("axis", ["parameters", "flops"])
def test_every_variant_and_every_trade_has_a_row(axis):
    variants, grid = family(TINY, VOCAB, CONTEXT, axis).split("\n\n")
    rows = {line.split()[0]: line for line in variants.splitlines()[2:]}
    assert list(rows) == list(VARIANTS)
    for name, line in rows.items():
        assert f" {count(VARIANTS[name], VOCAB, CONTEXT).total:,} " in line
    assert "3 x 4" in rows["base"] and "4 x 4" in rows["growing"]
    title, _, *trades = grid.splitlines()
    assert axis.replace("flops", "operations") in title
    assert [line.split()[2] for line in trades] == ["16", "8", "4", "2", "1"]


def test_what_is_kept_of_a_token():
    kept = {name: cache_per_token(architecture, VOCAB, CONTEXT) for name, architecture in VARIANTS.items()}
    heads, layers, key_dim = 2, 4, 8
    assert kept["folded"] == layers * heads * (3 * key_dim + 4 + 4 + 8)
    assert kept["small-keys"] == kept["folded"] - layers * heads * 3 * (key_dim // 2)
    assert kept["shared-keys"] == 3 * heads * (key_dim + key_dim)
    assert kept["growing"] == kept["base"] + layers * heads * (key_dim + 4)
