import math
import re
from dataclasses import replace

import pytest
import torch

from stacklm.config.model import Dense
from stacklm.model.dense import FEED_FORWARDS, Attention, Block, DenseDecoder
from stacklm.model.kernels.elementwise import rotate
from stacklm.model.layers import Positions, rotations
from support.model_variants import CONTEXT, VOCAB, gradients, overfit, scattered
from support.rounding import assert_same, rounding, terms_of

pytestmark = pytest.mark.numerical

CONFIG = Dense(d_model=16, n_heads=2, n_layers=2, d_ff=32)
both_forms = pytest.mark.parametrize(
    "config", [CONFIG, replace(CONFIG, ffn="swiglu", tie_embeddings=True, conv_size=4)], ids=["plain", "swiglu, tied, convolved"]
)


def test_attention_is_what_its_formula_says():
    torch.manual_seed(0)
    attention = scattered(Attention(16, 2).double(), 1.0)
    x = torch.randn(1, 7, 16, dtype=torch.float64)
    rotation = rotations(Positions(7)(torch.zeros(1, 7)), 8)

    def turned(vector, norm, t):
        """One head's vector, normalised and turned as complex numbers at position t."""
        vector = norm.weight * vector / (vector.square().mean() + torch.finfo(torch.float64).eps).sqrt()
        angles = t * 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
        return torch.complex(vector[:4], vector[4:]) * torch.polar(torch.ones(4, dtype=torch.float64), angles)

    heads = []
    for h in (slice(0, 8), slice(8, 16)):
        q = [turned((attention.query.weight @ x[0, t])[h], attention.query_norm, t) for t in range(7)]
        k = [turned((attention.key.weight @ x[0, t])[h], attention.key_norm, t) for t in range(7)]
        v = (x[0] @ attention.value.weight.T)[:, h]
        rows = []
        for t in range(7):
            scores = torch.stack([(q[t] * k[s].conj()).real.sum() / math.sqrt(8) for s in range(t + 1)])
            rows.append(scores.softmax(0) @ v[: t + 1])
        heads.append(torch.stack(rows))
    wanted = torch.cat(heads, dim=-1) @ attention.output.weight.T
    assert_same(attention(x, rotation)[0].float(), wanted, terms_of(attention, 7))  # angles are float32


def test_a_rotation_keeps_lengths_and_shows_distances_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 8)
    cos, sin = rotations(torch.arange(30.0), 8)
    at = [[rotate(part.expand(1, 30, 1, 8), (cos, sin))[0, t, 0] for t in range(30)] for part in (q, k)]
    assert at[0][29].norm() == pytest.approx(q.norm().item(), rel=rounding(torch.float32, 8))
    error = 30 * rounding(torch.float32, 8) * (q.norm() * k.norm()).item()  # of angles up to 30
    assert (at[0][9] @ at[1][4]).item() == pytest.approx((at[0][25] @ at[1][20]).item(), abs=error)
    assert (at[0][9] @ at[1][4]).item() != pytest.approx((at[0][9] @ at[1][8]).item(), abs=1e-2)


@pytest.mark.parametrize("activation", FEED_FORWARDS)
def test_feed_forwards_are_what_their_formulas_say(activation):
    torch.manual_seed(0)
    layer = FEED_FORWARDS[activation](8, 24)
    torch.nn.init.normal_(layer.down.weight)
    x = torch.randn(5, 8)
    up = x @ layer.up.weight.T
    if activation == "relu2":
        hidden = torch.maximum(up, torch.zeros(())) ** 2
    else:
        gate = x @ layer.gate.weight.T
        hidden = gate / (1 + torch.exp(-gate)) * up
    assert_same(layer(x), hidden @ layer.down.weight.T, 8 + 24)


def test_a_convolution_reads_the_tokens_before_the_attention_does():
    """The block with it equals the block without it whose attention reads x_t + sum_i w_i x_{t-i}."""
    torch.manual_seed(0)
    block = scattered(Block(replace(CONFIG, conv_size=3)).double())
    x, rotation = torch.randn(1, 7, 16, dtype=torch.float64), rotations(Positions(7)(torch.zeros(1, 7)), 8)
    y = block.attention_norm(x)
    before = [torch.cat([torch.zeros(1, i, 16), y[:, :-i]], dim=1) for i in (1, 2)]
    read = y + sum(w * part for w, part in zip(block.conv.weight, before, strict=True))
    between = x + block.attention(read, rotation)
    wanted = between + block.feed_forward(block.feed_forward_norm(between))
    assert_same(block(x, rotation).float(), wanted, terms_of(block, 7))  # angles are float32


def test_blocks_add_nothing_at_the_start():
    model = DenseDecoder(CONFIG, VOCAB, CONTEXT)
    ids = torch.arange(CONTEXT)[None]
    assert torch.equal(model.features(ids), model.norm(model.embedding_norm(model.embedding(ids))))


@both_forms
def test_every_parameter_but_those_behind_a_zero_learns_from_the_first_step_and_all_from_the_second(config):
    torch.manual_seed(0)
    model = DenseDecoder(config, VOCAB, CONTEXT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.randint(VOCAB, (4, CONTEXT + 1))
    still = []
    for _ in range(2):
        still.append({name for name, gradient in gradients(model, ids).items() if not gradient.any()})
        optimizer.step()
    behind_a_zero = [name for name in still[0] if re.search(r"\.attention\.|\.feed_forward|_norm|\.conv\.", name)]
    assert still[0] and len(behind_a_zero) == len(still[0])
    assert not still[1]


def test_dynamic_skips_reach_every_layer_but_the_first_and_the_head():
    torch.manual_seed(0)
    model = scattered(DenseDecoder(replace(CONFIG, skip_connections="dynamic"), VOCAB, CONTEXT))
    ids = torch.arange(CONTEXT)[None]
    rotation = rotations(torch.arange(CONTEXT, dtype=torch.float32), 8)
    x_0 = model.embedding_norm(model.embedding(ids))
    x_1 = model.blocks[0](x_0, rotation)
    x_2 = model.blocks[1](model.skips[0]([x_0, x_1]), rotation)
    assert_same(model.features(ids), model.norm(model.skips[1]([x_0, x_1, x_2])), terms_of(model, CONTEXT))


def test_a_tied_head_is_the_embedding():
    model = DenseDecoder(replace(CONFIG, tie_embeddings=True), VOCAB, CONTEXT)
    assert model.head.weight is model.embedding.weight
    assert len([name for name, _ in model.named_parameters() if name.endswith(("head.weight", "embedding.weight"))]) == 1


def test_a_window_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match=r"sequence of 13 tokens.*context of 12"):
        DenseDecoder(CONFIG, VOCAB, CONTEXT)(torch.zeros(1, 13, dtype=torch.long))


@both_forms
def test_one_batch_is_overfit(config):
    torch.manual_seed(0)
    assert overfit(DenseDecoder(config, VOCAB, CONTEXT)) < 0.05
