"""Decoding with a cache, so that each token is processed once.

A decoder is a copy of the model's module tree with the same parameters. Only the modules that mix across time are replaced, by
ones that cache what they need from earlier tokens. There are two kinds of cache:

    KEYS_AND_VALUES   of every head: works for every model
    INPUTS            only x_s, C numbers per stack. Keys that are neither rotated nor normalised are a linear map of it, as values
                      are, so these maps move to the query and after the sum: (x W_q) . (x_u W_k) = (x W_q W_k^T) . x_u

Dimension letters: B batch, T new tokens, U all tokens so far, C width of the stream, G heads of queries, H heads of keys and values
(query head g reads head g mod H), K dim of queries and keys, D dim of values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stacklm.model.custom import Custom
from stacklm.model.dense import Attention
from stacklm.model.kernels import causal_attention
from stacklm.model.layers import LanguageModel, Positions, Rotation, ShortConv
from stacklm.model.stacked import FactoredAttention, PublishedAttention, SharedAttention


class Cache:
    """The number of tokens so far, U, and the tensors cached for them."""

    def __init__(self, context: int) -> None:
        self.context, self.tokens = context, 0
        self._pasts: list[Past] = []

    def past(self) -> Past:
        """Register another tensor to cache per token."""
        self._pasts.append(Past(self))
        return self._pasts[-1]

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token of one sequence; 0 before the first token."""
        return sum(past.bytes_per_token for past in self._pasts)


