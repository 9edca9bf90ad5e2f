"""Reference implementations of the models: plain loops over layers and heads, nothing packed or folded.

They are slow and used to check the packed ones: `ReferenceDecoder` is the published decoder with one tensor per layer, whose
weights `unpack` returns; `in_loops` replaces every packed attention of a model by loops over the same parameters.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stacklm.config.model import Stacked
from stacklm.model.layers import Embedding, Head, Linear, Positions, Rotation, sinusoids
from stacklm.model.stacked import FactoredAttention, Mix, PublishedAttention, QKTransforms, SharedAttention


def attend(q_BTK: Tensor, k_BTK: Tensor, v_BTD: Tensor) -> Tensor:
    """One head with explicit attention weights [B, T, T]: [B, T, D]."""
    scores_BTT = q_BTK @ k_BTK.transpose(1, 2) / math.sqrt(q_BTK.shape[-1])
    later_TT = torch.ones_like(scores_BTT[0], dtype=torch.bool).triu(diagonal=1)
    return scores_BTT.masked_fill(later_TT, -math.inf).softmax(dim=-1) @ v_BTD


class DecoderLayer(nn.Module):
    """One of the N layers: [B, T, C] to [B, T, D]."""

    def __init__(self, width: int, heads: int, features: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = Linear(width, width, bias=True)
        self.key = Linear(width, width, bias=True)
        self.value = Linear(width, width, bias=True)
        self.output = Linear(width, width, bias=True)
        self.reduce = Linear(width, features, bias=True)
        self.norm = nn.LayerNorm(features)
        self.expand = Linear(features, 4 * features, bias=True)
        self.contract = Linear(4 * features, features, bias=True)
        self.dropout = nn.Dropout(dropout)

    def attention(self, x_BTC: Tensor) -> Tensor:
        q_BTC, k_BTC, v_BTC = self.query(x_BTC), self.key(x_BTC), self.value(x_BTC)
        heads_BTK = []
        for h in range(self.heads):
            q_BTK, k_BTK, v_BTK = (part.chunk(self.heads, dim=-1)[h] for part in (q_BTC, k_BTC, v_BTC))
            heads_BTK.append(attend(q_BTK, k_BTK, v_BTK))
        return self.output(torch.cat(heads_BTK, dim=-1))

    def forward(self, x_BTC: Tensor) -> Tensor:
        r_BTD = self.reduce(x_BTC + self.attention(x_BTC))
        return r_BTD + self.dropout(self.contract(F.relu(self.expand(self.norm(r_BTD)))))


class ReferenceStack(nn.Module):
    """N layers one after the other on the same input, concatenated and mixed: [B, T, C] to [B, T, W]."""

    def __init__(self, norm: nn.Module, layers: list[DecoderLayer], mix: Mix) -> None:
        super().__init__()
        self.norm = norm
        self.layers = nn.ModuleList(layers)
        self.mix = mix

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = self.norm(x_BTC)
        return self.mix(torch.cat([layer(x_BTC) for layer in self.layers], dim=-1))


class ReferenceDecoder(nn.Module):
    """Computes the same as `StackedDecoder` with the same parameters, one tensor per layer. `layer` is the class of its layers."""

    def __init__(self, config: Stacked, vocab_size: int, context: int, layer: type[DecoderLayer] = DecoderLayer) -> None:
        super().__init__()
        self.positions = Positions(context)
        self.embedding = Embedding(vocab_size, config.d_model)
        self.embedding_norm = nn.LayerNorm(config.d_model)
        self.stacks = nn.ModuleList()
        for i, stack in enumerate(config.stacks):
            norm = nn.LayerNorm(config.d_model) if i else nn.Identity()
            layers = [layer(config.d_model, config.n_heads, stack.features, config.dropout) for _ in range(stack.layers)]
            self.stacks.append(ReferenceStack(norm, layers, Mix(stack.width, stack.d_ff)))
        self.norm = nn.LayerNorm(config.stacks[-1].width)
        self.head = Head(config.stacks[-1].width, vocab_size, bias=True)

    def features(self, ids_BT: Tensor) -> Tensor:
        x_BTC = self.embedding_norm(self.embedding(ids_BT))
        x_BTC = x_BTC + sinusoids(self.positions(ids_BT), x_BTC.shape[-1]).to(x_BTC.dtype)
        for stack in self.stacks:
            x_BTC = stack(x_BTC)
        return self.norm(x_BTC)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.head(self.features(ids_BT))


def unpack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors of the parameters of a `StackedDecoder` (weights, gradients, moments) to those of a `ReferenceDecoder`.

    `stacks.0.attention.query.weight` [N, C, C] becomes `stacks.0.layers.0.query.weight` [C, C] and so on.
    """
    unpacked = {}
    for name, tensor in tensors.items():
        if found := re.fullmatch(r"(stacks\.\d+)\.(?:attention|layer_ffn)\.(.+)", name):
            unpacked |= {f"{found[1]}.layers.{n}.{found[2]}": layer for n, layer in enumerate(tensor.unbind())}
        else:
            unpacked[name] = tensor
    return unpacked


