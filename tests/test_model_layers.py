import pytest
import torch

from stacklm.model.layers import BiasedHead, BiasedLinear, Embedding, Head, Linear


@pytest.mark.parametrize("kind", [Linear, BiasedLinear])
def test_a_map_keeps_the_variance_of_its_input_unless_told_otherwise(kind):
    torch.manual_seed(0)
    x = torch.randn(100, 200)
    assert kind(200, 300)(x).std().item() == pytest.approx(1, rel=0.05)
    assert kind(200, 300, std=0.5).weight.std().item() == pytest.approx(0.5, rel=0.05)
    assert not kind(200, 300, std=0)(x).any()


@pytest.mark.parametrize("kind", [Head, BiasedHead])
def test_first_logits_shrink_with_width(kind):
    torch.manual_seed(0)
    for width in (64, 256):
        assert kind(width, 500)(torch.randn(100, width)).std().item() == pytest.approx(width**-0.5, rel=0.05)


def test_a_bias_is_added():
    layer = BiasedLinear(3, 2)
    layer.bias.data = torch.tensor([1.0, -1.0])
    assert layer(torch.zeros(1, 3)).tolist() == [[1, -1]]


def test_an_embedding_is_a_row_a_token():
    embedding = Embedding(5, 3)
    assert torch.equal(embedding(torch.tensor([[4, 0]])), embedding.weight[[4, 0]][None])


def test_a_map_multiplies_and_adds_once_a_weight():
    assert Linear(7, 5).flops_per_token(attended=100) == 2 * 7 * 5
