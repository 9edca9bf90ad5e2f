"""The stacked-parallel decoder: stacks in series, each of N parallel decoder layers that read the same input.

    ids ─ Embedding ─ LayerNorm ─ + sinusoids ─ stack ─ … ─ stack ─ LayerNorm ─ head ─ logits

    one stack as published            ┌─ layer 1 ─┐
                         x ─ LayerNorm┼─ layer 2 ─┼─ concat ─ mix ─►       no LayerNorm before the first stack,
                                      └─ layer N ─┘                        no residual around a stack or its mix

    one layer as published            a = causal multi-head attention(x)   n_heads heads, biases, output projection C -> C
                                      r = reduce(x + a)                    C -> D
                                      y = r + contract(relu(expand(LayerNorm(r))))   D -> 4D -> D

The published parts come first; the alternatives to its attention are at the end. Options that the published form does not have
are None or False in it. The weights of the N layers of a stack are packed along a first dimension, so that there is no loop over
layers or heads. `depth` is the number of stacks: residual branches are scaled by 1 / sqrt(2 * depth) at initialisation, as in
GPT-2, independent of N.

Dimension letters: B batch, T time, C width of the residual stream, N parallel layers of a stack, D features that a layer emits,
W = N * D, H heads of all N layers of a stack together, K dim of a head's queries and keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stacklm.config.model import FactoredAttention as Factored
from stacklm.config.model import Stack, Stacked
from stacklm.model.kernels import causal_attention, checkpointed, project, rotate, sum_heads
from stacklm.model.layers import (
    FEED_FORWARDS,
    DenseSkip,
    DynamicSkip,
    Embedding,
    Head,
    LanguageModel,
    Linear,
    PackedLayerNorm,
    PackedLinear,
    Positions,
    RMSNorm,
    Rotation,
    ShortConv,
    rotations,
    sinusoids,
)


class PublishedAttention(nn.Module):
    """The attentions of N layers with their residual and reduction: x [B, T, C] to r [B, T, N, D].

    `unfolded` is the published form; `forward` computes the same with fewer FLOPs. Attention is linear in its values, so the maps
    after the softmax are multiplied together, once per step, before they are applied to tokens: for the heads h of a layer

        reduce(x + a) = x W_r + sum_h A_h (x W_v,h W_o,h W_r) + biases        A_h = softmax(q_h k_h^T / sqrt(K))

    For D <= K the value map is W_v,h W_o,h W_r, of C x D. For D > K it stays W_v,h, and W_o,h W_r, of K x D, follows the sum.

    The key bias is part of the published form and counted, but not trained: it adds the same to all scores of a query, which the
    softmax removes, so its gradient is rounding noise that an optimizer which normalises gradients would follow.
    """

    def __init__(self, layers: int, width: int, heads: int, features: int, depth: int) -> None:
        super().__init__()
        self.layers, self.width, self.heads, self.features = layers, width, heads, features
        self.query = PackedLinear(layers, width, width, bias=True)
        self.key = PackedLinear(layers, width, width, bias=True)
        self.key.get_parameter("bias").requires_grad_(False)
        self.value = PackedLinear(layers, width, width, bias=True)
        self.output = PackedLinear(layers, width, width, bias=True, std=(2 * depth) ** -0.5 * width**-0.5)
        self.reduce = PackedLinear(layers, width, features, bias=True)

    @property
    def folds_values(self) -> bool:
        return self.features <= self.width // self.heads

    def unfolded(self, x_BTC: Tensor) -> Tensor:
        """The published form, as a reference for readers and tests."""
        q_BTHK, k_BTHK, v_BTHK = (_split_heads(part.shared(x_BTC), self.heads) for part in (self.query, self.key, self.value))
        a_BTNC = causal_attention(q_BTHK, k_BTHK, v_BTHK).unflatten(2, (self.layers, self.heads)).flatten(3)
        return self.reduce(x_BTC[:, :, None] + self.output(a_BTNC))

    def forward(self, x_BTC: Tensor, rotation: Rotation | None = None) -> Tensor:
        folded = self.fold()
        return self.combine(causal_attention(*self.project(x_BTC, rotation, folded)), x_BTC, folded)

    def fold(self) -> Folded:
        """The products of weights, computed once per step instead of per token."""
        output = self.output.weight.unflatten(2, (self.heads, -1))
        value = self.value.weight.unflatten(1, (self.heads, -1))
        value_bias, output_bias, reduce_bias = (part.get_parameter("bias") for part in (self.value, self.output, self.reduce))
        down = torch.einsum("ndc,nchk->nhdk", self.reduce.weight, output)
        values_ND = torch.einsum("nhk,nhdk->nd", value_bias.unflatten(1, (self.heads, -1)), down)  # rows of A_h sum to 1
        bias_ND = values_ND + torch.einsum("nc,ndc->nd", output_bias, self.reduce.weight) + reduce_bias
        if self.folds_values:
            return Folded((down @ value).flatten(0, 2), None, bias_ND)
        return Folded(value.flatten(0, 2), down, bias_ND)

    def project(self, x_BTC: Tensor, rotation: Rotation | None, folded: Folded) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys [B, T, H, K], values [B, T, H, D], or K where D > K."""
        q_BTHK, k_BTHK = (_split_heads(part.shared(x_BTC), self.heads) for part in (self.query, self.key))
        return q_BTHK, k_BTHK, project(x_BTC, folded.value).unflatten(-1, (self.layers * self.heads, -1))

    def combine(self, a_BTHD: Tensor, x_BTC: Tensor, folded: Folded) -> Tensor:
        """r [B, T, N, D] from the heads' outputs and the residual, whose reductions are one C x W map."""
        if folded.down is None:
            a_BTND = sum_heads(a_BTHD, self.heads)
        else:  # values are K wide, not D
            a_BTND = torch.einsum("btnhk,nhdk->btnd", a_BTHD.unflatten(2, (self.layers, self.heads)), folded.down)
        residual_BTW = F.linear(x_BTC, self.reduce.weight.flatten(0, 1), folded.bias_ND.flatten())
        return a_BTND + residual_BTW.unflatten(-1, folded.bias_ND.shape)

    def flops_per_token(self, attended: float) -> float:
        """FLOPs per token, without the folding itself, which happens once per step."""
        if self.folds_values:
            values, down = self.heads * self.features, 0
        else:
            values, down = self.width, self.features
        maps = 2 * self.width + values + down + self.features
        return self.layers * (2 * self.width * maps + 2 * (self.width + values) * attended)


