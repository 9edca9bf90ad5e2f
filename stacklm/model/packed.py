"""N parallel decoder layers that read the same input, computed together: no loop over layers or heads.

One layer reads x [B, T, C] and emits D features:

    a = causal multi-head attention(x)          H heads of dim K, biases, output projection C -> C
    r = reduce(x + a)                           C -> D
    y = r + contract(relu(expand(norm(r))))     D -> 4D -> D

The parameters are those of N separate layers, stacked along a first dimension. What is computed from them is folded:
attention is linear in its values, so the maps behind it are multiplied together before they meet the tokens,

    reduce(x + a) = x W_r + sum_h A_h (x W_v,h) W_o,h W_r + biases,

with the same outputs and gradients and fewer operations. How far to fold depends on D and K: two classes below.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stacklm.model.attention import causal_attention, project, sum_heads
from stacklm.model.layers import drawn


class PackedLinear(nn.Module):
    """N linear maps side by side: `weight` [N, E, C], `bias` [N, E]. By default they keep the variance of their input."""

    def __init__(self, layers: int, inputs: int, outputs: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = drawn(layers, outputs, inputs, std=scale * inputs**-0.5)
        self.bias = nn.Parameter(torch.zeros(layers, outputs))

    def forward(self, x_BTNC: Tensor) -> Tensor:
        """Each map on its own input: [B, T, N, C] to [B, T, N, E]."""
        return torch.einsum("btnc,nec->btne", x_BTNC, self.weight) + self.bias

    def shared(self, x_BTC: Tensor) -> Tensor:
        """All maps on the same input, as one product: [B, T, C] to [B, T, N, E]."""
        return project(x_BTC, self.weight.flatten(0, 1), self.bias.flatten()).unflatten(-1, self.bias.shape)

    def flops_per_token(self, attended: float) -> float:
        return 2 * self.weight.numel()


class PackedLayerNorm(nn.Module):
    """N LayerNorms over D features each: `weight` and `bias` [N, D]."""

    def __init__(self, layers: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(layers, features))
        self.bias = nn.Parameter(torch.zeros(layers, features))

    def forward(self, x_BTND: Tensor) -> Tensor:
        return F.layer_norm(x_BTND, x_BTND.shape[-1:]) * self.weight + self.bias


class PackedAttention(nn.Module):
    """The attentions of N layers with their residual and reduction, r [B, T, N, D] of x [B, T, C].

    Holds the parameters; a subclass says how r is computed. `depth` is the number of stacks in series: it, and not the
    number of layers, is what residual branches add up over (as 1 / sqrt(2 * depth), after GPT-2).
    """

    def __init__(self, layers: int, width: int, heads: int, features: int, depth: int) -> None:
        super().__init__()
        self.layers, self.width, self.heads, self.features = layers, width, heads, features
        self.query = PackedLinear(layers, width, width)
        self.key = PackedLinear(layers, width, width)
        self.value = PackedLinear(layers, width, width)
        self.output = PackedLinear(layers, width, width, scale=(2 * depth) ** -0.5)
        self.reduce = PackedLinear(layers, width, features)

    def queries_and_keys(self, x_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, N*H, K] both."""
        return tuple(part.shared(x_BTC).unflatten(3, (self.heads, -1)).flatten(2, 3) for part in (self.query, self.key))

    def fold_outputs(self) -> Tensor:
        """`W_o,h W_r` of every layer and head, [N, H, D, K]."""
        output_NCHK = self.output.weight.unflatten(2, (self.heads, -1))
        return torch.einsum("ndc,nchk->nhdk", self.reduce.weight, output_NCHK)

    def fold_biases(self, down_NHDK: Tensor) -> Tensor:
        """What the biases behind the softmax add to r, [N, D]. Rows of attention sum to 1, so a value's bias passes as it is."""
        value_NHK = self.value.bias.unflatten(1, (self.heads, -1))
        output_ND = torch.einsum("nc,ndc->nd", self.output.bias, self.reduce.weight)
        return torch.einsum("nhk,nhdk->nd", value_NHK, down_NHDK) + output_ND + self.reduce.bias

    def skip(self, x_BTC: Tensor, bias_ND: Tensor) -> Tensor:
        """The residual's way through all reductions, one C x W map: [B, T, N, D]."""
        return F.linear(x_BTC, self.reduce.weight.flatten(0, 1), bias_ND.flatten()).unflatten(-1, bias_ND.shape)


class FoldedValues(PackedAttention):
    """For D <= K: the whole way behind the softmax is folded into the values, `M_h = W_v,h W_o,h W_r` of C x D."""

    def forward(self, x_BTC: Tensor) -> Tensor:
        down_NHDK = self.fold_outputs()
        value_NHKC = self.value.weight.unflatten(1, (self.heads, -1))
        value_NHDC = down_NHDK @ value_NHKC
        v_BTHD = project(x_BTC, value_NHDC.flatten(0, 2)).unflatten(-1, (-1, self.features))
        a_BTHD = causal_attention(*self.queries_and_keys(x_BTC), v_BTHD)
        return sum_heads(a_BTHD, self.heads) + self.skip(x_BTC, self.fold_biases(down_NHDK))

    def flops_per_token(self, attended: float) -> float:
        """Without the fold, which is made once a step and not once a token."""
        qk, values, skip = 2 * self.width, self.heads * self.features, self.features
        return self.layers * (2 * self.width * (qk + values + skip) + 2 * (self.width + values) * attended)


class FoldedOutputs(PackedAttention):
    """For D > K: values keep their dim K, and only what follows them is folded, `W_o,h W_r` of K x D."""

    def forward(self, x_BTC: Tensor) -> Tensor:
        down_NHDK = self.fold_outputs()
        v_BTHK = project(x_BTC, self.value.weight.flatten(0, 1)).unflatten(-1, (-1, self.width // self.heads))
        a_BTHK = causal_attention(*self.queries_and_keys(x_BTC), v_BTHK)
        a_BTNHK = a_BTHK.unflatten(2, (-1, self.heads))
        a_BTND = torch.einsum("btnhk,nhdk->btnd", a_BTNHK, down_NHDK)
        return a_BTND + self.skip(x_BTC, self.fold_biases(down_NHDK))

    def flops_per_token(self, attended: float) -> float:
        """Without the fold, which is made once a step and not once a token."""
        qkv, down, skip = 3 * self.width, self.features, self.features
        return self.layers * (2 * self.width * (qkv + down + skip) + 2 * (self.width + self.width) * attended)


class PackedFeedForward(nn.Module):
    """The N small feed-forwards: [B, T, N, D] through 4D hidden units each. Dropout falls on their output."""

    def __init__(self, layers: int, features: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.norm = PackedLayerNorm(layers, features)
        self.expand = PackedLinear(layers, features, 4 * features)
        self.contract = PackedLinear(layers, 4 * features, features, scale=(2 * depth) ** -0.5)
        self.dropout = nn.Dropout(dropout)

    def forward(self, r_BTND: Tensor) -> Tensor:
        return self.dropout(self.contract(F.relu(self.expand(self.norm(r_BTND)))))


class ParallelLayers(nn.Module):
    """All layers of one stack, [B, T, C] to [B, T, W]: their attentions, then their small feed-forwards."""

    def __init__(self, attention: PackedAttention, feed_forward: PackedFeedForward) -> None:
        super().__init__()
        self.attention = attention
        self.feed_forward = feed_forward

    def forward(self, x_BTC: Tensor) -> Tensor:
        r_BTND = self.attention(x_BTC)
        return (r_BTND + self.feed_forward(r_BTND)).flatten(2)
