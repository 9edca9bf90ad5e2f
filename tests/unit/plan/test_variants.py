"""The variants of a stacked model, and the trades of depth for parallel layers, as a table."""

import pytest

from stacklm.model.count import count
from stacklm.plan.text import variants_table
from support.model_variants import CONTEXT, TINY, VARIANTS, VOCAB


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
