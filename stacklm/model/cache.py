"""Decoding that remembers, so that a token is read once.

A decoder is the model's own tree of modules with the same parameters. Only the leaves that look across time are others:
they keep what they need of the tokens so far. Two things can be kept:

    KEYS_AND_VALUES   of every head: works for every model
    INPUTS            x_s alone, C numbers a stack. Where keys are neither turned nor normed they are a linear map of it, as
                      values are, so the maps move onto the query and behind the sum: (x W_q) . (x_u W_k) = (x W_q W_k^T) . x_u
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from stacklm.model.attention import causal_attention
from stacklm.model.dense import Attention
from stacklm.model.folded import FoldedAttention, PackedMap, Prepare, SharedAttention
from stacklm.model.packed import FoldedOutputs, FoldedValues, PackedAttention
from stacklm.model.positions import Positions
from stacklm.model.wiring import ShortConvolution


class Cache:
    """How many tokens were read, and what is kept of them; U is the number of all tokens so far."""

    def __init__(self, context: int) -> None:
        self.context, self.tokens = context, 0
        self._pasts: list[Past] = []

    def past(self) -> Past:
        """Something more to keep."""
        self._pasts.append(Past(self))
        return self._pasts[-1]

    @property
    def bytes_per_token(self) -> int:
        """Of one sequence; 0 before the first token."""
        return sum(past.bytes_per_token for past in self._pasts)


class Past:
    """One tensor of the tokens so far, time in the last dimension but one. It takes room for the whole context at once."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._room: Tensor | None = None

    def extend(self, new: Tensor) -> Tensor:
        """Keep those of the newest tokens, [..., T, K]; returns all so far, [..., U, K]."""
        stop = self._cache.tokens
        start = stop - new.shape[-2]
        if start == 0:
            self._room = new.new_empty(*new.shape[:-2], self._cache.context, new.shape[-1])
        self._room[..., start:stop, :] = new
        return self._room[..., :stop, :]

    @property
    def bytes_per_token(self) -> int:
        return 0 if self._room is None else self._room[:1, ..., 0, :].nbytes


class CountingPositions(nn.Module):
    """Positions that go on from those of the tokens before."""

    def __init__(self, positions: Positions, cache: Cache) -> None:
        super().__init__()
        self.cache = cache

    def forward(self, ids_BT: Tensor) -> Tensor:
        stop = self.cache.tokens
        return torch.arange(stop - ids_BT.shape[1], stop, dtype=torch.float32, device=ids_BT.device)


