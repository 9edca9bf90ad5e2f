"""The stacked-parallel decoder as one would write it down: a loop over layers, a loop over heads, nothing folded.

It is slow and exists to check the packed form, whose weights and gradients it reads through `unpack`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stacklm.config.model import Stacked
from stacklm.model.layers import BiasedHead, BiasedLinear, Embedding
from stacklm.model.positions import Positions, sinusoids
from stacklm.model.stacked import Mix


def attend(q_BTK: Tensor, k_BTK: Tensor, v_BTD: Tensor) -> Tensor:
    """One head, its map [B, T, T] written out: [B, T, D]."""
    scores_BTT = q_BTK @ k_BTK.transpose(1, 2) / math.sqrt(q_BTK.shape[-1])
    later_TT = torch.ones_like(scores_BTT[0], dtype=torch.bool).triu(diagonal=1)
    return scores_BTT.masked_fill(later_TT, -math.inf).softmax(dim=-1) @ v_BTD


class DecoderLayer(nn.Module):
    """One of the N layers: [B, T, C] to [B, T, D]."""

    def __init__(self, width: int, heads: int, features: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = BiasedLinear(width, width)
        self.key = BiasedLinear(width, width)
        self.value = BiasedLinear(width, width)
        self.output = BiasedLinear(width, width)
        self.reduce = BiasedLinear(width, features)
        self.norm = nn.LayerNorm(features)
        self.expand = BiasedLinear(features, 4 * features)
        self.contract = BiasedLinear(4 * features, features)
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
    """What `StackedDecoder` computes, with the same parameters, one tensor a layer. `layer` is the kind of its layers."""

    def __init__(self, config: Stacked, vocab_size: int, context: int, layer: type[DecoderLayer] = DecoderLayer) -> None:
        super().__init__()
        self.positions = Positions(context)
        self.embedding = Embedding(vocab_size, config.width)
        self.embedding_norm = nn.LayerNorm(config.width)
        self.stacks = nn.ModuleList()
        for i, stack in enumerate(config.stacks):
            norm = nn.LayerNorm(config.width) if i else nn.Identity()
            layers = [layer(config.width, config.heads, stack.features, config.dropout) for _ in range(stack.layers)]
            self.stacks.append(ReferenceStack(norm, layers, Mix(stack.width, stack.hidden)))
        self.norm = nn.LayerNorm(config.stacks[-1].width)
        self.head = BiasedHead(config.stacks[-1].width, vocab_size)

    def features(self, ids_BT: Tensor) -> Tensor:
        x_BTC = self.embedding_norm(self.embedding(ids_BT))
        x_BTC = x_BTC + sinusoids(self.positions(ids_BT), x_BTC.shape[-1]).to(x_BTC.dtype)
        for stack in self.stacks:
            x_BTC = stack(x_BTC)
        return self.norm(x_BTC)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.head(self.features(ids_BT))


def unpack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors named after the parameters of a `StackedDecoder` (weights, gradients, moments) by the names of a `ReferenceDecoder`.

    `stacks.0.layers.attention.query.weight` [N, C, C] becomes `stacks.0.layers.0.query.weight` [C, C] and so on.
    """
    unpacked = {}
    for name, tensor in tensors.items():
        stack, inside, rest = name.partition(".layers.")
        if inside:
            part = rest.partition(".")[2]
            unpacked |= {f"{stack}.layers.{n}.{part}": layer for n, layer in enumerate(tensor.unbind())}
        else:
            unpacked[name] = tensor
    return unpacked