class Folded(NamedTuple):
    """The weight products that `PublishedAttention` computes once per step.

    `value` maps x to the values of all heads, [H * D, C] or [H * K, C]; `down`, if any, maps a head's output to D features,
    [N, H / N, D, K]; all biases combine into one per feature.
    """

    value: Tensor
    down: Tensor | None
    bias_ND: Tensor


class PackedFeedForward(nn.Module):
    """The N small feed-forwards of a stack: [B, T, N, D] through 4D hidden units each. Dropout acts on their output."""

    def __init__(self, layers: int, features: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.norm = PackedLayerNorm(layers, features)
        self.expand = PackedLinear(layers, features, 4 * features, bias=True)
        self.contract = PackedLinear(layers, 4 * features, features, bias=True, std=(2 * depth) ** -0.5 * (4 * features) ** -0.5)
        self.dropout = nn.Dropout(dropout)

    def forward(self, r_BTND: Tensor) -> Tensor:
        return self.dropout(self.contract(F.relu(self.expand(self.norm(r_BTND)))))


class Mix(nn.Module):
    """Mixes the features of the parallel layers: W -> hidden -> W. By default the initialisation preserves the variance."""

    def __init__(self, width: int, hidden: int, std: float | None = None) -> None:
        super().__init__()
        self.expand = Linear(width, hidden, bias=True)
        self.contract = Linear(hidden, width, bias=True, std=(2 / hidden) ** 0.5 if std is None else std)

    def forward(self, x_BTW: Tensor) -> Tensor:
        return self.contract(F.relu(self.expand(x_BTW)))


class ParallelStack(nn.Module):
    """One stack, [B, T, C] to [B, T, W].

    In the published form each layer has a small feed-forward (`layer_ffn`) and the mix has two maps. Otherwise the mix is one map,
    followed by one feed-forward with a residual (`ffn`). With `residual` the stack's input is added to its output, initially zero.
    """

    def __init__(self, config: Stacked, stack: Stack, depth: int, first: bool) -> None:
        super().__init__()
        published = config.ffn == "per_layer"
        self.residual = config.residual
        std = 0 if self.residual else None
        self.norm = None if first else nn.LayerNorm(config.d_model)
        self.conv = ShortConv(config.d_model, config.conv_size - 1) if config.conv_size > 1 else None
        self.attention = attention_of(config, stack, depth)
        self.layer_ffn = PackedFeedForward(stack.layers, stack.features, depth, config.dropout) if published else None
        self.mix = Mix(stack.width, stack.d_ff, std) if published else Linear(stack.width, stack.width, bias=True, std=std)
        self.ffn_norm = None if published else nn.LayerNorm(stack.width)
        self.ffn = None if published else FEED_FORWARDS[config.ffn](stack.width, stack.d_ff)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTC: Tensor, rotation: Rotation | None = None) -> Tensor:
        y_BTC = x_BTC if self.norm is None else self.norm(x_BTC)
        if self.conv is not None:
            y_BTC = self.conv(y_BTC)
        r_BTND = self.attention(y_BTC, rotation)
        if self.layer_ffn is not None:
            r_BTND = r_BTND + self.layer_ffn(r_BTND)
        y_BTW = self.mix(r_BTND.flatten(2))
        if self.residual:
            y_BTW = F.pad(x_BTC, (0, y_BTW.shape[-1] - x_BTC.shape[-1])) + y_BTW  # zero-padded to a wider output
        if self.ffn is not None and self.ffn_norm is not None:
            y_BTW = y_BTW + self.dropout(self.ffn(self.ffn_norm(y_BTW)))
        return y_BTW


