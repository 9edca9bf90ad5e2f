import math

import pytest
import torch
import torch.nn.functional as F

from stacklm.model.layers import (
    DenseSkip,
    DynamicSkip,
    Embedding,
    Head,
    Linear,
    PackedLayerNorm,
    PackedLinear,
    Positions,
    ShortConv,
    rotations,
    sinusoids,
)
from support.model_variants import scattered
from support.rounding import assert_same


@pytest.mark.parametrize("bias", [False, True])
def test_a_map_keeps_the_variance_of_its_input_unless_told_otherwise(bias):
    torch.manual_seed(0)
    x = torch.randn(100, 200)
    assert Linear(200, 300, bias)(x).std().item() == pytest.approx(1, rel=0.05)
    assert Linear(200, 300, bias, std=0.5).weight.std().item() == pytest.approx(0.5, rel=0.05)
    assert not Linear(200, 300, bias, std=0)(x).any()


@pytest.mark.parametrize("bias", [False, True])
def test_first_logits_shrink_with_width(bias):
    torch.manual_seed(0)
    for width in (64, 256):
        assert Head(width, 500, bias)(torch.randn(100, width)).std().item() == pytest.approx(width**-0.5, rel=0.05)


def test_a_bias_is_added():
    layer = Linear(3, 2, bias=True)
    layer.bias.data = torch.tensor([1.0, -1.0])
    assert layer(torch.zeros(1, 3)).tolist() == [[1, -1]]


def test_an_embedding_is_a_row_a_token():
    embedding = Embedding(5, 3)
    assert torch.equal(embedding(torch.tensor([[4, 0]])), embedding.weight[[4, 0]][None])


def test_a_map_multiplies_and_adds_once_a_weight():
    assert Linear(7, 5).flops_per_token(attended=100) == 2 * 7 * 5


@pytest.mark.parametrize("bias", [True, False])
def test_packed_maps_are_separate_maps(bias):
    maps = scattered(PackedLinear(3, 5, 4, bias))
    x = torch.randn(2, 6, 3, 5)
    for n in range(3):
        own = (maps.weight[n],) if maps.bias is None else (maps.weight[n], maps.bias[n])
        assert_same(maps(x)[:, :, n], F.linear(x[:, :, n], *own), 6)
        assert_same(maps.shared(x[:, :, 0])[:, :, n], F.linear(x[:, :, 0], *own), 6)


def test_packed_norms_are_separate_norms():
    norms = scattered(PackedLayerNorm(3, 4))
    x = torch.randn(2, 6, 3, 4)
    for n in range(3):
        assert_same(norms(x)[:, :, n], F.layer_norm(x[:, :, n], (4,), norms.weight[n], norms.bias[n]), 2 * 4)


@pytest.mark.parametrize("reach", [1, 3])
def test_a_short_convolution_is_the_sum_over_its_reach(reach):
    convolution = ShortConv(5, reach)
    torch.nn.init.normal_(convolution.weight)
    x = torch.randn(2, 8, 5)
    for t in range(8):
        wanted = x[:, t] + sum(convolution.weight[i - 1] * x[:, t - i] for i in range(1, reach + 1) if t >= i)
        assert_same(convolution(x)[:, t], wanted, reach + 1)


def test_a_convolution_slides_over_tokens_that_follow_others():
    convolution = ShortConv(5, 3)
    torch.nn.init.normal_(convolution.weight)
    x = torch.randn(2, 8, 5)
    assert torch.equal(convolution.slide(x[:, 2:]), convolution(x)[:, 5:])


def test_a_dense_skip_adds_the_first_outputs_to_the_latest():
    outputs = [torch.randn(2, 4, 5) for _ in range(4)]
    for sources in (1, 3):
        skip = DenseSkip(sources, 5)
        assert torch.equal(skip(outputs), outputs[3])
        torch.nn.init.normal_(skip.weight)
        assert_same(skip(outputs), outputs[3] + sum(skip.weight[i] * outputs[i] for i in range(sources)), sources + 1)


def test_a_dynamic_skip_weighs_the_earlier_outputs_token_by_token():
    outputs = [torch.randn(2, 4, width) for width in (3, 3, 5)]
    skip = DynamicSkip(2, 5)
    assert torch.equal(skip(outputs), outputs[2])
    torch.nn.init.normal_(skip.weights.weight)
    torch.nn.init.normal_(skip.weights.bias)
    weights = skip.weights(F.layer_norm(outputs[2], (5,)))
    wanted = outputs[2].clone()
    wanted[..., :3] += weights[..., :1] * outputs[0] + weights[..., 1:] * outputs[1]
    assert_same(skip(outputs), wanted, 4)


def test_positions_count_from_zero_up_to_the_context():
    assert Positions(4)(torch.zeros(3, 4)).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="sequence of 5 tokens is longer than the model's context of 4"):
        Positions(4)(torch.zeros(3, 5))


@pytest.mark.parametrize("width", [8, 7])
def test_sinusoids_follow_the_paper(width):
    table = sinusoids(torch.arange(20.0), width)
    assert table.shape == (20, width)
    for t, i in [(0, 0), (1, 0), (3, 2), (19, 4), (19, 6)]:
        angle = t / 10_000 ** (i / (2 * ((width + 1) // 2)))
        assert table[t, i].item() == pytest.approx(math.sin(angle), abs=1e-5)
        if i + 1 < width:
            assert table[t, i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_rotations_turn_each_plane_at_its_own_speed():
    cos, sin = rotations(torch.arange(20.0), 6)
    assert cos.shape == sin.shape == (20, 1, 3)
    for plane in range(3):
        assert math.atan2(sin[1, 0, plane], cos[1, 0, plane]) == pytest.approx(10_000 ** (-plane / 3), rel=1e-5)
