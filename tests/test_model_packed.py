import torch
import torch.nn.functional as F
from torch import nn

from stacklm.model.packed import FoldedOutputs, FoldedValues, PackedLayerNorm, PackedLinear


def relative_error(found, wanted):
    return (found - wanted).norm() / wanted.norm()


def test_packed_maps_are_separate_maps():
    maps = PackedLinear(3, 5, 4)
    torch.nn.init.normal_(maps.bias)
    x = torch.randn(2, 6, 3, 5)
    for n in range(3):
        assert torch.allclose(maps(x)[:, :, n], F.linear(x[:, :, n], maps.weight[n], maps.bias[n]), atol=1e-6)
        assert torch.allclose(maps.shared(x[:, :, 0])[:, :, n], F.linear(x[:, :, 0], maps.weight[n], maps.bias[n]), atol=1e-6)


def test_packed_norms_are_separate_norms():
    norms = PackedLayerNorm(3, 4)
    for parameter in norms.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 6, 3, 4)
    for n in range(3):
        assert torch.allclose(norms(x)[:, :, n], F.layer_norm(x[:, :, n], (4,), norms.weight[n], norms.bias[n]), atol=1e-6)


def test_both_ways_of_folding_agree():
    torch.manual_seed(0)
    values, outputs = (fold(3, 16, 2, 4, depth=2).double() for fold in (FoldedValues, FoldedOutputs))
    outputs.load_state_dict(values.state_dict())
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    assert relative_error(values(x), outputs(x)) < 1e-12


def test_a_single_layer_is_dense_attention():
    """N = 1 with D = C is torch's own multi-head attention, a residual and a linear map."""
    width, heads = 16, 2
    torch.manual_seed(0)
    layer = FoldedOutputs(1, width, heads, width, depth=1).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    dense = nn.MultiheadAttention(width, heads, batch_first=True, dtype=torch.float64)
    projections = (layer.query, layer.key, layer.value)
    dense.in_proj_weight.data = torch.cat([part.weight[0] for part in projections])
    dense.in_proj_bias.data = torch.cat([part.bias[0] for part in projections])
    dense.out_proj.weight.data, dense.out_proj.bias.data = layer.output.weight[0], layer.output.bias[0]
    x = torch.randn(2, 9, width, dtype=torch.float64)
    a, _ = dense(x, x, x, attn_mask=nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64), is_causal=True)
    wanted = F.linear(x + a, layer.reduce.weight[0], layer.reduce.bias[0])
    assert relative_error(layer(x)[:, :, 0], wanted) < 1e-12
