import pytest
import torch

from stacklm.model.dense import Attention
from stacklm.model.folded import FoldedAttention, PackedMap, Prepare, QueryKeyNorm, SharedAttention
from stacklm.model.packed import FoldedValues
from stacklm.model.positions import Positions, Rotary, rotations

CONTEXT = 9


def relative_error(found, wanted):
    return (found - wanted).norm() / wanted.norm()


def scattered(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def test_packed_maps_are_separate_maps():
    maps = PackedMap(3, 5, 4)
    x = torch.randn(2, 6, 3, 5)
    for n in range(3):
        assert torch.allclose(maps(x)[:, :, n], x[:, :, n] @ maps.weight[n].T, atol=1e-6)
        assert torch.allclose(maps.shared(x[:, :, 0])[:, :, n], x[:, :, 0] @ maps.weight[n].T, atol=1e-6)


@pytest.mark.parametrize("kind", [FoldedAttention, SharedAttention])
def test_a_single_layer_is_the_attention_of_the_dense_twin(kind):
    """N = 1 and D = C, with the dense one's value and output maps in one, or one after the other; and the residual's way shut."""
    width, heads = 16, 2
    dense = Attention(width, heads)
    prepare = Prepare([QueryKeyNorm(width // heads), Rotary(CONTEXT)])
    layer = kind(1, width, heads, width, 1, width // heads, prepare).double()
    scattered(dense)
    layer.query.weight.data = dense.query.weight.data[None]
    prepare[0].query.weight.data, prepare[0].key.weight.data = dense.query_norm.weight.data, dense.key_norm.weight.data
    layer.reduce.weight.data.zero_()
    if kind is FoldedAttention:
        layer.key.weight.data = dense.key.weight.data[None]
        outputs_HCK = dense.output.weight.unflatten(1, (heads, -1)).transpose(0, 1)
        layer.value.weight.data = (outputs_HCK @ dense.value.weight.unflatten(0, (heads, -1))).flatten(0, 1)[None].data
    else:
        layer.key.weight.data, layer.value.weight.data = dense.key.weight.data, dense.value.weight.data
        layer.output.weight.data = dense.output.weight.data[None]
    x = torch.randn(2, CONTEXT, width, dtype=torch.float64)
    rotation = rotations(Positions(CONTEXT)(x), width // heads)
    assert relative_error(layer(x)[:, :, 0], dense(x, rotation)) < 1e-12


def test_the_published_attention_without_biases_is_a_folded_one():
    layers, width, heads, features = 3, 16, 2, 4
    published = FoldedValues(layers, width, heads, features, depth=2).double()
    folded = FoldedAttention(layers, width, heads, features, 2, width // heads, Prepare()).double()
    folded.query.weight.data, folded.key.weight.data = published.query.weight.data, published.key.weight.data
    folded.reduce.weight.data = published.reduce.weight.data
    value_NHKC = published.value.weight.unflatten(1, (heads, -1))
    folded.value.weight.data = (published.fold_outputs() @ value_NHKC).flatten(1, 2).data
    x = torch.randn(2, CONTEXT, width, dtype=torch.float64)
    assert relative_error(folded(x), published(x)) < 1e-12


@pytest.mark.parametrize("kind", [FoldedAttention, SharedAttention])
def test_attention_starts_as_large_as_the_published_one_and_smaller_with_serial_depth(kind):
    def attended(kind, depth, layers=8, **keywords):
        torch.manual_seed(0)
        x = torch.randn(4, 2, 128)
        attention = kind(layers, 128, 4, 16, depth, **keywords)
        return (attention(x) - attention.reduce.shared(x)).std().item()

    own = {"key_dim": 32, "prepare": Prepare()}
    assert attended(kind, 2, **own) == pytest.approx(attended(FoldedValues, 2), rel=0.2)
    assert attended(kind, 8, **own) / attended(kind, 2, **own) == pytest.approx(0.5, rel=1e-3)
    assert attended(kind, 2, layers=2, **own) == pytest.approx(attended(kind, 2, layers=32, **own), rel=0.2)


def test_layers_that_share_keys_see_the_same_and_make_their_own_of_it():
    attention = SharedAttention(3, 16, 2, 4, 1, 8, Prepare())
    q, k, v = attention.project(torch.randn(2, CONTEXT, 16))
    assert q.shape[2] == 6 and k.shape[2] == v.shape[2] == 2
    attention.query.weight.data[1:] = attention.query.weight.data[:1]
    r = attention(torch.randn(2, CONTEXT, 16))
    assert not torch.allclose(r[:, :, 0], r[:, :, 1], atol=0.1)
    attention.output.weight.data[1:] = attention.output.weight.data[:1]
    attention.reduce.weight.data[1:] = attention.reduce.weight.data[:1]
    r = attention(torch.randn(2, CONTEXT, 16))
    assert torch.allclose(r[:, :, 0], r[:, :, 1], atol=1e-6)


def test_normalised_queries_and_keys_do_not_change_with_their_length():
    norm = QueryKeyNorm(8)
    norm.query.weight.data.fill_(2)
    q, k = torch.randn(2, 2, 5, 3, 8)
    large, small = norm(100 * q, 100 * k), norm(q, k)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(large, small, strict=True))
    assert small[0].norm(dim=-1).mean().item() == pytest.approx(2 * 8**0.5, rel=1e-3)
    assert small[1].norm(dim=-1).mean().item() == pytest.approx(8**0.5, rel=1e-3)