class DenseKeysAndValues(nn.Module):
    """Keys, turned to their positions, and values: 2*C numbers a token and layer."""

    def __init__(self, attention: Attention, cache: Cache) -> None:
        super().__init__()
        self.attention = attention
        self.keys, self.values = cache.past(), cache.past()

    def forward(self, x_BTC: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        q_BHTK, k_BHTK, v_BHTK = (part.transpose(1, 2) for part in self.attention.project(x_BTC, rotation))
        a_BHTK = attend(q_BHTK, self.keys.extend(k_BHTK), self.values.extend(v_BHTK))
        return self.attention.output(a_BHTK.transpose(1, 2).flatten(2))


class FoldedOnce(nn.Module):
    """Published attention with the parts of a folded one: what follows the softmax is multiplied once, not for each token."""

    def __init__(self, attention: PackedAttention) -> None:
        super().__init__()
        self.attention = attention
        self.heads, self.query, self.key, self.prepare = attention.heads, attention.query, attention.key, Prepare()
        with torch.device("meta"):  # nothing is drawn
            self.value = PackedMap(attention.layers, attention.width, attention.heads * attention.features)
        with torch.no_grad():
            down_NHDK = attention.fold_outputs()
            value_NHDC = down_NHDK @ attention.value.weight.unflatten(1, (attention.heads, -1))
            self.value.weight = nn.Parameter(value_NHDC.flatten(1, 2))
            self.bias_ND = attention.fold_biases(down_NHDK)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.attention(x_BTC)

    def project(self, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys [B, T, G, K], values [B, T, G, D]."""
        v_BTGD = self.value.shared(x_BTC).unflatten(3, (self.heads, -1)).flatten(2, 3)
        return *self.attention.queries_and_keys(x_BTC), v_BTGD

    def combine(self, a_BTGD: Tensor, x_BTC: Tensor) -> Tensor:
        """r [B, T, N, D] of what all heads saw and of the residual."""
        return a_BTGD.unflatten(2, (-1, self.heads)).sum(3) + self.attention.skip(x_BTC, self.bias_ND)


Folded = FoldedOnce | FoldedAttention


class KeysAndValues(nn.Module):
    """Keys, as prepared, and values: N*H*(K + D) numbers a token and stack, or H*K + C where its layers share them."""

    def __init__(self, attention: Folded | SharedAttention, cache: Cache) -> None:
        super().__init__()
        self.attention = remembering(attention, {Positions: CountingPositions}, cache)
        self.keys, self.values = cache.past(), cache.past()

    def forward(self, x_BTC: Tensor) -> Tensor:
        q_BGTK, k_BHTK, v_BHTD = (part.transpose(1, 2) for part in self.attention.project(x_BTC))
        a_BGTD = attend(q_BGTK, self.keys.extend(k_BHTK), self.values.extend(v_BHTD))
        return self.attention.combine(a_BGTD.transpose(1, 2), x_BTC)


class Inputs(nn.Module):
    """The input of a stack alone, C numbers a token: all G heads attend to it as to the keys and values of a single one.

    Raises `ValueError` where keys are prepared, by rotations or norms, and so no linear map of it.
    """

    def __init__(self, attention: Folded, cache: Cache) -> None:
        super().__init__()
        if len(attention.prepare):
            refuse(attention, cache)
        self.attention = attention
        self.key_GKC, self.value_GDC = (
            part.weight.detach().unflatten(1, (attention.heads, -1)).flatten(0, 1) for part in (attention.key, attention.value)
        )
        self.inputs = cache.past()

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BUC = self.inputs.extend(x_BTC)
        if x_BUC.shape == x_BTC.shape:  # nothing came before: the keys and values of all are used here and now
            return self.attention(x_BTC)
        q_BTGK = self.attention.query.shared(x_BTC).unflatten(3, (self.attention.heads, -1)).flatten(2, 3)
        q_BGTC = torch.einsum("btgk,gkc->bgtc", q_BTGK, self.key_GKC) * q_BTGK.shape[-1] ** -0.5
        x_B1UC = x_BUC[:, None]
        a_BGTC = look_back(q_BGTC, x_B1UC, x_B1UC)
        return self.attention.combine(torch.einsum("bgtc,gdc->btgd", a_BGTC, self.value_GDC), x_BTC)


class RememberedTokens(nn.Module):
    """The inputs that the next token's convolution reaches back to: a few, however many tokens there were."""

    def __init__(self, convolution: ShortConvolution, cache: Cache) -> None:
        super().__init__()
        self.convolution, self.cache = convolution, cache

    def forward(self, x_BTC: Tensor) -> Tensor:
        reach = self.convolution.reach
        if self.cache.tokens == x_BTC.shape[1]:
            self.before_BPC = x_BTC.new_zeros(len(x_BTC), reach, x_BTC.shape[2])
        x_BPC = torch.cat([self.before_BPC, x_BTC], dim=1)
        self.before_BPC = x_BPC[:, -reach:]
        return self.convolution.slide(x_BPC)


def refuse(attention: nn.Module, cache: Cache) -> nn.Module:
    kind = type(attention).__name__
    raise ValueError(f"the inputs of {kind} are not enough to decode: its keys are prepared, or shared; keep keys and values")


Leaves = Mapping[type[nn.Module], Callable[[nn.Module, Cache], nn.Module]]

KEYS_AND_VALUES: Leaves = {
    Positions: CountingPositions,
    ShortConvolution: RememberedTokens,
    Attention: DenseKeysAndValues,
    FoldedValues: lambda attention, cache: KeysAndValues(FoldedOnce(attention), cache),
    FoldedOutputs: lambda attention, cache: KeysAndValues(FoldedOnce(attention), cache),
    FoldedAttention: KeysAndValues,
    SharedAttention: KeysAndValues,
}
INPUTS: Leaves = {
    Positions: CountingPositions,
    ShortConvolution: RememberedTokens,
    Attention: refuse,
    FoldedValues: lambda attention, cache: Inputs(FoldedOnce(attention), cache),
    FoldedOutputs: lambda attention, cache: Inputs(FoldedOnce(attention), cache),
    FoldedAttention: Inputs,
    SharedAttention: refuse,
}


class Decoder:
    """A model that reads the tokens of a batch of windows piece by piece, each token once."""

    def __init__(self, model: nn.Module, context: int, leaves: Leaves = KEYS_AND_VALUES) -> None:
        """`leaves` says what is kept. Raises `ValueError` for a model in training mode, or one of which that is not enough."""
        if model.training:
            raise ValueError("the model is in training mode, where dropout changes its features; call its `eval` first")
        self.cache = Cache(context)
        self.head = model.head
        self._model = remembering(model, leaves, self.cache)

    def forget(self) -> None:
        """Begin anew, with windows of any number."""
        self.cache.tokens = 0

    @torch.no_grad()
    def features(self, ids_BT: Tensor) -> Tensor:
        """The features of the next tokens, [B, T, W], as those of the model for all tokens so far.

        Raises `ValueError` where that are more than the context.
        """
        tokens = self.cache.tokens + ids_BT.shape[1]
        if tokens > self.cache.context:
            raise ValueError(f"{tokens} tokens are more than the model's context of {self.cache.context}; forget the earliest")
        self.cache.tokens = tokens
        return self._model.features(ids_BT)


def remembering(module: nn.Module, leaves: Leaves, cache: Cache) -> nn.Module:
    """The same tree of modules with the same parameters, but for the leaves."""
    if type(module) in leaves:
        return leaves[type(module)](module, cache)
    twin = copy.copy(module)
    twin._modules = {name: remembering(child, leaves, cache) for name, child in module._modules.items()}
    return twin


def attend(q_BGTK: Tensor, k_BHUK: Tensor, v_BHUD: Tensor) -> Tensor:
    """Attention of the newest T of U positions to those up to each one's own, [B, G, T, D]; query g reads head g mod H."""
    groups, new = q_BGTK.shape[1] // k_BHUK.shape[1], q_BGTK.shape[2]
    if new < k_BHUK.shape[2]:
        return look_back(q_BGTK * q_BGTK.shape[-1] ** -0.5, k_BHUK, v_BHUD)
    k_BGTK, v_BGTD = (part.repeat(1, groups, 1, 1) for part in (k_BHUK, v_BHUD))  # nothing came before: a whole window
    return causal_attention(*(part.transpose(1, 2) for part in (q_BGTK, k_BGTK, v_BGTD))).transpose(1, 2)


def look_back(q_BGTK: Tensor, k_BHUK: Tensor, v_BHUD: Tensor) -> Tensor:
    """The same for few new positions and scaled queries. What is kept is read as it lies and not copied for each group of heads."""
    heads, new, length = k_BHUK.shape[1], q_BGTK.shape[2], k_BHUK.shape[2]
    later_TU = torch.ones(new, length, dtype=torch.bool, device=q_BGTK.device).triu(length - new + 1)
    q_BHRK = q_BGTK.unflatten(1, (-1, heads)).transpose(1, 2).flatten(2, 3)
    scores_BHRU = (q_BHRK @ k_BHUK.mT).masked_fill(later_TU.repeat(q_BHRK.shape[2] // new, 1), -torch.inf)
    return (scores_BHRU.softmax(dim=-1) @ v_BHUD).unflatten(2, (-1, new)).transpose(1, 2).flatten(1, 2)