class Past:
    """One cached tensor, with time in the second-to-last dimension. Memory for the whole context is allocated up front."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._room: Tensor | None = None

    def extend(self, new: Tensor) -> Tensor:
        """Append the entries of the new tokens, [..., T, K]; return all so far, [..., U, K]."""
        stop = self._cache.tokens
        start = stop - new.shape[-2]
        if start == 0 or self._room is None:
            self._room = new.new_empty(*new.shape[:-2], self._cache.context, new.shape[-1])
        self._room[..., start:stop, :] = new
        return self._room[..., :stop, :]

    @property
    def bytes_per_token(self) -> int:
        return 0 if self._room is None else self._room[:1, ..., 0, :].nbytes


class CountingPositions(nn.Module):
    """Positions that continue after the previous tokens."""

    def __init__(self, positions: Positions, cache: Cache) -> None:
        super().__init__()
        self.cache = cache

    def forward(self, ids_BT: Tensor) -> Tensor:
        stop = self.cache.tokens
        return torch.arange(stop - ids_BT.shape[1], stop, dtype=torch.float32, device=ids_BT.device)


class FoldedOnce(nn.Module):
    """Published attention with weights folded once instead of per token."""

    def __init__(self, attention: PublishedAttention) -> None:
        super().__init__()
        self.attention, self.heads, self.query, self.key = attention, attention.heads, attention.query, attention.key
        with torch.no_grad():
            self.folded = attention.fold()

    def forward(self, x_BTC: Tensor, rotation: Rotation | None) -> Tensor:
        return self.attention(x_BTC)

    def project(self, x_BTC: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        return self.attention.project(x_BTC, rotation, self.folded)

    def combine(self, a_BTHD: Tensor, x_BTC: Tensor) -> Tensor:
        return self.attention.combine(a_BTHD, x_BTC, self.folded)


class KeysAndValues(nn.Module):
    """Transformed keys, and values: H * (K + D) numbers per token and stack (or dense layer)."""

    def __init__(self, attention: Attention | FoldedOnce | FactoredAttention | SharedAttention, cache: Cache) -> None:
        super().__init__()
        self.attention: Any = attention  # each takes its model's rotation, or None
        self.keys, self.values = cache.past(), cache.past()

    def forward(self, x_BTC: Tensor, rotation: Rotation | None) -> Tensor:
        q_BGTK, k_BHTK, v_BHTD = (part.transpose(1, 2) for part in self.attention.project(x_BTC, rotation))
        a_BGTD = attend(q_BGTK, self.keys.extend(k_BHTK), self.values.extend(v_BHTD))
        return self.attention.combine(a_BGTD.transpose(1, 2), x_BTC)


class Inputs(nn.Module):
    """Only the input of a stack, C numbers per token: all G heads attend to it as the keys and values of a single head.

    The key bias is left out: it adds the same to all scores of a query. Raises `ValueError` if keys are rotated or normalised,
    and so not a linear map of the input.
    """

    def __init__(self, attention: FoldedOnce | FactoredAttention, cache: Cache) -> None:
        super().__init__()
        if isinstance(attention, FactoredAttention) and (attention.transforms.rope or attention.transforms.query_norm is not None):
            refuse(attention, cache)
        self.attention = attention
        self.key_GKC = attention.key.weight.detach().unflatten(1, (attention.heads, -1)).flatten(0, 1)
        value = attention.folded.value if isinstance(attention, FoldedOnce) else attention.value.weight.detach().flatten(0, 1)
        self.value_GDC = value.unflatten(0, (len(self.key_GKC), -1))
        self.inputs = cache.past()

    def forward(self, x_BTC: Tensor, rotation: None) -> Tensor:
        x_BUC = self.inputs.extend(x_BTC)
        if x_BUC.shape == x_BTC.shape:  # no earlier tokens: plain attention over a whole sequence
            return self.attention(x_BTC, rotation)
        q_BTGK = self.attention.query.shared(x_BTC).flatten(2).unflatten(2, (len(self.key_GKC), -1))
        q_BGTC = torch.einsum("btgk,gkc->bgtc", q_BTGK, self.key_GKC) * q_BTGK.shape[-1] ** -0.5
        x_BHUC = x_BUC[:, None]
        a_BGTC = look_back(q_BGTC, x_BHUC, x_BHUC)
        return self.attention.combine(torch.einsum("bgtc,gdc->btgd", a_BGTC, self.value_GDC), x_BTC)


class CachedConv(nn.Module):
    """A short convolution that keeps the last few inputs for the next token."""

    def __init__(self, convolution: ShortConv, cache: Cache) -> None:
        super().__init__()
        self.convolution, self.cache = convolution, cache

    def forward(self, x_BTC: Tensor) -> Tensor:
        reach = self.convolution.reach
        if self.cache.tokens == x_BTC.shape[1]:
            self.before = x_BTC.new_zeros(len(x_BTC), reach, x_BTC.shape[2])
        padded = torch.cat([self.before, x_BTC], dim=1)
        self.before = padded[:, -reach:]
        return self.convolution.slide(padded)


def refuse(attention: nn.Module, cache: Cache) -> nn.Module:
    kind = type(attention).__name__
    raise ValueError(f"the inputs of {kind} are not enough to decode: its keys are transformed, or shared; keep keys and values")


Replacements = Mapping[type[nn.Module], Callable[[Any, Cache], nn.Module]]

KEYS_AND_VALUES: Replacements = {
    Positions: CountingPositions,
    ShortConv: CachedConv,
    Attention: KeysAndValues,
    PublishedAttention: lambda attention, cache: KeysAndValues(FoldedOnce(attention), cache),
    FactoredAttention: KeysAndValues,
    SharedAttention: KeysAndValues,
}
INPUTS: Replacements = {
    Positions: CountingPositions,
    ShortConv: CachedConv,
    Attention: refuse,
    PublishedAttention: lambda attention, cache: Inputs(FoldedOnce(attention), cache),
    FactoredAttention: Inputs,
    SharedAttention: refuse,
}


class Decoder:
    """A model that processes a batch of sequences incrementally, each token once."""

    def __init__(self, model: LanguageModel, context: int, replacements: Replacements = KEYS_AND_VALUES) -> None:
        """Raises `ValueError` for a model in training mode, or one that the given kind of cache cannot decode."""
        if model.training:
            raise ValueError("the model is in training mode, where dropout changes its features; call its `eval` first")
        self.cache = Cache(context)
        self.device = next(model.parameters()).device
        self.head: nn.Module = model.head
        if not isinstance(model, Custom):
            twin = with_cache(model, replacements, self.cache)
            self._next: Callable[[Tensor], Tensor] = twin.features
        elif replacements is KEYS_AND_VALUES:
            step, self.head = model.decoding()
            self._next = lambda ids_BT: step(ids_BT, self.cache.tokens == ids_BT.shape[1])
        else:
            raise ValueError(f"the inputs of {model.name} are not enough to decode: how it computes is not known")

    def reset(self) -> None:
        """Start over, with any number of sequences."""
        self.cache.tokens = 0

    @torch.no_grad()
    def features(self, ids_BT: Tensor) -> Tensor:
        """The features of the next tokens, [B, T, W], equal to the model's for the whole sequence so far.

        Raises `ValueError` if that is longer than the context.
        """
        tokens = self.cache.tokens + ids_BT.shape[1]
        if tokens > self.cache.context:
            raise ValueError(f"{tokens} tokens are more than the model's context of {self.cache.context}; reset it, or give fewer")
        self.cache.tokens = tokens
        return self._next(ids_BT)


def with_cache(module: Any, replacements: Replacements, cache: Cache) -> Any:
    """A copy of the module tree with the same parameters, in which the replacements are made."""
    if type(module) in replacements:
        return replacements[type(module)](module, cache)
    twin = copy.copy(module)
    twin._modules = {name: with_cache(child, replacements, cache) for name, child in module._modules.items()}
    return twin


def attend(q_BGTK: Tensor, k_BHUK: Tensor, v_BHUD: Tensor) -> Tensor:
    """Causal attention of the last T of U positions, [B, G, T, D]."""
    groups, new = q_BGTK.shape[1] // k_BHUK.shape[1], q_BGTK.shape[2]
    if new < k_BHUK.shape[2]:
        return look_back(q_BGTK * q_BGTK.shape[-1] ** -0.5, k_BHUK, v_BHUD)
    k_BGTK, v_BGTD = (part.repeat(1, groups, 1, 1) for part in (k_BHUK, v_BHUD))  # no earlier tokens: a whole sequence
    return causal_attention(*(part.transpose(1, 2) for part in (q_BGTK, k_BGTK, v_BGTD))).transpose(1, 2)


def look_back(q_BGTK: Tensor, k_BHUK: Tensor, v_BHUD: Tensor) -> Tensor:
    """`attend` for few new positions, with scaled queries. Reads the cache in place, without a copy per group of heads."""
    heads, new, length = k_BHUK.shape[1], q_BGTK.shape[2], k_BHUK.shape[2]
    later_TU = torch.ones(new, length, dtype=torch.bool, device=q_BGTK.device).triu(length - new + 1)
    queries = q_BGTK.unflatten(1, (-1, heads)).transpose(1, 2).flatten(2, 3)  # [B, H, G / H * T, K]
    scores = (queries @ k_BHUK.mT).masked_fill(later_TU.repeat(queries.shape[2] // new, 1), -torch.inf)
    return (scores.softmax(dim=-1) @ v_BHUD).unflatten(2, (-1, new)).transpose(1, 2).flatten(1, 2)