class InLoops(nn.Module):
    """[B, T, C] to [B, T, N, D], one layer after the other."""

    def __init__(self, packed: nn.Module, layer: Callable[[Any, Tensor, Rotation | None, int], Tensor]) -> None:
        super().__init__()
        self.packed, self.layer = packed, layer

    def forward(self, x_BTC: Tensor, rotation: Rotation | None) -> Tensor:
        return torch.stack([self.layer(self.packed, x_BTC, rotation, n) for n in range(self.packed.layers)], dim=2)


def published_layer(packed: PublishedAttention, x_BTC: Tensor, rotation: Rotation | None, n: int) -> Tensor:
    """Layer n with its three maps after the softmax, [B, T, D]."""
    q_BTC, k_BTC, v_BTC = (x_BTC @ part.weight[n].T + part.bias[n] for part in (packed.query, packed.key, packed.value))
    heads = zip(*(part_BTC.chunk(packed.heads, dim=-1) for part_BTC in (q_BTC, k_BTC, v_BTC)), strict=True)
    a_BTC = torch.cat([attend(*head) for head in heads], dim=-1) @ packed.output.weight[n].T + packed.output.bias[n]
    return (x_BTC + a_BTC) @ packed.reduce.weight[n].T + packed.reduce.bias[n]


def factored_layer(packed: FactoredAttention, x_BTC: Tensor, rotation: Rotation | None, n: int) -> Tensor:
    """Layer n with one map per head after the softmax, [B, T, D]."""
    r_BTD = x_BTC @ packed.reduce.weight[n].T
    maps = (part.weight[n].chunk(packed.heads) for part in (packed.query, packed.key, packed.value))
    for query_KC, key_KC, value_DC in zip(*maps, strict=True):
        q_BTK, k_BTK = transformed(packed.transforms, rotation, x_BTC @ query_KC.T, x_BTC @ key_KC.T)
        r_BTD = r_BTD + attend(q_BTK, k_BTK, x_BTC @ value_DC.T)
    return r_BTD


def shared_layer(packed: SharedAttention, x_BTC: Tensor, rotation: Rotation | None, n: int) -> Tensor:
    """Layer n with its own queries and outputs, [B, T, D]; here K is also the dim of values."""
    r_BTD = x_BTC @ packed.reduce.weight[n].T
    queries, keys, values = (part.chunk(packed.heads) for part in (packed.query.weight[n], packed.key.weight, packed.value.weight))
    outputs = packed.output.weight[n].chunk(packed.heads, dim=1)
    for query_KC, key_KC, value_KC, output_DK in zip(queries, keys, values, outputs, strict=True):
        q_BTK, k_BTK = transformed(packed.transforms, rotation, x_BTC @ query_KC.T, x_BTC @ key_KC.T)
        r_BTD = r_BTD + attend(q_BTK, k_BTK, x_BTC @ value_KC.T) @ output_DK.T
    return r_BTD


def transformed(transforms: QKTransforms, rotation: Rotation | None, q_BTK: Tensor, k_BTK: Tensor) -> tuple[Tensor, Tensor]:
    """One head's queries and keys, normalised and rotated like the packed ones."""
    if transforms.query_norm is not None:
        q_BTK, k_BTK = normalised(q_BTK, transforms.query_norm.weight), normalised(k_BTK, transforms.key_norm.weight)
    if transforms.rope:
        q_BTK, k_BTK = rotated(q_BTK, rotation), rotated(k_BTK, rotation)
    return q_BTK, k_BTK


def normalised(x_BTK: Tensor, gain_K: Tensor) -> Tensor:
    return gain_K * x_BTK / (x_BTK.square().mean(dim=-1, keepdim=True) + torch.finfo(x_BTK.dtype).eps).sqrt()


def rotated(x_BTK: Tensor, rotation: Rotation) -> Tensor:
    """Treat pairs (i, i + K/2) as complex numbers and multiply them by those of the rotation."""
    cos_T1K, sin_T1K = rotation
    turn_TK = torch.complex(cos_T1K, sin_T1K)[:, 0]
    complex_BTK = torch.complex(*x_BTK.chunk(2, dim=-1)) * turn_TK
    return torch.cat([complex_BTK.real, complex_BTK.imag], dim=-1)


LAYERS = {PublishedAttention: published_layer, FactoredAttention: factored_layer, SharedAttention: shared_layer}


def in_loops(module: nn.Module) -> nn.Module:
    """The same module tree with the same parameters, with every packed attention replaced by loops."""
    if type(module) in LAYERS:
        return InLoops(module, LAYERS[type(module)])
    twin = copy.copy(module)
    twin._modules = {name: in_loops(child) for name, child in module._modules.items()}
    return twin
