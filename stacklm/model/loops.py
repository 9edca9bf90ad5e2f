"""Every kind of attention as plain loops over layers and heads, with the parameters of the packed one that it checks."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stacklm.model.folded import FoldedAttention, Prepare, QueryKeyNorm, SharedAttention
from stacklm.model.packed import FoldedOutputs, FoldedValues, PackedAttention
from stacklm.model.positions import Rotary, rotations
from stacklm.model.reference import attend


class InLoops(nn.Module):
    """[B, T, C] to [B, T, N, D], one layer after the other."""

    def __init__(self, packed: nn.Module, layer: Callable[[nn.Module, Tensor, int], Tensor]) -> None:
        super().__init__()
        self.packed, self.layer = packed, layer

    def forward(self, x_BTC: Tensor) -> Tensor:
        return torch.stack([self.layer(self.packed, x_BTC, n) for n in range(self.packed.layers)], dim=2)


def published_layer(packed: PackedAttention, x_BTC: Tensor, n: int) -> Tensor:
    """Layer n with its three maps behind the softmax, [B, T, D]."""
    q_BTC, k_BTC, v_BTC = (x_BTC @ part.weight[n].T + part.bias[n] for part in (packed.query, packed.key, packed.value))
    heads = zip(*(part_BTC.chunk(packed.heads, dim=-1) for part_BTC in (q_BTC, k_BTC, v_BTC)), strict=True)
    a_BTC = torch.cat([attend(*head) for head in heads], dim=-1) @ packed.output.weight[n].T + packed.output.bias[n]
    return (x_BTC + a_BTC) @ packed.reduce.weight[n].T + packed.reduce.bias[n]


def folded_layer(packed: FoldedAttention, x_BTC: Tensor, n: int) -> Tensor:
    """Layer n with one map a head behind the softmax, [B, T, D]."""
    r_BTD = x_BTC @ packed.reduce.weight[n].T
    maps = (part.weight[n].chunk(packed.heads) for part in (packed.query, packed.key, packed.value))
    for query_KC, key_KC, value_DC in zip(*maps, strict=True):
        q_BTK, k_BTK = prepared(packed.prepare, x_BTC @ query_KC.T, x_BTC @ key_KC.T)
        r_BTD = r_BTD + attend(q_BTK, k_BTK, x_BTC @ value_DC.T)
    return r_BTD


def shared_layer(packed: SharedAttention, x_BTC: Tensor, n: int) -> Tensor:
    """Layer n with its own queries and outputs, [B, T, D]; here K is also the dim of values."""
    r_BTD = x_BTC @ packed.reduce.weight[n].T
    queries, keys, values = (part.chunk(packed.heads) for part in (packed.query.weight[n], packed.key.weight, packed.value.weight))
    outputs = packed.output.weight[n].chunk(packed.heads, dim=1)
    for query_KC, key_KC, value_KC, output_DK in zip(queries, keys, values, outputs, strict=True):
        q_BTK, k_BTK = prepared(packed.prepare, x_BTC @ query_KC.T, x_BTC @ key_KC.T)
        r_BTD = r_BTD + attend(q_BTK, k_BTK, x_BTC @ value_KC.T) @ output_DK.T
    return r_BTD


def prepared(prepare: Prepare, q_BTK: Tensor, k_BTK: Tensor) -> tuple[Tensor, Tensor]:
    """One head's queries and keys, normalised and turned as the packed ones are."""
    for part in prepare:
        match part:
            case QueryKeyNorm():
                q_BTK, k_BTK = (normalised(x, norm.weight) for x, norm in ((q_BTK, part.query), (k_BTK, part.key)))
            case Rotary():
                q_BTK, k_BTK = (turned(x, part) for x in (q_BTK, k_BTK))
    return q_BTK, k_BTK


def normalised(x_BTK: Tensor, gain_K: Tensor) -> Tensor:
    return gain_K * x_BTK / (x_BTK.square().mean(dim=-1, keepdim=True) + torch.finfo(x_BTK.dtype).eps).sqrt()


def turned(x_BTK: Tensor, rotary: Rotary) -> Tensor:
    """Pairs (i, i + K/2) as complex numbers, multiplied by those of the rotation."""
    cos_T1K, sin_T1K = rotations(rotary.positions(x_BTK), x_BTK.shape[-1])
    turn_TK = torch.complex(cos_T1K, sin_T1K)[:, 0]
    complex_BTK = torch.complex(*x_BTK.chunk(2, dim=-1)) * turn_TK
    return torch.cat([complex_BTK.real, complex_BTK.imag], dim=-1)


LAYERS = {
    FoldedValues: published_layer,
    FoldedOutputs: published_layer,
    FoldedAttention: folded_layer,
    SharedAttention: shared_layer,
}


def in_loops(module: nn.Module) -> nn.Module:
    """The same tree of modules with the same parameters, but every packed attention is one in loops."""
    if type(module) in LAYERS:
        return InLoops(module, LAYERS[type(module)])
    twin = copy.copy(module)
    twin._modules = {name: in_loops(child) for name, child in module._modules.items()}
    return twin