class StackedDecoder(LanguageModel):
    """ids [B, T] to logits [B, T, vocab_size], for T up to `context`."""

    def __init__(self, config: Stacked, vocab_size: int, context: int) -> None:
        super().__init__()
        depth, last = config.depth(context), config.stacks[-1].width
        self.rotary_dim = config.qk_head_dim if config.rope else None
        self.positions = Positions(context)
        self.embedding = Embedding(vocab_size, config.d_model)
        self.embedding_norm = nn.LayerNorm(config.d_model)
        self.skips = skips_of(config, depth, last)
        self.stacks = nn.ModuleList(
            ParallelStack(config, stack, depth, first=s == 0) for s, stack in enumerate(config.stacks_for(context))
        )
        self.norm = nn.LayerNorm(last)
        tied = config.tie_embeddings
        self.out_proj = Linear(last, config.d_model) if tied and last != config.d_model else None
        self.head = Head(config.d_model if tied else last, vocab_size, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def features(self, ids_BT: Tensor) -> Tensor:
        """The input of the head, [B, T, W] of the last stack or [B, T, C]. Raises `ValueError` for a sequence above the context."""
        positions_T = self.positions(ids_BT)
        x_BTC = self.embedding_norm(self.embedding(ids_BT))
        rotation = None
        if self.rotary_dim is None:
            x_BTC = x_BTC + sinusoids(positions_T, x_BTC.shape[-1]).to(x_BTC.dtype)
        else:
            rotation = rotations(positions_T, self.rotary_dim)
        outputs = [x_BTC]
        for s, stack in enumerate(self.stacks):
            x_BTC = outputs[-1] if self.skips is None or s == 0 else self.skips[s - 1](outputs)
            outputs.append(checkpointed(stack, x_BTC, rotation) if self.activation_checkpointing else stack(x_BTC, rotation))
        x_BTW = self.norm(outputs[-1] if self.skips is None or len(self.skips) < len(self.stacks) else self.skips[-1](outputs))
        return x_BTW if self.out_proj is None else self.out_proj(x_BTW)


def skips_of(config: Stacked, depth: int, last: int) -> nn.ModuleList | None:
    """Skip connections, one per stack except the first; if dynamic, one more for the head, which reads `last` features."""
    if config.skip_connections == "none":
        return None
    if config.skip_connections == "dynamic":
        return nn.ModuleList(DynamicSkip(s, config.d_model if s < depth else last) for s in range(1, depth + 1))
    return nn.ModuleList(DenseSkip(1 if config.skip_connections == "input" else s, config.d_model) for s in range(1, depth))


def attention_of(config: Stacked, stack: Stack, depth: int) -> PublishedAttention | FactoredAttention | SharedAttention:
    """The attentions of one stack, x [B, T, C] to r [B, T, N, D]."""
    shape = (stack.layers, config.d_model, config.n_heads, stack.features, depth)
    if not isinstance(config.attention, Factored):
        return PublishedAttention(*shape)
    kind = {"none": FactoredAttention, "stack": SharedAttention}[config.attention.kv_sharing]
    return kind(*shape, config.qk_head_dim, QKTransforms(config.qk_head_dim, config.attention.qk_norm, config.rope))


class QKTransforms(nn.Module):
    """Transforms of queries and keys before attention: optional normalisation and rotary positions."""

    def __init__(self, key_dim: int, qk_norm: bool = False, rope: bool = False) -> None:
        super().__init__()
        self.rope = rope
        self.query_norm = RMSNorm(key_dim) if qk_norm else None  # one gain for all heads (Henry et al. 2020, arXiv:2010.04245)
        self.key_norm = RMSNorm(key_dim) if qk_norm else None

    def forward(self, q_BTHK: Tensor, k_BTHK: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        if self.query_norm is not None and self.key_norm is not None:
            q_BTHK, k_BTHK = self.query_norm(q_BTHK), self.key_norm(k_BTHK)
        if self.rope and rotation is not None:
            q_BTHK, k_BTHK = rotate(q_BTHK, rotation), rotate(k_BTHK, rotation)
        return q_BTHK, k_BTHK


class FactoredAttention(nn.Module):
    """x [B, T, C] to r [B, T, N, D], where each head maps x to D features by one matrix M_h instead of W_v,h W_o,h W_r.

    For D <= K it can express all that the published form can, with fewer parameters and different gradients; there are no biases.

        r = x W_r + sum_h A_h (x M_h)
    """

    def __init__(
        self, layers: int, width: int, heads: int, features: int, depth: int, key_dim: int, transforms: QKTransforms
    ) -> None:
        super().__init__()
        self.layers, self.heads = layers, heads
        self.query = PackedLinear(layers, width, heads * key_dim)
        self.key = PackedLinear(layers, width, heads * key_dim)
        self.value = PackedLinear(layers, width, heads * features, std=(2 * depth * heads * width) ** -0.5)
        self.reduce = PackedLinear(layers, width, features)
        self.transforms = transforms

    def forward(self, x_BTC: Tensor, rotation: Rotation | None = None) -> Tensor:
        return self.combine(causal_attention(*self.project(x_BTC, rotation)), x_BTC)

    def project(self, x_BTC: Tensor, rotation: Rotation | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys [B, T, H, K], values [B, T, H, D]."""
        q_BTHK, k_BTHK, v_BTHD = (_split_heads(part.shared(x_BTC), self.heads) for part in (self.query, self.key, self.value))
        return *self.transforms(q_BTHK, k_BTHK, rotation), v_BTHD

    def combine(self, a_BTHD: Tensor, x_BTC: Tensor) -> Tensor:
        """r [B, T, N, D] from the heads' outputs and the residual."""
        return sum_heads(a_BTHD, self.heads) + self.reduce.shared(x_BTC)

    def flops_per_token(self, attended: float) -> float:
        parts = (self.query, self.key, self.value, self.reduce)
        keys, values = (part.weight.shape[:2].numel() for part in (self.key, self.value))
        return sum(part.flops_per_token(attended) for part in parts) + 2 * (keys + values) * attended


class SharedAttention(nn.Module):
    """Like `FactoredAttention`, but head h of every layer reads the same keys and values, shared by the stack.

    After multi-query attention (Shazeer 2019, arXiv:1911.02150), with layers in place of heads. Each layer maps its heads' outputs
    to its D features by its own matrix. The KV cache is N times smaller than with keys and values per layer.
    """

    def __init__(
        self, layers: int, width: int, heads: int, features: int, depth: int, key_dim: int, transforms: QKTransforms
    ) -> None:
        super().__init__()
        self.layers, self.heads = layers, heads
        self.query = PackedLinear(layers, width, heads * key_dim)
        self.key = Linear(width, heads * key_dim)
        self.value = Linear(width, width)
        self.output = PackedLinear(layers, width, features, std=(2 * depth * width) ** -0.5)
        self.reduce = PackedLinear(layers, width, features)
        self.transforms = transforms

    def forward(self, x_BTC: Tensor, rotation: Rotation | None = None) -> Tensor:
        q_BTHK, *shared = self.project(x_BTC, rotation)
        k_BTHK, v_BTHK = (part.repeat(1, 1, self.layers, 1) for part in shared)
        return self.combine(causal_attention(q_BTHK, k_BTHK, v_BTHK), x_BTC)

    def project(self, x_BTC: Tensor, rotation: Rotation | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, K], and the keys and values of one layer's heads, [B, T, H / N, ...]."""
        q_BTHK = _split_heads(self.query.shared(x_BTC), self.heads)
        key, value = (part(x_BTC).unflatten(2, (self.heads, -1)) for part in (self.key, self.value))
        return *self.transforms(q_BTHK, key, rotation), value

    def combine(self, a: Tensor, x_BTC: Tensor) -> Tensor:
        """r [B, T, N, D] from the heads' outputs, C * N / H numbers each, and the residual."""
        return self.output(a.unflatten(2, (self.layers, self.heads)).flatten(3)) + self.reduce.shared(x_BTC)

    def flops_per_token(self, attended: float) -> float:
        parts = (self.query, self.key, self.value, self.output, self.reduce)
        keys, values = (self.layers * len(part.weight) for part in (self.key, self.value))
        return sum(part.flops_per_token(attended) for part in parts) + 2 * (keys + values) * attended


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, N, heads * K] to [B, T, H, K]."""
    return x.unflatten(3, (heads, -1)).flatten(2, 3)
